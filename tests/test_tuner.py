"Studies with a stand-in for the trainer: killed, stopped, crashed, out of time, gone on with"
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_tiny_corpus

from tts_tuner.config.contracts import read_decisions
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.settings import RunSettings, load_settings
from tts_tuner.tuner.book import StudyStopped
from tts_tuner.tuner.loop import Data, keep_facts, prepare_data, replay, run_study
from tts_tuner.tuner.engines import open_engine
from tts_tuner.tuner.rungs import choose_winner
from tts_tuner.tuner.trainer_wrapper import TrainerJob, TrainerProcess, ending_of, find_trainer, stop_trainers
from tts_tuner.tuner.trials import MetricsReader, PlainView, best_standing, read_status

FAKE = (sys.executable, str(Path(__file__).with_name('fake_trainer.py')))

DRIVER = '''
import sys
from tts_tuner.config.settings import load_settings
from tts_tuner.tuner.loop import Data, run_study
settings = load_settings(sys.argv[1])
try: print(run_study(settings, trainer=sys.argv[2:], prepare=lambda s, say: Data('corpus', 'abc'), poll=0.02).winner)
except Exception as e: print(e, file=sys.stderr); sys.exit(getattr(e, 'exit_code', 1))
'''


class Silent(PlainView):
    def __init__(self): self.said, self.rows = [], []
    def say(self, text): self.said.append(text)
    def update(self, rows): self.rows = list(rows)


def make(tmp_path, **flags) -> RunSettings:
    given = dict(study='s', runs=str(tmp_path / 'runs'), hparams='max_steps=200,device=cpu', trials=4, workers=2, tracking=dict(enabled=False), rungs=dict(steps=[40, 120])) | flags
    return load_settings(**given)


def go(settings, view=None, digest='abc', trainer=FAKE):
    return run_study(settings, view or Silent(), trainer=trainer, prepare=lambda s, say: Data('corpus', digest), poll=0.02)


def steps_of(folder: Path) -> dict[str, list[int]]:
    return {p.parents[1].name: [json.loads(line)['step'] for line in p.read_text().splitlines()] for p in sorted(folder.glob('t*/g001/metrics.jsonl'))}


def timeless(folder: Path): return [replace(d, time=None) for d in read_decisions(folder / 'decisions.jsonl')]


def drive(settings, tmp_path, **env) -> subprocess.Popen:
    config = tmp_path / 'driver.yaml'
    from tts_tuner.config.settings import save_settings
    save_settings(config, settings)
    command = [sys.executable, '-c', DRIVER, str(config), *FAKE]
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


def test_a_killed_study_goes_on_where_it_was(tmp_path):
    "SIGKILL of the tuner in the middle of rung one, with trainers at work; they are adopted, no step is trained twice, the outcome is the same"
    settings = make(tmp_path)
    process = drive(settings, tmp_path, FAKE_PACE='0.03')
    wait_for(lambda: read_status(settings.folder / 't000' / 'g001').get('step', 0) >= 20)
    process.kill()
    process.communicate()
    orphan = find_trainer(settings.folder / 't000' / 'g001')
    assert orphan is not None, 'training must survive the tuner'
    result = go(settings)
    assert not any(d.kind == 'restart' for d in timeless(settings.folder))
    assert (settings.folder / 't000' / 'g001' / 'starts').read_text().split()[:2] == ['0', '40']
    for name, steps in steps_of(settings.folder).items(): assert steps == list(range(1, len(steps) + 1)), (name, steps)
    plain = go(make(tmp_path, study='s', runs=str(tmp_path / 'other')))
    assert result.winner == plain.winner and timeless(settings.folder) == timeless(tmp_path / 'other' / 's')


def test_killed_at_random_moments(tmp_path):
    "Tuner and trainers killed again and again: nothing is lost, nothing is done twice, decisions are those of an undisturbed study"
    settings = make(tmp_path, trials=4)
    for pause in (0.9, 1.3, 1.1, 1.6):
        process = drive(settings, tmp_path, FAKE_PACE='0.01')
        time.sleep(pause)
        process.kill()
        process.communicate()
        if pause == 1.3:
            for trial in settings.folder.glob('t*/g001'):
                if found := find_trainer(trial): found.kill()
    process = drive(settings, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert len(open_engine(settings, read_only=True).trials()) == 4
    for name, steps in steps_of(settings.folder).items(): assert steps == list(range(1, len(steps) + 1)), (name, steps)
    undisturbed = make(tmp_path, trials=4, runs=str(tmp_path / 'other'))
    go(undisturbed)
    kinds = lambda folder: [(d.kind, d.subject, d.step, d.reason) for d in timeless(folder) if d.kind != 'restart']
    assert kinds(settings.folder) == kinds(undisturbed.folder) and out.split()[-1] == next(s for k, s, *_ in kinds(undisturbed.folder) if k == 'final')


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal(tmp_path, number):
    settings = make(tmp_path)
    process = drive(settings, tmp_path, FAKE_PACE='0.03')
    wait_for(lambda: read_status(settings.folder / 't001' / 'g001').get('step', 0) >= 20)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and 'the same command goes on' in err
    assert read_status(settings.folder / 't001' / 'g001')['state'] == 'stopped'
    assert all(find_trainer(p) is None for p in settings.folder.glob('t*/g001'))
    go(settings)
    for name, steps in steps_of(settings.folder).items(): assert steps == list(range(1, len(steps) + 1)), (name, steps)


def test_a_trainer_that_dies_is_started_again_once(tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_CRASH', 't000@33')
    settings, view = make(tmp_path), Silent()
    result = go(settings, view)
    restarts = [d for d in timeless(settings.folder) if d.kind == 'restart']
    assert [d.subject for d in restarts] == ['t000'] and 'SIGKILL' in restarts[0].reason
    assert steps_of(settings.folder)['t000'] == list(range(1, len(steps_of(settings.folder)['t000']) + 1))
    assert (settings.folder / 't000' / 'g001' / 'starts').read_text().split()[:2] == ['0', '20'] and result.winner


def test_a_trainer_that_dies_again_is_given_up(tmp_path):
    program = tmp_path / 'dies.py'
    program.write_text("import runpy, sys\nif '/t000/' in ' '.join(sys.argv): sys.exit('no memory')\n"
                       f"runpy.run_path({FAKE[1]!r}, run_name='__main__')")
    settings = make(tmp_path)
    result = go(settings, trainer=(sys.executable, str(program)))
    assert result.winner != 't000' and [d.kind for d in timeless(settings.folder) if d.subject == 't000'] == ['restart', 'stop']
    assert 'no memory' in [d for d in timeless(settings.folder) if d.subject == 't000'][-1].reason
    before = timeless(settings.folder)
    go(settings)  # the next start does not try it again: it was decided
    assert timeless(settings.folder) == before and not (settings.folder / 't000' / 'g001' / 'metrics.jsonl').exists()


@pytest.mark.parametrize('where', ['t000@30', 't000@150'])
def test_nan_is_recorded_and_not_promoted(tmp_path, monkeypatch, where):
    monkeypatch.setenv('FAKE_NAN', where)
    settings = make(tmp_path)
    result = go(settings)
    stop = [d for d in timeless(settings.folder) if d.subject == 't000' and d.kind == 'stop']
    assert len(stop) == 1 and 'NaN in the loss' in stop[0].reason and result.winner != 't000'
    assert next(r for r in result.rows if r.trial == 't000').state == 'failed'
    assert open_engine(settings, read_only=True).trials()[0].state == 'fail'
    assert [d for d in replay(settings.folder)] == timeless(settings.folder)
    before = timeless(settings.folder)
    go(settings)
    assert timeless(settings.folder) == before


@pytest.mark.parametrize('pace', ['0', '0.01'])
def test_a_run_that_explodes_is_given_up_between_rungs(tmp_path, monkeypatch, pace):
    "Whether the tuner looks in time or late: the same decisions, and the record replays"
    monkeypatch.setenv('FAKE_EXPLODE', 't000@60')
    monkeypatch.setenv('FAKE_PACE', pace)
    settings = make(tmp_path)
    result = go(settings)
    [alert] = [d for d in timeless(settings.folder) if d.kind == 'alert']
    assert alert.subject == 't000' and alert.evidence[0].verdict == 'diverging' and 60 <= alert.step <= 100 and result.winner != 't000'
    stop = [d for d in timeless(settings.folder) if d.subject == 't000' and d.kind == 'stop']
    assert len(stop) == 1 and 'its loss explodes' in stop[0].reason
    assert open_engine(settings, read_only=True).trials()[0].state == 'fail'
    if pace == '0.01': assert max(steps_of(settings.folder)['t000']) < 120, 'it was interrupted'
    assert sorted(map(str, replay(settings.folder))) == sorted(map(str, timeless(settings.folder)))
    before = timeless(settings.folder)
    go(settings)
    assert timeless(settings.folder) == before
    blind = make(tmp_path, study='blind', early_stopping=dict(diverging=False))
    go(blind)
    assert not [d for d in timeless(blind.folder) if d.kind == 'alert'] and max(steps_of(blind.folder)['t000']) >= 120


def test_nothing_can_be_trained(tmp_path):
    settings = make(tmp_path, trials=2)
    with pytest.raises(TTSTunerError, match='could be trained: .*learning_rat'):
        go(settings, trainer=(sys.executable, '-c', 'import sys; print("There is no learning_rat.", file=sys.stderr); sys.exit(2)'))
    assert go(settings).winner, 'such a failure is not held against the trials'


def test_numbers_that_were_never_saved_do_not_count(tmp_path, monkeypatch):
    "A trainer that died between its numbers and its checkpoint does that rung again, or the rung would be missing from the record"
    monkeypatch.setenv('FAKE_FULL', 't000@50')
    settings = make(tmp_path, rungs=dict(steps=[50, 120]))
    with pytest.raises(TTSTunerError, match='No space left'): go(settings)
    result = go(settings)
    before = timeless(settings.folder)
    assert go(settings).winner == result.winner and timeless(settings.folder) == before
    assert list(replay(settings.folder)) == before


def test_the_step_that_wins_is_the_one_whose_weights_are_kept(tmp_path):
    "Among validations of one score the trainer keeps the best aligned as best.pt, and so must the tuner say"
    rows = [dict(step=s, time=s, alignment_score=d, attention_focus=f, attention_monotonicity=1, attention_coverage=1, success=0.5, score=0)
            for s, d, f in ((10, 0.5, 0.9), (20, 0.8, 0.2), (30, 0.8, 0.3))]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    reader = MetricsReader(tmp_path / 'metrics.jsonl')
    reader.read()
    best = best_standing('t000', reader)
    assert best.step == 20
    words = choose_winner([best], make(tmp_path).rungs)[0].reason
    assert 'does not speak yet' in words and 'no held-out sentence' not in words, 'half of them were spoken, only badly'


def test_a_mistyped_corpus_begins_no_study(tmp_path):
    def missing(settings, say): raise UserError('There is no folder my_vioce.')
    with pytest.raises(UserError, match='my_vioce'): run_study(make(tmp_path, corpus='my_vioce'), Silent(), trainer=FAKE, prepare=missing)
    assert go(make(tmp_path, corpus='my_voice')).winner, 'the same study name with the right folder'


def test_a_changed_corpus_is_refused_before_anything_is_replaced(tmp_path):
    corpus = make_tiny_corpus(tmp_path / 'corpus')
    settings = make(tmp_path, corpus=str(corpus), data=str(tmp_path / 'data'), hparams='frontend=characters,max_steps=200,device=cpu')
    keep_facts(settings, prepare_data(settings, lambda line: None))
    before = (settings.folder / 'manifest.json').read_bytes()
    lines = (corpus / 'metadata.csv').read_text().splitlines(keepends=True)
    (corpus / 'metadata.csv').write_text(''.join(lines[1:]))
    with pytest.raises(UserError, match='has changed'): prepare_data(settings, lambda line: None)
    assert (settings.folder / 'manifest.json').read_bytes() == before


def test_full_disk_is_not_held_against_a_trial(tmp_path):
    program = tmp_path / 'full.py'
    program.write_text("import runpy, sys\nif '/t002/' in ' '.join(sys.argv): print('No space left to write last.pt; nothing was lost.', file=sys.stderr); "
                       f"sys.exit(2)\nrunpy.run_path({FAKE[1]!r}, run_name='__main__')")
    settings = make(tmp_path, trials=3)
    with pytest.raises(TTSTunerError, match='No space left.*goes on from here'): go(settings, trainer=(sys.executable, str(program)))
    assert not timeless(settings.folder) and go(settings).winner


def test_time_runs_out_and_more_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_PACE', '0.02')
    settings = make(tmp_path, timeout='4s')
    result = go(settings)
    decisions = timeless(settings.folder)
    assert any(d.subject == 'study' and 'over' in d.reason for d in decisions) and decisions[-1].step < 200 and result.best_model.exists()
    assert max(map(max, steps_of(settings.folder).values())) < 200
    monkeypatch.setenv('FAKE_PACE', '0')
    later = go(make(tmp_path, timeout='5m'))
    assert later.decision.step == 200 and later.best_model.read_text().endswith('200')


def test_more_trials_later(tmp_path):
    first = go(make(tmp_path, trials=3))
    before = timeless(first.folder)
    second = go(make(tmp_path, trials=7))
    assert timeless(first.folder)[:len(before)] == before and len(second.rows) == 7
    assert json.loads((first.folder / 'study.json').read_text())['cohorts'] == [3, 4]
    assert len(go(make(tmp_path, trials=7, max_trials=2)).rows) == 7  # begun trials are not forgotten


def test_max_trials_limits(tmp_path):
    assert len(go(make(tmp_path, trials=30, max_trials=3)).rows) == 3


def test_one_tuner_to_a_study_and_one_corpus(tmp_path):
    settings = make(tmp_path, trials=2)
    process = drive(settings, tmp_path, FAKE_PACE='0.05')
    wait_for(lambda: (settings.folder / 't000').exists())
    with pytest.raises(UserError, match='Another process is tuning'): go(settings)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    with pytest.raises(UserError, match='has changed since'): go(settings, digest='other')
    with pytest.raises(UserError, match='begun with another seed'): go(make(tmp_path, trials=2, seed=1))


def test_stopping_a_deaf_trainer(tmp_path):
    job = TrainerJob('t000', tmp_path / 't000' / 'g001', 'c', 'small', until=10_000, environment=dict(FAKE_DEAF='1', FAKE_PACE='0.01'))
    process = TrainerProcess(job, FAKE)
    wait_for(lambda: read_status(job.run_dir).get('state') == 'running')
    assert stop_trainers([process], (0.3, 0.3, 5.0)) == ['t000'] and not process.alive()
    assert ending_of(job.run_dir, 10_000, process.exit_code).reason == 'it was killed by SIGKILL'


def test_in_a_thread_and_without_signals(tmp_path):
    "A notebook may run a study outside the main thread"
    import threading
    out = []
    worker = threading.Thread(target=lambda: out.append(go(make(tmp_path, trials=2))))
    worker.start()
    worker.join(60)
    assert out and out[0].winner


def test_mlflow_holds_the_tree_and_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = make(tmp_path, trials=3, tracking=dict(uri=f'sqlite:///{tmp_path}/mlflow.db'))
    view = Silent()
    result = go(settings, view)
    go(settings)  # a second start adds nothing
    from mlflow.tracking import MlflowClient
    client = MlflowClient(f'sqlite:///{tmp_path}/mlflow.db')
    experiment = client.get_experiment_by_name('tacotron2_autotuning').experiment_id
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    trials = ('t000', 't001', 't002')
    assert set(runs) == {'s', *trials, *(f'{n}/g001' for n in trials)} and runs['s'].info.status == 'FINISHED'
    above = lambda name: runs[name].data.tags['mlflow.parentRunId']
    assert all(above(n) == runs['s'].info.run_id and above(f'{n}/g001') == runs[n].info.run_id for n in trials)
    assert all(runs[f'{n}/g001'].info.status == runs[n].info.status for n in trials)
    history = client.get_metric_history(runs[result.winner].info.run_id, 'score')
    assert [m.step for m in sorted(history, key=lambda m: m.step)] == list(range(20, 201, 20))
    versions = client.search_model_versions("name = 'tts_tuner'")
    assert len(versions) == 1 and sorted(client.get_registered_model('tts_tuner').aliases) == ['candidate', 'champion', 'staging']
    place = Path(client.get_model_version_download_uri('tts_tuner', versions[0].version).removeprefix('file://'))
    assert (place / 'best_model.pt').read_bytes() == result.best_model.read_bytes()
    assert any(d.subject == 'champion' and d.kind == 'promote' for d in timeless(settings.folder))


def test_engine_survives_torn_journal_and_warns_of_nothing(tmp_path):
    settings = RunSettings(trials=9)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        engine = open_engine(settings, tmp_path)
        for n in range(1, 10):
            engine.ask(n)
            engine.report(n - 1, 40, 0.1 * n)
            engine.report(n - 1, 40, 0.9)  # said twice it counts once
            engine.tell(n - 1, 'complete' if n % 2 else 'pruned', 0.1 * n)
            engine.tell(n - 1, 'fail')
        names = [t.overrides for t in engine.trials()]
        with open(tmp_path / 'study.journal', 'ab') as f: f.write(b'{"op_code": 4, "worker')
        again = open_engine(settings, tmp_path)
        assert (tmp_path / 'study.journal').read_bytes().endswith(b'}\n')
        assert [t.overrides for t in again.trials()] == names and again.trials()[2].reports == {40: pytest.approx(0.3)}
        assert again.importance()


def test_no_heavy_library_before_it_is_needed():
    code = ("import sys, tts_tuner.tuner.loop, tts_tuner.tuner.registry; "
            "print([m for m in ('optuna', 'mlflow', 'matplotlib', 'librosa', 'torch') if m in sys.modules])")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert 'optuna' not in out and 'mlflow' not in out and 'matplotlib' not in out and 'librosa' not in out


def test_study_stopped_is_an_ending_with_a_sentence(): assert issubclass(StudyStopped, TTSTunerError) and StudyStopped.exit_code == 130


def test_a_score_above_one_by_a_rounding_does_not_end_a_study():
    from tts_tuner.config.settings import EarlyStopping
    from tts_tuner.tuner.early_stop import end_verdict
    seen = [(10 * k, dict(score=1 + 1e-12, val_loss=1 / k)) for k in range(1, 12)]
    assert not end_verdict(seen, 1000, EarlyStopping()).stop


def test_a_trainer_gets_no_variable_that_the_settings_refer_to(tmp_path, monkeypatch):
    "Tokens under names of one's own do not reach it"
    for name in ('TG_WORD', 'MINE'): monkeypatch.setenv(name, 'canary-canary-canary')
    program = tmp_path / 'trainer.py'
    program.write_text("import os, pathlib, runpy, sys\npathlib.Path(sys.argv[sys.argv.index('--run-dir') + 1], 'seen').write_text(' '.join(os.environ))\n"
                       f"runpy.run_path({FAKE[1]!r}, run_name='__main__')")
    settings = make(tmp_path, trials=1, monitoring=dict(alerts=dict(telegram=dict(bot_token='${TG_WORD}'))))
    go(settings, trainer=(sys.executable, str(program)))
    seen = (settings.folder / 't000' / 'g001' / 'seen').read_text().split()
    assert 'MINE' in seen and 'TG_WORD' not in seen
