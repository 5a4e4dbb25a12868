"Generations of one training: decided, rolled back, killed and gone on with; a checkpoint of another run taken over"
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_tiny_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.config.contracts import Evidence, read_decisions
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.hparams import create_hparams, hparam_fields, parse_overrides
from tts_tuner.config.settings import load_settings, save_settings
from tts_tuner.quality.gates import GateLimits
from tts_tuner.training.takeover import fresh_settings, running_settings, takeover
from tts_tuner.tuner.book import StudyStopped
from tts_tuner.tuner.controller import ControllerRules, Cycle, EarlyStopController, controller_rules, waited
from tts_tuner.tuner.engines import open_engine
from tts_tuner.tuner.generation_loop import run_generations
from tts_tuner.tuner.generations import (
    Generation, GenerationRules, Seen, against_parent, choose_final, closing_rate, decide, goal, next_point)
from tts_tuner.tuner.ledger import generation_rules, read_generations, replay_generations, searched
from tts_tuner.tuner.loop import replay, run_study
from tts_tuner.tuner.param_scheduler import next_run
from tts_tuner.tuner.session import Data
from tts_tuner.tuner.tracker import Tracker
from tts_tuner.tuner.trainer_wrapper import find_trainer
from tts_tuner.tuner.trials import PlainView, read_status

FAKE = (sys.executable, str(Path(__file__).with_name('fake_trainer.py')))
DRIVER = '''
import sys
from tts_tuner.config.settings import load_settings
from tts_tuner.tuner.generation_loop import run_generations
from tts_tuner.tuner.session import Data
settings = load_settings(sys.argv[1])
try: print(run_generations(settings, trainer=sys.argv[2:], prepare=lambda s, say: Data('corpus', 'abc'), poll=0.01).winner)
except Exception as e: print(e, file=sys.stderr); sys.exit(getattr(e, 'exit_code', 1))
'''
shares = st.floats(0, 1)


class Silent(PlainView):
    def __init__(self): self.said, self.rows = [], []
    def say(self, text): self.said.append(text)
    def update(self, rows): self.rows = list(rows)


@pytest.fixture(autouse=True)
def pace(monkeypatch): monkeypatch.setenv('FAKE_PACE', '0.003')


def make(tmp_path, **flags):
    given = {'study': 's', 'runs': str(tmp_path / 'runs'), 'hparams': 'max_steps=200,eval_every=20,checkpoint_every=20,device=cpu', 'mode': 'generations',
             'tracking': dict(enabled=False), 'optimization.generations.count': 4} | flags
    return load_settings(**given)


def go(settings, view=None): return run_generations(settings, view or Silent(), trainer=FAKE, prepare=lambda s, say: Data('corpus', 'abc'), poll=0.01)


def timeless(folder): return [replace(d, time=None) for d in read_decisions(folder / 'decisions.jsonl')]


def ends(folder): return [(d.kind, d.subject) for d in timeless(folder) if d.kind in ('restart', 'rollback', 'stop') and d.evidence[0].source != 'process']


def whole(folder):
    "Names follow each other, every generation trained each of its steps once, and each but the last has one end"
    found = read_generations(folder)
    assert [g.name for g in found] == [f'g{i:03}' for i in range(1, len(found) + 1)]
    for g in found:
        log = folder / 't000' / g.name / 'metrics.jsonl'
        steps = [json.loads(line)['step'] for line in log.read_text().splitlines()] if log.exists() else []
        assert steps == list(range(g.begun + 1, g.begun + 1 + len(steps))), (g.name, g.begun, steps[:3])
    assert [name for _, name in ends(folder) if '/' in name] == [f't000/{g.name}' for g in found][:len(ends(folder))]
    numbers = [g.number for g in found if g.number is not None]
    assert numbers == list(range(len(numbers)))
    return found


def drive(settings, tmp_path, **env):
    config = tmp_path / 'driver.yaml'
    save_settings(config, settings)
    return subprocess.Popen([sys.executable, '-c', DRIVER, str(config), *FAKE], env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


def at(step, score, d=0.97, **more): return step, dict(score=score, alignment_score=d, **more)


@settings(deadline=None)
@given(shares, shares, shares, shares)
def test_the_goal_rises_with_each_of_its_parts(s, t, d, e):
    low, high, flat, steep = min(s, t), max(s, t), min(d, e), max(d, e)
    assert 0 <= goal(dict(score=low, alignment_score=flat)) <= goal(dict(score=high, alignment_score=flat)) + 1e-12 <= 1 + 1e-9
    assert goal(dict(score=low, alignment_score=flat)) <= goal(dict(score=low, alignment_score=steep)) + 1e-12
    if high - low > 1e-9: assert goal(dict(score=low, alignment_score=d)) < goal(dict(score=high, alignment_score=d))


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.0, None])
def test_a_number_that_is_none_counts_as_nothing(value):
    metrics = {} if value is None else dict(score=value, alignment_score=value)
    assert goal(metrics) == 0 and choose_final('t000', [('g001', 10, metrics), ('g002', 20, dict(score=0.1, alignment_score=0.5))]).subject == 't000/g002'


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(1, 500))
def test_points_leave_half_a_stretch(begun, steps):
    point = next_point(begun, GenerationRules(steps))
    assert point % steps == 0 and steps / 2 <= point - begun < 1.5 * steps


def test_the_closing_rate_is_the_same_early_and_late():
    curve = lambda s: 1 - 2.718281828 ** (-s / 300)
    assert abs(closing_rate(curve(0), curve(100), 100) - closing_rate(curve(600), curve(800), 200)) < 1e-6
    assert closing_rate(0.5, 0.4, 100) < 0 == closing_rate(0.5, 0.5, 100) and closing_rate(0.1, 0.2, 0) == 0


def test_compared_at_equal_steps_where_the_parent_was_there():
    child = Generation('g002', 'g001', 100, {}, 'proposal', 1)
    behind = against_parent(child, [at(200, 0.3)], [at(100, 0.1)], 200)
    beside = against_parent(child, [at(200, 0.3)], [at(100, 0.1), at(200, 0.4), at(300, 0.6)], 200)
    assert (behind.verdict, behind.numbers['parents_step']) == ('at the nearest step', 100) and behind.numbers['gain'] > 0
    assert (beside.verdict, beside.numbers['parents_step']) == ('at equal steps', 200) and beside.numbers['gain'] < 0
    rules, seen = GenerationRules(100), lambda parents: Seen(child, [at(200, 0.3)], parents)
    assert decide('t000', seen([at(100, 0.1)]), 0.1, 200, 2, rules).kind == 'continue'
    back = decide('t000', seen([at(100, 0.1), at(200, 0.4)]), 0.1, 200, 2, rules)
    assert back.kind == 'rollback' and 'at the same step' in back.reason
    assert decide('t000', seen([at(100, 0.1), at(200, 0.315)]), 9.0, 200, 2, rules).kind == 'restart', 'within the margin'


def test_every_setting_is_listed_and_every_string_reads_back():
    assert set(running_settings()) | set(fresh_settings()) == set(hparam_fields()) and not set(running_settings()) & set(fresh_settings())
    small = create_hparams('small')
    assert takeover(small, replace(small, n_symbols=99)).possible, 'symbols are compared one by one elsewhere'
    run = next_run('small', dict(learning_rate=0.01), dict(learning_rate=1 / 3, grad_clip_thresh=0.7), 300, 'why')
    assert parse_overrides(run.hparams) == dict(learning_rate=1 / 3, grad_clip_thresh=0.7)
    assert {c.parameter: (c.old, c.new, c.when) for c in run.changes} == dict(learning_rate=(0.01, 1 / 3, 301), grad_clip_thresh=(1.0, 0.7, 301))
    assert parse_overrides(run.changes[0].undo) == dict(learning_rate=0.01, grad_clip_thresh=1.0)
    with pytest.raises(UserError, match='learning_rat'): next_run('small', {}, dict(learning_rat=1), 0, '')


def test_patience_of_the_tuner():
    rules = ControllerRules()
    assert (rules.patience, rules.min_delta) == (5, 0.005)
    for scores, over_at in (([0.1, 0.2] + [0.2] * 5, 7), ([0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.206], None), ([0.3] * 6, None), ([0.3] * 7, 7)):
        controller, found = EarlyStopController(rules), None
        for i, s in enumerate(scores, 1):
            said = controller.end(Cycle(f't000/g{i:03}', 100 * i, s))
            if any(d.kind == 'stop' for d in said): found = found or i
        assert found == over_at, scores
    assert waited([0.1, 0.104, 0.108, 0.112]) == (0, 0.112) or waited([0.1, 0.104, 0.108, 0.112])[1] >= 0.108


def test_detectors_and_gates_have_their_say():
    loud = Evidence('diverging', 'diverging', 10, 1.0, 'it explodes')
    quiet = replace(loud, verdict='steady')
    whole = dict(val_loss=1.0, alignment_score=0.9, gate_accuracy=0.9)
    look = lambda rules=None, **c: EarlyStopController(rules or ControllerRules()).look(Cycle('t000/g002', 10, 0.1, **c)).kind
    assert look(evidence=(loud,)) == 'rollback' and look(evidence=(quiet,)) == 'continue' and look(ControllerRules(explodes=False), evidence=(loud,)) == 'continue'
    for broken in (dict(val_loss=31.0), dict(alignment_score=0.3), dict(gate_accuracy=0.5)):
        assert look(metrics=whole | broken, before=whole) == 'rollback' and look(metrics=whole | broken, before=whole | broken) == 'continue'
    assert look(ControllerRules(limits=GateLimits(sanity_loss=40.0)), metrics=whole | dict(val_loss=31.0), before=whole) == 'continue'
    heard = whole | dict(pesq=2.0, pesq_copy_synthesis=3.0)
    controller = EarlyStopController()
    assert [d.evidence[0].source for d in controller.end(Cycle('t000/g003', 10, 0.1, heard))] == ['release gate'] and not controller.end(Cycle('t000/g004', 20, 0.2, heard))


def test_the_limits_come_from_the_settings(tmp_path):
    rules = controller_rules(make(tmp_path, early_stopping=dict(tuner_patience=3, tuner_min_delta=0.1, sanity_gates=dict(max_loss=9.0),
                                                               quality_gates=dict(min_alignment_score=0.7))))
    assert (rules.patience, rules.min_delta, rules.limits.sanity_loss, rules.limits.release_alignment) == (3, 0.1, 9.0, 0.7)


def test_five_generations_and_a_voice(tmp_path):
    view = Silent()
    result = go(settings := make(tmp_path, **{'optimization.generations.count': 8}), view)
    found = whole(settings.folder)
    assert len(found) >= 5 and result.winner == f't000/{found[-1].name}' and result.best_model.read_text().endswith('200')
    assert replay_generations(settings.folder) == timeless(settings.folder)
    assert [r.trial for r in result.rows] == [f't000/{g.name}' for g in found] and [r.state for r in result.rows].count('winner') == 1
    narrowed, _ = searched(settings)
    told = {t.number: t for t in open_engine(narrowed).trials()}
    own = [g for g in found if g.number is not None]
    assert all(told[g.number].state == 'complete' and told[g.number].overrides == g.overrides for g in own) and len(told) == len(own)
    for g in found[1:]:
        assert takeover(create_hparams('small', found[0].overrides), create_hparams('small', g.overrides)).possible
        assert (settings.folder / 't000' / g.name / 'start.pt').exists()
    before = timeless(settings.folder)
    assert go(settings).winner == result.winner and timeless(settings.folder) == before, 'a finished study is not trained again'
    assert any('starts from step' in line for line in view.said) and any(line.startswith('attention stays') for line in view.said)


def test_a_child_that_does_harm_goes_back_to_its_parent(tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_HARM', 't000/g002')
    go(settings := make(tmp_path))
    found = {g.name: g for g in whole(settings.folder)}
    assert ('rollback', 't000/g002') in ends(settings.folder) and found['g003'].role == 'return'
    assert (found['g003'].parent, found['g003'].begun, found['g003'].overrides) == ('g001', found['g002'].begun, found['g001'].overrides)
    assert found['g003'].number is None and found['g004'].number == 2 and replay_generations(settings.folder) == timeless(settings.folder)
    narrowed, _ = searched(settings)
    assert open_engine(narrowed).trials()[1].value < 0, 'the engine learns that it did harm'


def test_a_child_that_is_slower_keeps_its_weights_and_gives_the_settings_back(tmp_path):
    slower = dict(learning_rate=dict(type='loguniform', low=1e-4, high=1e-2))
    go(settings := make(tmp_path, search_space=slower))
    found = {g.name: g for g in whole(settings.folder)}
    [back] = [d for d in timeless(settings.folder) if d.subject == 't000/g002' and d.kind == 'restart']
    assert back.evidence[0].verdict == 'slower' and back.evidence[0].numbers['rate'] < back.evidence[0].numbers['parents_rate']
    assert found['g003'].role == 'return' and found['g003'].parent == 'g002' and found['g003'].begun > found['g002'].begun
    assert found['g003'].overrides == found['g001'].overrides != found['g002'].overrides
    assert replay_generations(settings.folder) == timeless(settings.folder)


@pytest.mark.parametrize('fate, source', [('NAN=t000/g002@105', 'trainer'), ('EXPLODE=t000/g002@0', 'divergence')])
def test_what_cannot_go_on_is_taken_back(tmp_path, monkeypatch, fate, source):
    monkeypatch.setenv(*f'FAKE_{fate}'.split('='))
    settings = make(tmp_path, hparams='max_steps=240,eval_every=20,checkpoint_every=20,device=cpu', **{'optimization.generations.steps': 80})
    result = go(settings)
    found = {g.name: g for g in whole(settings.folder)}
    [back] = [d for d in timeless(settings.folder) if d.kind == 'rollback']
    assert (back.subject, back.evidence[0].source) == ('t000/g002', source) and found['g003'].role == 'return' and result.winner != 't000/g002'
    narrowed, _ = searched(settings)
    assert open_engine(narrowed).trials()[1].state == 'fail' and replay_generations(settings.folder) == timeless(settings.folder)


def test_nothing_to_go_back_to(tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_NAN', 't000@15')
    with pytest.raises(TTSTunerError, match='no winner'): go(make(tmp_path))
    refuses = (sys.executable, '-c', 'import sys; print("There is no learning_rat.", file=sys.stderr); sys.exit(2)')
    with pytest.raises(TTSTunerError, match='could not be trained: There is no learning_rat'):
        run_generations(make(tmp_path, study='other'), Silent(), trainer=refuses, prepare=lambda s, say: Data('corpus', 'abc'), poll=0.01)
    assert not timeless(tmp_path / 'runs' / 'other')


def test_from_the_last_checkpoint_nothing_is_trained_twice(tmp_path):
    go(settings := make(tmp_path, **{'optimization.generations.start': 'last'}))
    found = whole(settings.folder)
    for parent, child in zip(found, found[1:]): assert child.parent == parent.name and child.begun == read_status(settings.folder / 't000' / parent.name)['step']
    assert replay_generations(settings.folder) == timeless(settings.folder)


def test_cycles_without_gain_end_the_study(tmp_path):
    go(settings := make(tmp_path, early_stopping=dict(tuner_patience=1, tuner_min_delta=0.9)))
    assert ends(settings.folder)[-1] == ('stop', 'study') and len(whole(settings.folder)) == 3 and (settings.folder / 'best_model.pt').exists()
    assert replay_generations(settings.folder) == timeless(settings.folder)
    before = timeless(settings.folder)
    go(settings)
    assert timeless(settings.folder) == before


def test_cohorts_without_gain_end_a_study_of_trials(tmp_path):
    settings = make(tmp_path, mode='trials', trials=10, workers=2, rungs=dict(steps=[40, 80], keep=[1, 1], cohort=2), failure_example=False,
                    early_stopping=dict(tuner_patience=1, tuner_min_delta=0.9))
    result = run_study(settings, Silent(), trainer=FAKE, prepare=lambda s, say: Data('corpus', 'abc'), poll=0.01)
    assert {p.name for p in settings.folder.glob('t*')} == {f't{i:03}' for i in range(6)}, 'three cohorts of five'
    [stop] = [d for d in timeless(settings.folder) if d.subject == 'study']
    assert 'no gain of 0.9' in stop.reason and result.decision.step == 200 and replay(settings.folder) == timeless(settings.folder)


def test_killed_at_random_moments(tmp_path):
    "Tuner and trainer killed again and again: no generation is lost or trained twice, and the record decides the same again"
    settings, rng = make(tmp_path), random.Random(5)
    for _ in range(2):
        process = drive(settings, tmp_path, FAKE_PACE='0.01')
        time.sleep(1.0 + rng.random())
        process.kill()
        process.communicate()
        for folder in sorted(settings.folder.glob('t*/g*')):
            if rng.random() < 0.7 and (found := find_trainer(folder)): found.kill()
    process = drive(settings, tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    found = whole(settings.folder)
    assert len(found) >= 3 and out.split()[-1].startswith('t000/g') and replay_generations(settings.folder) == timeless(settings.folder)
    assert sum(d.kind == 'final' for d in timeless(settings.folder)) == 1


def test_a_trainer_that_was_left_alone_goes_on_and_that_is_on_record(tmp_path):
    settings = make(tmp_path, **{'optimization.generations.steps': 40})
    process = drive(settings, tmp_path, FAKE_PACE='0.008')
    wait_for(lambda: read_status(settings.folder / 't000' / 'g001').get('step', 0) >= 20)
    process.kill()
    process.communicate()
    wait_for(lambda: read_status(settings.folder / 't000' / 'g001').get('step', 0) >= 120)
    go(settings)
    missed = [d for d in timeless(settings.folder) if d.evidence[0].verdict == 'missed']
    assert missed and missed[0].subject == 't000/g001' and missed[0].step == 40
    assert not any(d.kind == 'restart' and d.evidence[0].source == 'process' for d in timeless(settings.folder)), 'it was adopted'
    whole(settings.folder)
    assert replay_generations(settings.folder) == timeless(settings.folder)


def test_stopped_and_gone_on_with(tmp_path):
    settings = make(tmp_path)
    process = drive(settings, tmp_path, FAKE_PACE='0.01')
    wait_for(lambda: (settings.folder / 't000' / 'g002' / 'metrics.jsonl').exists())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == StudyStopped.exit_code and 'goes on from here' in err and find_trainer(settings.folder / 't000' / 'g002') is None
    assert go(settings).winner
    whole(settings.folder)


def test_time_runs_out_and_more_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_PACE', '0.02')
    first = go(settings := make(tmp_path, timeout='1s'))
    assert first.best_model.exists() and any(d.subject == 'study' and 'over' in d.reason for d in timeless(settings.folder)) and first.decision.step < 200
    monkeypatch.setenv('FAKE_PACE', '0.001')
    later = go(make(tmp_path, timeout='1h'))
    assert later.decision.step == 200
    whole(settings.folder)


@pytest.mark.parametrize('flags, words', [
    (dict(hparams='max_steps=150,device=cpu'), 'no room for two generations'),
    (dict(search_space=dict(batch_size=dict(type='choice', choices=[4, 8]))), 'a step would be|Nothing that is searched'),
])
def test_what_cannot_be_tuned_by_generations_is_refused_before_anything_begins(tmp_path, flags, words):
    settings = make(tmp_path, **flags)
    with pytest.raises(UserError, match=words): go(settings)
    assert not (settings.folder / 'config.yaml').exists()


def test_points_fall_on_validations_that_have_a_checkpoint(tmp_path):
    placed = lambda **h: generation_rules(make(tmp_path, **{'optimization.generations.count': 8}, hparams='device=cpu,' + ','.join(f'{k}={v}' for k, v in h.items()))).steps
    assert placed(max_steps=900, eval_every=100, checkpoint_every=100) == 100 and placed(max_steps=1000, eval_every=100, checkpoint_every=100) == 100
    assert placed(max_steps=900, eval_every=40, checkpoint_every=60) == 120


def test_mlflow_shows_study_training_and_generations(tmp_path):
    settings = make(tmp_path, tracking=dict(uri=f'sqlite:///{tmp_path}/mlflow.db'))
    go(settings)
    from mlflow.tracking import MlflowClient
    client = MlflowClient(settings.tracking.uri)
    experiment = client.get_experiment_by_name(settings.tracking.experiment).experiment_id
    runs = {r.info.run_name: r for r in client.search_runs([experiment])}
    found = whole(settings.folder)
    assert set(runs) == {'s', 't000', *(f't000/{g.name}' for g in found)}
    above = lambda name: runs[name].data.tags['mlflow.parentRunId']
    assert above('t000') == runs['s'].info.run_id and all(above(f't000/{g.name}') == runs['t000'].info.run_id for g in found)
    assert all(r.info.status == 'FINISHED' for r in runs.values()) and runs[f't000/{found[-1].name}'].data.metrics['score'] > 0.5
    assert runs['t000/g002'].data.params['parent'] == 'g001' and client.get_metric_history(runs['t000'].info.run_id, 'goal')[0].step == 20
    notes = settings.folder / 'mlflow.json'
    kept = json.loads(notes.read_text())
    notes.write_text(json.dumps({k: v for k, v in kept.items() if k != 't000/g002'}))  # as if killed between the run and the note of it
    tracker = Tracker(settings.tracking, settings.folder)
    tracker.start('s', {}, {})
    tracker.generation('t000/g002', {}, 'proposal')
    tracker.close('FINISHED')
    assert json.loads(notes.read_text())['t000/g002']['id'] == kept['t000/g002']['id'] and len(client.search_runs([experiment])) == len(runs)


TINY = dict(sample_rate=8000, n_fft=256, hop_length=128, win_length=256, n_mels=20, mel_fmax=None, frontend='characters', symbols_embedding_dim=16,
            encoder_embedding_dim=16, attention_rnn_dim=32, attention_dim=16, decoder_rnn_dim=32, prenet_dim=16, postnet_embedding_dim=16, batch_size=4,
            max_steps=8, eval_every=4, checkpoint_every=4, n_validation=3, n_free_running=2, lr_warmup_steps=3, max_decoder_steps=40, device='cpu')


def test_a_checkpoint_of_another_run_is_gone_on_from_bit_for_bit(tmp_path):
    import torch

    from tts_tuner.training.checkpoint import load_checkpoint
    from tts_tuner.training.sinks import read_metrics
    from tts_tuner.training.trainer import run_training
    corpus, said = make_tiny_corpus(tmp_path / 'corpus'), []
    train = lambda name, hp, **more: run_training(corpus, tmp_path / name, hp, cache_dir=tmp_path / 'cache', tensorboard=False, n_samples=0, console=said.append, **more)
    steps_of = lambda name: [m['step'] for m in read_metrics(tmp_path / name / 'metrics.jsonl')]
    hp = create_hparams('small', TINY)
    train('whole', hp)
    middle = tmp_path / 'whole' / 'checkpoints' / 'step_00000004.pt'
    train('child', hp, checkpoint_path=middle)
    a, b = (load_checkpoint(tmp_path / name / 'checkpoints' / 'last.pt') for name in ('whole', 'child'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model']) and steps_of('child') == [5, 6, 7, 8]
    with pytest.raises(UserError, match='holds a run already'): train('child', hp, checkpoint_path=middle)
    train('paused', replace(hp, learning_rate=1e-3), checkpoint_path=middle, until=6)
    assert train('paused', replace(hp, learning_rate=1e-3), checkpoint_path=middle, resume=True)['step'] == 8 and steps_of('paused') == [5, 6, 7, 8], 'its own comes first'
    assert [json.loads(line)['parameter'] for line in (tmp_path / 'paused' / 'changes.jsonl').read_text().splitlines()] == ['learning_rate']
    for change in (dict(batch_size=3), dict(prenet_dim=8)):
        said.clear()
        train(f'fresh_{next(iter(change))}', replace(hp, max_steps=1, **change), checkpoint_path=middle)
        assert any('starts from the beginning' in line and next(iter(change)) in line for line in said) and steps_of(f'fresh_{next(iter(change))}') == [1]
    with pytest.raises(UserError, match='There is no checkpoint'): train('none', hp, checkpoint_path=tmp_path / 'none.pt')
