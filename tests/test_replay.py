"Replay: hand-computed studies, the yardsticks of the reference folder, properties, and histories out of real stores"
import importlib.util
import json
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tts_tuner.config.errors import UserError
from tts_tuner.signals.simulator import EVENTS, Event, Recipe, ar1, draw_recipe, mean_curve, simulate, simulate_study
from tts_tuner.tuner.histories import as_task, read_events, read_history, read_mlflow, read_tensorboard
from tts_tuner.tuner.policies import USUAL_POLICIES, USUAL_RULES, policy_of, rule_of
from tts_tuner.tuner.replay import Study, Task, front, interval, paired, picture, play, replay, table
from tts_tuner.tuner.replay_runs import RecordedRun, RunSoFar, play_run, replay_runs, rule_picture, rule_table

LOSS = np.array([[9., 8, 7, 5], [6, 4, 3, 3], [9, 9, 2, 1]])  # best 1, median 3


def yardstick(shared_data, name):
    "A script of the reference folder as a module"
    path = shared_data.parent / 'bench' / f'{name}.py'
    if not path.is_file(): pytest.skip(f'{path.name} is not here')
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- studies

@pytest.mark.parametrize('text, epochs, regret', [
    ('none', (4, 4, 4), 0), ('top:2,1', (2, 4, 2), 1), ('top:3,1', (3, 3, 4), 0), ('halving:2', (1, 4, 1), 1), ('rungs:1>2,2>1', (2, 4, 1), 1), ('patience:1', (4, 4, 2), 1),
    ('patience:2', (4, 4, 4), 0), ('median:1,1', (4, 4, 1), 1), ('hyperband:4', (1, 4, 4), 0)])
def test_by_hand(text, epochs, regret):
    "Hyperband by 4: a bracket of two trials of which one goes on after an epoch, then one trial to its end"
    got = play(policy_of(text), Task('tiny', LOSS))
    assert got.epochs == epochs and got.regret == regret and np.isclose(got.compute, sum(epochs) / 12)


def test_the_median_rule_sees_means_of_earlier_trials_only():
    loss = np.array([[4., 4, 4], [2, 2, 2], [5, 1, 1], [3, 3, 3]])
    assert play(policy_of('median:2,1'), Task('x', loss)).epochs == (3, 3, 1, 3)  # 3 is not above the median of 4, 2, 5


def test_a_study_shows_nothing_but_what_was_asked_for():
    study = Study(Task('tiny', LOSS))
    assert {a for a in vars(study) if not a.startswith('_')} == {'n', 'T', 'hp', 'seen'} and study.seen == [[], [], []]
    assert [study.advance(1) for _ in range(4)] == [6, 4, 3, 3] and study.seen[1] == [6, 4, 3, 3]
    with pytest.raises(IndexError, match='trial 1'): study.advance(1)


def test_a_policy_that_writes_into_what_it_saw_gains_nothing():
    def cheat(study):
        study.advance(0)
        study.seen[0][:] = [-1.0]
        study.seen[1].append(-5.0)
    got = play(cheat, Task('tiny', LOSS))
    assert got.epochs == (1, 0, 0) and got.regret == (5 - 1) / 2  # 9 is seen; nobody is charged with worse than the worst trial's best, 5


def test_trials_that_diverge():
    loss = np.array([[3., np.nan, np.inf], [2, 1, np.nan], [np.nan] * 3])
    for text in USUAL_POLICIES: assert 0 <= play(policy_of(text), Task('x', loss)).regret < np.inf
    assert play(policy_of('none'), Task('x', loss)).found


@settings(max_examples=25, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(2, 9), st.integers(2, 12)), elements=st.integers(-1000, 1000), unique=True), st.integers(1, 1000), st.integers(-1000, 1000))
def test_ranks_decide(loss, scale, shift):
    "No policy of the usual ones that compares by rank alone acts otherwise on other units; regret has none"
    for text in ('none', 'patience:3', 'median:2,1', 'percentile:50,2,1', 'hyperband:2', 'halving:2', 'top:1,2'):
        a, b = (play(policy_of(text), Task('x', x.astype(float))) for x in (loss, loss * scale + shift))
        assert a.epochs == b.epochs or text.startswith('median')  # means of floats may tie in one unit and not in the other
        if a.epochs == b.epochs: assert np.isclose(a.regret, b.regret) and a.compute == b.compute


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9))
def test_order_of_trials_does_not_matter_to_those_who_compare_all(seed, n, epochs):
    rng = np.random.default_rng(seed)
    loss, order = rng.permutation(n * epochs).reshape(n, epochs) * 1.0, rng.permutation(n)
    for text in ('none', 'halving:2', 'top:2,2', 'rungs:1>5,3>2'):
        a, b = play(policy_of(text), Task('x', loss)), play(policy_of(text), Task('x', loss[order]))
        assert tuple(a.epochs[i] for i in order) == b.epochs and a.regret == b.regret


def test_quick_enough():
    "100 trials x 50 epochs under 2 s of the processor"
    task = Task('x', *simulate_study(np.random.default_rng(0)))
    for text in USUAL_POLICIES:
        begun = time.process_time()
        play(policy_of(text), task)
        assert time.process_time() - begun < 2, text


def test_same_figures_as_the_yardstick(shared_data):
    score = yardstick(shared_data, 'replay_score')
    files = sorted((shared_data / 'curves').glob('taskset_*.npz'))
    tasks, _, _ = read_history(str(shared_data / 'curves'))
    pairs = {'none': score.everything, 'median:5,5': score.median_rule(), 'hyperband:3': score.hyperband(), 'top:5,3': score.rungs((5, 3)),
             'rungs:3>20,8>6,20>3': score.rungs((3, 20), (8, 6), (20, 3))}
    for ours, theirs in zip(replay([policy_of(t) for t in pairs], tasks, draws=1), pairs.values()):
        rows = score.evaluate(theirs, [str(f) for f in files], draws=1)
        np.testing.assert_allclose(np.stack([ours.task, ours.compute, ours.regret], 1), rows, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- draws, intervals, pictures

def test_draws_are_the_same_for_all():
    tasks = [Task(str(s), *simulate_study(np.random.default_rng(s), n=40)) for s in range(2)]
    alone, = replay([policy_of('top:5,5')], tasks, draws=3, n=20)
    among = replay([policy_of(t) for t in ('none', 'top:5,5')], tasks, draws=3, n=20)[1]
    assert np.array_equal(alone.regret, among.regret) and len(alone.regret) == 6
    assert paired(alone, among, np.random.default_rng(0)) == (0, 0, 0)
    with pytest.raises(ValueError, match='same draws'): paired(alone, replay([policy_of('none')], tasks, draws=2)[0], np.random.default_rng(0))


def test_interval_of_rows_against_scipy():
    from scipy.stats import bootstrap
    x = np.random.default_rng(0).exponential(size=80)
    theirs = bootstrap((x,), np.mean, n_resamples=20_000, method='percentile', rng=np.random.default_rng(1)).confidence_interval
    np.testing.assert_allclose(interval(x, np.random.default_rng(2), times=20_000), theirs, atol=0.01)
    with pytest.raises(ValueError, match='shape'): interval(np.zeros(0), np.random.default_rng(0))


def test_table_and_pictures(tmp_path):
    from rich.console import Console
    tasks = [Task('x', *simulate_study(np.random.default_rng(0), n=30))]
    results = replay([policy_of(t) for t in ('none', 'top:5,5', 'halving:3')], tasks, draws=2)
    with (tmp_path / 'out').open('w') as f: Console(file=f, width=160).print(table(results, np.random.default_rng(0), 'no stopping'))
    text = (tmp_path / 'out').read_text()
    assert 'minus no stopping' in text and '5 epochs, then 5' in text and '100.0 %' in text
    picture(results, np.random.default_rng(0), tmp_path / 'p.png')
    runs = [RecordedRun(str(i), np.arange(1, 31), row) for i, row in enumerate(tasks[0].loss[:, :30]) if np.isfinite(row).any()]
    rules = replay_runs([rule_of(t) for t in USUAL_RULES], runs)
    assert rule_table(rules, np.random.default_rng(0)).row_count == len(USUAL_RULES)
    rule_picture(rules, tmp_path / 'q.png')
    assert (tmp_path / 'p.png').stat().st_size > 1000 and (tmp_path / 'q.png').stat().st_size > 1000
    assert {r.name for r in front(results)} >= {'halving 3'}


# ---------------------------------------------------------------- single runs

def test_same_stops_as_the_yardstick(shared_data):
    score, path = yardstick(shared_data, 'stop_score'), shared_data / 'curves' / 'librispeech_runs.jsonl.gz'
    _, runs, _ = read_history(str(path), 'valid_wer', extra=('valid_loss',))
    data = list(score.runs(path))
    assert len(runs) == len(data)
    for p, gain in ((3, 0.0), (15, 0.0), (5, 0.005)):
        got = replay_runs([rule_of(f'patience:{p},{gain}')], runs)[0]
        np.testing.assert_allclose(np.stack([got.saved, got.oracle, got.lost], 1), [score.play(score.patience(p, gain), *d) for d in data], rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.integers(1, 8))
def test_a_rule_never_saves_more_than_the_oracle_without_a_false_stop(values, p):
    got = play_run(rule_of(f'patience:{p}'), RecordedRun('x', np.arange(1, len(values) + 1), np.array(values)))
    assert 0 <= got.saved < 1 and 0 <= got.oracle < 1 and got.lost >= 0
    if not got.false: assert got.saved <= got.oracle + 1e-12


@pytest.mark.parametrize('level', [2, 3])
def test_a_vote_asked_where_it_matters_decides_as_one_asked_always(level):
    from tts_tuner.signals.forecast import forecast
    from tts_tuner.signals.trend import statistics_opinion
    from tts_tuner.signals.vote import Switches, attention_vote, bayesian_vote, decide, statistics_vote
    rng, stops = np.random.default_rng(level), 0
    for kind in ((), ('rate drop',), ('u-turn',)):
        c = simulate(draw_recipe(rng, 40, kind, sigma=0.005), rng)
        scores, rule = np.minimum(0.95, np.linspace(0.3, 1.6, 40)), rule_of(f'vote:{level}')
        for n in range(1, 41):
            v, t = c.values[:n], np.arange(1.0, n + 1)
            if n % 5 in (1, 3): continue  # not every prefix, so that fits are kept across gaps too
            got = rule(RunSoFar(t, v, dict(alignment_score=scores[:n])))
            if n < 6: assert not got
            elif n % 10 == 0:
                fresh = rule_of(f'vote:{level}')(RunSoFar(t, v, dict(alignment_score=scores[:n])))
                seen = forecast(v, t)
                votes = [statistics_vote(statistics_opinion(v, t)), attention_vote(scores[:n]), bayesian_vote(seen.gain(0.005 * abs(seen.best)))]
                assert fresh == decide(votes, Switches(level=level)).stop
                stops += fresh
    assert stops


def test_rules_that_need_what_is_not_there():
    turned = RunSoFar(np.arange(1.0, 13), -np.linspace(0.1, 0.9, 12))
    for text in ('stopping', 'prechelt', 'vote:1'):
        with pytest.raises(UserError, match='0 up'): rule_of(text)(turned)
    assert not rule_of('vote:3')(RunSoFar(np.arange(1.0, 13), np.full(12, np.nan))) and not rule_of('prechelt:PQ,0.1')(RunSoFar(np.arange(1.0, 3), np.ones(2)))
    with pytest.raises(UserError, match='standard'): rule_of('stopping:careless')
    with pytest.raises(UserError, match='level'): rule_of('vote:4')


# ---------------------------------------------------------------- simulated curves

@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(EVENTS), st.integers(20, 200))
def test_nothing_of_an_event_is_seen_before_it(seed, kind, n):
    recipe = draw_recipe(np.random.default_rng(seed), n, (kind,))
    at, calm = recipe.events[0].at, Recipe(n, recipe.level, recipe.decays, recipe.power, recipe.phi, recipe.sigma)
    assert np.array_equal(mean_curve(recipe)[:at], mean_curve(calm)[:at])
    a, b = (simulate(r, np.random.default_rng(seed)).values[:at] for r in (recipe, calm))
    assert np.array_equal(a, b)


@pytest.mark.parametrize('wrong', [dict(n=0), dict(n=5, phi=1.0), dict(n=5, sigma=-1.0), dict(n=5, sigma=float('nan')), dict(n=5, events=(Event('spike', 5),))])
def test_recipes_that_are_none(wrong):
    with pytest.raises(ValueError): Recipe(**wrong)


def test_noise_is_that_of_a_filter():
    from scipy.signal import lfilter
    z = np.random.default_rng(3).standard_normal(500)
    driven = np.sqrt(1 - 0.81) * z
    driven[0] = z[0]
    np.testing.assert_allclose(ar1(500, 0.9, np.random.default_rng(3)), lfilter([1], [1, -0.9], driven), atol=1e-12)


# ---------------------------------------------------------------- histories

def test_event_files_as_tensorboard_reads_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(tmp_path / 'a') as w:
        for s in range(50):
            w.add_scalar('val_loss', 1 / (s + 1), s)
            w.add_scalar('train/new_style', s, s, new_style=True)
        w.add_text('words', 'no number', 1)
        w.add_histogram('h', np.arange(9), 1)
    got, theirs = read_events(list((tmp_path / 'a').glob('events*'))), EventAccumulator(str(tmp_path / 'a'), size_guidance=dict(scalars=0, tensors=0)).Reload()
    assert set(got) == {'val_loss', 'train/new_style'}
    assert got['val_loss'] == [(e.step, e.value) for e in theirs.Scalars('val_loss')] and got['train/new_style'] == [(s, s) for s in range(50)]
    run, = read_tensorboard(tmp_path, 'val_loss')
    assert run.name == 'a' and len(run.steps) == 49 + 1
    file = next((tmp_path / 'a').glob('events*'))
    data = file.read_bytes()
    file.write_bytes(data[:700] + bytes([data[700] ^ 255]) + data[701:])  # a damaged file ends where the damage is, or a little later
    assert len(read_events([file]).get('val_loss', [])) <= 50


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "A small MLflow store: a study of a parent and five children, one that failed, one stopped, one without the metric; and an experiment of another name"
    os.environ['MLFLOW_DISABLE_TELEMETRY'] = 'true'
    from mlflow.entities import Metric, Param
    from tts_tuner.training.sinks import connect_mlflow
    file = tmp_path_factory.mktemp('mlflow') / 'mlflow.db'
    client, experiment = connect_mlflow(f'sqlite:///{file}', 'voices')
    parent = client.create_run(experiment, run_name='anna').info.run_id
    for i, end in enumerate(('FINISHED', 'FINISHED', 'FAILED', 'KILLED', 'FINISHED')):
        run = client.create_run(experiment, run_name=f't{i}', tags={'mlflow.parentRunId': parent}).info.run_id
        length = 12 if end == 'FINISHED' else 5
        key = 'val_loss' if i < 4 else 'accuracy'
        points = [Metric(key, 1 + i / 10 + 1 / s, s, 10 * s) for s in range(1, length + 1)]
        if i == 1: points.append(Metric(key, 0.5, 10**6, 120))  # logged again after a restart
        if i == 2: points.append(Metric(key, float('nan'), 10**6, 60))
        client.log_batch(run, metrics=points, params=[Param('learning_rate', str(10.0 ** -i)), Param('attention', 'forward' if i % 2 else 'location')])
        client.set_terminated(run, end)
    other = client.create_experiment('others')
    alone = client.create_run(other, run_name='alone').info.run_id
    client.log_batch(alone, metrics=[Metric('val_loss', 3.0 - k, k, 0) for k in range(3)])  # steps were never given
    return file


def test_an_mlflow_store(store):
    runs = read_mlflow(f'sqlite:///{store}', 'val_loss', experiment='voices')
    assert [(r.name, r.group, r.status, len(r.steps)) for r in runs] == \
        [('t0', 'anna', 'finished', 12), ('t1', 'anna', 'finished', 12), ('t2', 'anna', 'failed', 6), ('t3', 'anna', 'stopped', 5)]
    assert runs[1].values[-1] == 0.5 and np.isnan(runs[2].values[-1]) and runs[3].settings == dict(learning_rate=0.001, attention='forward')
    task = as_task(runs)
    assert task.loss.shape == (4, 12) and np.isinf(task.loss[2, 5:]).all() and (task.loss[3, 4:] == task.loss[3, 4]).all() and task.hp.shape == (4, 2)
    assert play(policy_of('none'), task).found and len(as_task(runs, 'leave').loss) == 3
    tasks, whole, said = read_history(str(store))
    assert [t.name for t in tasks] == ['anna'] and [r.name for r in whole] == ['t0', 't1'] and any('others' in s for s in said)
    alone = read_mlflow(f'sqlite:///{store}', 'val_loss', experiment='others')[0]
    assert alone.steps.tolist() == [1, 2, 3] and alone.values.tolist() == [3, 2, 1]


@pytest.mark.parametrize('metric, experiment, word', [('val_los', '', 'val_loss'), ('val_loss', 'voice', 'voices'), ('accuracy', 'others', 'val_loss')])
def test_what_is_not_in_a_store(store, metric, experiment, word):
    with pytest.raises(UserError, match=word): read_mlflow(f'sqlite:///{store}', metric, experiment=experiment)


def test_files_that_are_no_store(tmp_path):
    (tmp_path / 'mlflow.db').write_bytes(b'not a database at all, only some words' * 40)
    with pytest.raises(UserError, match='cannot be read'): read_history(str(tmp_path / 'mlflow.db'))
    (tmp_path / 'x.jsonl').write_text('{"step": [1, 2], "val_loss": [1, null]}\nnonsense\n')
    with pytest.raises(UserError, match='Line 2'): read_history(str(tmp_path / 'x.jsonl'))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no'): read_history(str(tmp_path / 'empty'))


def test_recorded_runs_with_their_ends(tmp_path):
    rows = [dict(name=n, corpus='demo', status=s, step=list(range(1, 13)), settings=dict(rate=i), validation=dict(score=[0.1 * i] * 12, val_loss=[1.0] * 12))
            for i, (n, s) in enumerate((('a', 'done'), ('b', 'not finite at step 9'), ('c', 'paused')))]
    (tmp_path / 'r.jsonl').write_text('\n'.join(json.dumps(r) for r in rows))
    tasks, whole, said = read_history(str(tmp_path / 'r.jsonl'), 'score', maximize=True, extra=('val_loss',))
    assert [r.name for r in whole] == ['a'] and tasks[0].loss[:, 0].tolist() == [0, -0.1, -0.2] and (whole[0].extra['val_loss'] == 1).all()
    assert tasks[0].hp.ravel().tolist() == [0, 1, 2]


# ---------------------------------------------------------------- the command

@pytest.fixture
def ask(capsys, monkeypatch, tmp_path):
    from tts_tuner import cli
    monkeypatch.chdir(tmp_path)
    for name in ('MLFLOW_DISABLE_TELEMETRY', 'DO_NOT_TRACK', 'MPLBACKEND'): monkeypatch.setenv(name, os.environ.get(name, 'Agg' if name == 'MPLBACKEND' else 'true'))

    def call(*words):
        with pytest.raises(SystemExit) as ended: cli.main(['replay', *map(str, words)])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err
    return call


def test_asked_of_a_store(ask, store, tmp_path):
    code, out, err = ask(store, '--policy', 'none', '--policy', 'top:2,1', '--against', 'none', '--picture', tmp_path / 'p.svg')
    assert (code, err) == (0, '') and 'anna: 1 of 4 stopped early' in out and 'minus no stopping' in out and '1 study of 4 trials' in out, out
    assert '<svg' in (tmp_path / 'p.svg').read_text()
    code, out, _ = ask(store, '--single', '--policy', 'patience:3')
    assert code == 0 and '2 runs. The oracle' in out and "oracle's" in out


@pytest.mark.parametrize('words, said', [
    (['nowhere'], 'nowhere'), (['simulated', '--policy', 'toop:5'], 'Did you mean "top"'), (['simulated', '--ended', 'so'], 'hold or leave'),
    (['simulated', '--picture', 'p.doc'], '.png'), (['simulated', '--single', '--policy', 'top:5'], 'no rule "top"'), (['none.db'], 'none.db')])
def test_questions_that_cannot_be_asked(ask, words, said):
    code, out, err = ask(*words)
    assert code == 2 and out == '' and err.count('\n') == 1 and said in err and 'Traceback' not in err, err


def test_policies_are_listed(ask):
    code, out, _ = ask('--policies')
    assert code == 0 and all(word in out for word in ('top', 'rungs', 'promotion', 'hyperband', 'patience:10'))


@pytest.mark.parametrize('name, content', [('list.jsonl', b'[1, 2]\n'), ('words.jsonl', b'{"step": [1, 2], "val_loss": ["x", 2]}\n'),
    ('plain.jsonl.gz', b'hello'), ('junk.npz', b'hello')])
def test_files_that_hold_no_curves_are_a_users_mistake(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name.split('.')[0]): read_history(str(tmp_path / name))


@pytest.mark.parametrize('arrays, about', [(dict(valid_loss=np.full((5, 9), np.nan)), 'finite'), (dict(valid_loss=np.ones((1, 9))), 'two runs'),
    (dict(valid_loss=np.ones((5, 9)), hp=np.ones((4, 2))), 'hp')])
def test_tables_that_are_no_study_are_a_users_mistake(tmp_path, arrays, about):
    np.savez(tmp_path / 'study.npz', **arrays)
    with pytest.raises(UserError, match=about): read_history(str(tmp_path / 'study.npz'))


def test_settings_of_another_program_do_not_hide_the_curves(tmp_path):
    for i in range(2):
        run = tmp_path / f'run{i}'
        run.mkdir()
        (run / 'hparams.yaml').write_text('model: !!python/object:other.Model {}\n')
        (run / 'metrics.jsonl').write_text(''.join(f'{{"step": {s}, "val_loss": {"null" if s == 3 else 1 / s}}}\n' for s in range(1, 12)))
    tasks, runs, _ = read_history(str(tmp_path))
    assert len(runs) == 2 and len(tasks) == 1
