"Engines: every sampler keeps the promises of the suite; stores that are locked, full, damaged or shared; kills in the middle"
import contextlib
import fcntl
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import optuna
import pytest
from helpers import make_tiny_corpus, tiny_hparams
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tts_tuner.config.dimension import Dimension
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.settings import RunSettings, save_settings
from tts_tuner.tuner import engine_suite as suite
from tts_tuner.tuner import engines
from tts_tuner.tuner.engine import plan_of
from tts_tuner.tuner.engines import make_engine, open_engine
from tts_tuner.tuner.opt_engine import OptEngine
from tts_tuner.tuner.study_store import Journal, Patience, open_database

optuna.logging.set_verbosity(optuna.logging.ERROR)
LEARNS = ('check_better_than_chance',)


def by(sampler, database=False, **more):
    "How the suite opens an engine with this sampler"
    def make(plan, folder):
        folder.mkdir(parents=True, exist_ok=True)
        return OptEngine(replace(plan, sampler=sampler, **more), f'sqlite:///{folder}/study.db' if database else folder / 'study.journal')
    return make


@pytest.mark.parametrize('sampler', ['tpe', 'cma_es'])
def test_samplers_that_learn_keep_every_promise(tmp_path, sampler):
    assert len(suite.conform(by(sampler), tmp_path)) == len(suite.CHECKS)


@pytest.mark.parametrize('sampler', ['random', 'grid', 'bohb'])
def test_samplers_that_do_not_learn_or_are_the_same(tmp_path, sampler):
    suite.conform(by(sampler, grid_points=9), tmp_path, skip=(*LEARNS, 'check_importance', 'check_workers'))


def test_gaussian_process(tmp_path):
    suite.check_reopening(by('gp'), tmp_path / 'again', trials=7)
    suite.check_limits(by('gp'), tmp_path / 'limits')
    suite.check_better_than_chance(by('gp'), tmp_path / 'learns', trials=15, seeds=(0,))


def test_database(tmp_path):
    for check in (suite.check_fixed_first, suite.check_twice_is_once, suite.check_limits, suite.check_another_space, suite.check_workers):
        check(by('random', database=True), tmp_path / check.__name__)


def test_state_of_cma_es_lives_through_kills(tmp_path):
    "More than two generations, opened again after every second trial"
    suite.check_reopening(by('cma_es'), tmp_path, trials=26)
    trials = OptEngine(suite.plan(sampler='cma_es'), tmp_path / 'whole/study.journal').storage.get_all_trials(0)
    assert max(t.system_attrs.get('cma:generation', 0) for t in trials) >= 2


def test_cma_es_killed_while_it_writes_its_state(tmp_path):
    "In a database its state takes several writes; what was cut off there is written anew"
    make, place = by('cma_es', database=True), tmp_path / 'study'
    with pytest.raises(KeyboardInterrupt):
        engine = make(suite.plan(), place)
        inner = engine.storage.set_trial_system_attr

        def dies(trial_id, key, value):
            inner(trial_id, key, value[:len(value) // 2] if key.startswith('cma:optimizer') else value)
            if key.startswith('cma:optimizer'): raise KeyboardInterrupt

        engine.storage.set_trial_system_attr = dies
        suite.drive(engine, 30)
    engine = make(suite.plan(), place)
    cut = len(engine.trials()) - 1
    assert cut >= 7 and engine.trials()[cut].params == {}
    trials = suite.drive(engine, cut + 9)
    assert all(t.state == 'complete' for t in trials) and trials[cut].params.keys() == suite.SPACE.keys()


@pytest.mark.parametrize('sampler', ['tpe', 'cma_es'])
def test_limits_are_learnt(tmp_path, sampler):
    "Deep models are better here, and too large: proposals stay where they fit, and go deep when there is no limit"
    late = {}
    for name, limits in dict(limited=dict(memory_gb=4.0), free={}).items():
        engine = OptEngine(suite.plan(sampler=sampler, limits=limits, space={k: suite.SPACE[k] for k in ('depth', 'dropout')}), tmp_path / name)
        for n in range(48):
            engine.ask(n + 1)
            depth = engine.trials()[n].params['depth']
            engine.tell(n, 'complete', depth / 8, dict(memory_gb=float(depth)))
        late[name] = sum(t.params['depth'] for t in engine.trials()[-16:]) / 16
        assert name == 'free' or max(t.value for t in engine.trials() if t.feasible) == 0.5
    assert late['limited'] < 5 and late['free'] > 6, late


def test_given_up_trials_teach_every_sampler(tmp_path):
    for sampler in ('tpe', 'cma_es', 'gp'):
        engine = OptEngine(suite.plan(sampler=sampler), tmp_path / sampler)
        engine.ask(2)
        engine.report(0, 40, 0.3)
        engine.tell(0, 'pruned')
        engine.tell(1, 'complete', 0.2)
        first, second = OptEngine(suite.plan(sampler=sampler), tmp_path / sampler).trials()
        assert (first.state, first.value, second.value) == ('pruned', 0.3, 0.2)
        assert sampler == 'tpe' or engine.study.trials[0].value == pytest.approx(-0.7)  # below every complete one


def test_cost_does_not_grow_with_the_study(tmp_path, monkeypatch):
    engine, calls = OptEngine(suite.plan(sampler='random'), tmp_path / 'study.journal'), []
    suite.drive(engine, 60)
    inner, complete = engine.storage.get_all_trials, engine.plan.complete
    engine.plan = replace(engine.plan, complete=lambda p, c: calls.append('complete') or complete(p, c))
    monkeypatch.setattr(engine.storage, 'get_all_trials', lambda *a, **k: calls.append('all') or inner(*a, **k))
    engine.ask(61)
    engine.report(60, 40, 0.5)
    engine.tell(60, 'complete', 0.5)
    assert calls.count('all') <= 3
    engine.trials()
    assert calls.count('complete') == 1, 'trials that did not change were worked out again'


@contextlib.contextmanager
def held(path, seconds):
    "Another process that holds the journal's lock"
    code = 'import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print("held", flush=True); time.sleep(float(sys.argv[2]))'
    process = subprocess.Popen([sys.executable, '-c', code, str(path), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()
    process.communicate()


def test_a_locked_journal_is_waited_for(tmp_path):
    path, said = tmp_path / 'study.journal', []
    engine = OptEngine(suite.plan(), path, patience=Patience(speak_after=0.2, say=said.append))
    engine.ask(1)
    with held(path, 1.0):
        begun = time.monotonic()
        engine.tell(0, 'complete', 0.5)
        assert time.monotonic() - begun > 0.6
    assert len(said) == 1 and 'is locked by another process; waiting for it' in said[0]
    with held(path, 30) as process:
        hasty = Patience(limit=0.3)
        with pytest.raises(TTSTunerError, match='has been locked by another process for 0 s. End that process .* nothing was lost'):
            OptEngine(suite.plan(), path, patience=hasty)
        assert [t.value for t in OptEngine(suite.plan(), path, read_only=True).trials()] == [0.5]  # looking needs no lock
        process.kill()  # and its lock ends with it
        process.wait()
        OptEngine(suite.plan(), path, patience=hasty).ask(2)


def test_a_locked_database_is_waited_for(tmp_path):
    said, url = [], f'sqlite:///{tmp_path}/study.db'
    engine = OptEngine(suite.plan(sampler='random'), url, patience=Patience(limit=60, speak_after=0.5, say=said.append))
    engine.ask(2)
    holder = sqlite3.connect(tmp_path / 'study.db', isolation_level=None, check_same_thread=False)
    holder.execute('BEGIN EXCLUSIVE')
    release = threading.Timer(1.5, lambda: holder.execute('COMMIT'))
    release.start()
    engine.tell(0, 'complete', 0.5)
    release.join()
    assert engine.trials()[0].value == 0.5 and len(said) == 1 and 'locked by another process' in said[0]
    holder.execute('BEGIN EXCLUSIVE')
    with pytest.raises(TTSTunerError, match='has been locked by another process'): OptEngine(suite.plan(sampler='random'), url, patience=Patience(limit=0.1)).ask(3)
    holder.execute('COMMIT')
    assert OptEngine(suite.plan(sampler='random'), url).trials()[1].state == 'running'


def test_full_disk_loses_nothing(tmp_path):
    path = tmp_path / 'study.journal'
    engine = OptEngine(suite.plan(), path)
    suite.drive(engine, 3)
    whole, before, limits = suite.drive(OptEngine(suite.plan(), tmp_path / 'other'), 5), path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 300, limits[1]))
    try:
        with pytest.raises(TTSTunerError, match='No space left to write study.journal .* nothing was lost'): engine.ask(4)
        with pytest.raises(TTSTunerError, match='No space left'): engine.ask(4)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and len(engine.trials()) == 3
    assert suite.drive(engine, 5) == whole


def test_a_full_database_is_said(tmp_path):
    engine = OptEngine(suite.plan(sampler='random'), f'sqlite:///{tmp_path}/study.db')
    engine.ask(1)
    with engine.storage.inner._backend.engine.connect() as c: c.exec_driver_sql('PRAGMA max_page_count=1')
    with pytest.raises(TTSTunerError, match='No space left to write The study.s database'):
        for n in range(2, 400): engine.ask(n)


WORKER = '''
import sys
from pathlib import Path
from tts_tuner.tuner import engine_suite as suite
from tts_tuner.tuner.opt_engine import OptEngine
engine = OptEngine(suite.plan(), Path(sys.argv[1]))
print("ready", flush=True)
for n in range(10**6):
    engine.ask(n + 1)
    trial = engine.trials()[n]
    if trial.finished: continue
    engine.report(n, 40, 0.25)
    engine.tell(n, 'complete', suite.outcome(trial.params))
    print(n, flush=True)
'''


def test_killed_again_and_again(tmp_path):
    "Whatever was told before a kill is there after it, and the study is the one that nobody disturbed"
    path, told = tmp_path / 'study.journal', set()
    for pause in (0.05, 0.11, 0.17):
        process = subprocess.Popen([sys.executable, '-c', WORKER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == 'ready\n'
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        told |= {int(line) for line in process.communicate()[0].split() if line.isdigit()}
    trials = OptEngine(suite.plan(), path).trials()
    done = {t.number for t in trials if t.state == 'complete'}
    assert len(told) > 5 and told <= done and len(trials) - len(done) <= 1
    undisturbed = OptEngine(suite.plan(), tmp_path / 'other')
    for n in range(len(trials)):
        undisturbed.ask(n + 1)
        if n in done:
            undisturbed.report(n, 40, 0.25)
            undisturbed.tell(n, 'complete', suite.outcome(undisturbed.trials()[n].params))
    assert [t.params for t in undisturbed.trials()] == [t.params for t in trials]


def test_a_study_of_the_librarys_own_journal_goes_on(tmp_path):
    path = tmp_path / 'study.journal'
    old = optuna.create_study(study_name='suite', storage=JournalStorage(JournalFileBackend(str(path))), direction='maximize')
    from tts_tuner.tuner.space import to_distribution
    trial = old.ask({k: to_distribution(d) for k, d in suite.SPACE.items()})
    old.tell(trial, 0.4)
    (tmp_path / 'study.journal.lock').symlink_to(path)  # left behind by its lock
    engine = OptEngine(suite.plan(), path)
    engine.ask(2)
    assert engine.trials()[0].value == 0.4
    other = tmp_path / 'other'
    old = optuna.create_study(study_name='suite', storage=JournalStorage(JournalFileBackend(str(other))), direction='maximize')
    old.ask({'depth': to_distribution(Dimension(type='int', low=1, high=80))})
    with pytest.raises(UserError, match='another search space .depth was'): OptEngine(suite.plan(), other)


def test_damage_and_reading_only(tmp_path):
    path = tmp_path / 'study.journal'
    suite.drive(OptEngine(suite.plan(), path), 3)
    raw = path.read_bytes()
    path.write_bytes(raw + b'{"op_code": 4, "wor')  # being written by somebody else
    reader = OptEngine(suite.plan(), path, read_only=True)
    assert len(reader.trials()) == 3 and path.read_bytes().endswith(b'"wor')
    with pytest.raises(TTSTunerError, match='reading only'): reader.ask(4)
    with pytest.raises(UserError, match='no study "other"'): OptEngine(suite.plan(study='other'), path, read_only=True)
    with pytest.raises(UserError, match='There is no study'): OptEngine(suite.plan(), tmp_path / 'none', read_only=True)
    lines = raw.splitlines(keepends=True)
    for bad in (lines[0] + b'not json\n' + lines[1], lines[0] + b'{"op_code": 99, "worker_id": "x"}\n', b'[]\n'):
        path.write_bytes(bad)
        with pytest.raises(TTSTunerError, match='is damaged .* move it away'): OptEngine(suite.plan(), path)
        assert path.read_bytes() == bad


def test_addresses_and_engines(tmp_path, monkeypatch):
    for url in ('postgresql+nodriver://ann:hunter2@127.0.0.1:1/x', 'nosuch://ann:hunter2@host/db', 'sqlite//x'):
        with pytest.raises(UserError, match='storage: ') as e: open_database(url)
        assert 'hunter2' not in str(e.value)
    with pytest.raises(TTSTunerError, match='cannot be used') as e: open_database(f'sqlite:///{tmp_path}/no/such/folder/x.db')
    with pytest.raises(UserError, match='there is no engine "vizier"'): make_engine('vizier', suite.plan(), tmp_path / 'x')
    monkeypatch.setitem(engines.ENGINES, 'hyperopt', 'no.such.module:Engine')
    with pytest.raises(UserError, match='hyperopt is not installed here'): make_engine('hyperopt', suite.plan(), tmp_path / 'x')
    monkeypatch.setattr('tts_tuner.tuner.samplers.find_spec', lambda name: None)
    with pytest.raises(UserError, match='cma_es needs the package cmaes'): OptEngine(suite.plan(sampler='cma_es'), tmp_path / 'x')


def test_a_grid_ends(tmp_path):
    settings = RunSettings(search_space=dict(attention=dict(type='choice', choices=['forward', 'location'])), sampler='grid', recipe_first=False,
                           failure_example=False)
    engine = open_engine(settings, tmp_path)
    assert engine.limit == 2 and 'The grid has 2 points.' in engine.notes
    assert {engine.claim().params['attention'], engine.claim().params['attention']} == {'forward', 'location'}
    with pytest.raises(UserError, match='has no more points'): engine.claim()
    assert len(engine.trials()) == 2


def test_earlier_studies(tmp_path):
    old = RunSettings(study='old', runs=str(tmp_path), hparams=dict(batch_size=4))
    with pytest.raises(UserError, match='there is no study in'): open_engine(RunSettings(study='x', runs=str(tmp_path), optimization=dict(warm_start_from=[str(old.folder)])))
    engine = open_engine(old)
    engine.ask(5)
    for t in engine.trials(): engine.tell(t.number, 'complete', 0.1 * t.number)
    save_settings(old.folder / 'config.yaml', old)
    before = (old.folder / 'study.journal').read_bytes()
    wide = dict(learning_rate=dict(type='loguniform', low=1e-4, high=1e-1), batch_size=dict(type='choice', choices=[4, 8]))
    new = RunSettings(study='new', runs=str(tmp_path), search_space=wide, optimization=dict(warm_start_from=[str(old.folder)]))
    engine = open_engine(new)
    engine.ask(5)
    best = open_engine(old, read_only=True).trials()[4].params['learning_rate']
    assert engine.trials()[2].role == 'from old' and engine.trials()[2].params == dict(learning_rate=best, batch_size=4)
    assert [t.value for t in engine.trials()] == [None] * 5 and (old.folder / 'study.journal').read_bytes() == before


def test_a_study_of_generations_is_read_by_its_own_search(tmp_path):
    old = RunSettings(study='one', runs=str(tmp_path), mode='generations')
    engine = open_engine(old)
    engine.ask(2)
    for t in engine.trials(): engine.tell(t.number, 'complete', 0.1 * t.number)
    save_settings(old.folder / 'config.yaml', old)
    assert 0 < len(open_engine(old, read_only=True).plan.space) < len(old.space()), 'a training that goes on keeps its architecture'
    new = open_engine(RunSettings(study='new', runs=str(tmp_path), optimization=dict(warm_start_from=[str(old.folder)])))
    new.ask(3)
    assert 'from one' in [t.role for t in new.trials()]


def test_settings_reach_the_plan():
    settings = RunSettings(sampler='cma_es', optimization=dict(cma_es=dict(sigma0=0.2), constraints=dict(max_latency=0.5), known_good=[dict(learning_rate=4e-3)]))
    plan = plan_of(settings)
    assert (plan.sampler, plan.sigma0, plan.limits, [f.role for f in plan.fixed]) == ('cma_es', 0.2, dict(latency=0.5), ['recipe', 'failure example', 'known good'])


def test_a_changed_front_end_makes_its_own_features(tmp_path):
    "Trials that search hop and mel range share a cache folder, and none takes another's features"
    from tts_tuner.training.trainer import run_training
    from tts_tuner.data.corpus import read_corpus
    from tts_tuner.data.features import build_features
    corpus, cache = make_tiny_corpus(tmp_path / 'corpus', n=10), tmp_path / 'cache'
    made = lambda: {p.name for p in cache.iterdir() if (p / 'index.json').is_file()}
    for i, front_end in enumerate((dict(), dict(hop_length=200, mel_fmax=None))):
        hp = tiny_hparams(max_steps=1, eval_every=10, checkpoint_every=10, **front_end)
        run_training(corpus, tmp_path / f't{i:03}', hp, cache_dir=cache, console=lambda _: None)
        assert len(made()) == i + 1
    frames = []
    for front_end in (dict(), dict(hop_length=200, mel_fmax=None), dict(mel_fmax=7600.0), dict(mel_fmin=50.0), dict(hop_length=200)):
        hp = tiny_hparams(**front_end)
        frames.append(int(build_features(read_corpus(corpus, hp), hp, cache).n_frames[0]))
    assert len(made()) == 5 and frames[1] == frames[4] != frames[0] == frames[2]
    space = dict(hop_length=dict(type='choice', choices=[200, 256]), mel_fmax=dict(type='choice', choices=[7600, 8000, None]), mel_fmin=dict(type='uniform', low=0, high=50))
    engine = open_engine(RunSettings(search_space=space), tmp_path / 'study')
    engine.ask(8)
    assert {t.overrides.get('mel_fmax', 8000.0) for t in engine.trials()} >= {None, 8000.0} and {t.overrides.get('hop_length', 256) for t in engine.trials()} == {200, 256}


def test_a_journal_is_written_in_one_piece(tmp_path):
    "Two processes write at once: no line is torn, and what belongs together lies together"
    path = tmp_path / 'j'
    pids = []
    for who in range(3):
        if (pid := os.fork()) == 0:
            journal = Journal(path)
            for n in range(20):
                with journal.held():
                    for part in range(4): journal.append_logs([dict(who=who, n=n, part=part)])
            os._exit(0)
        pids.append(pid)
    for pid in pids: assert os.waitpid(pid, 0)[1] == 0
    records = list(Journal(path).read_logs(0))
    assert len(records) == 240 and all(len({(r['who'], r['n']) for r in records[i:i + 4]}) == 1 for i in range(0, 240, 4))
    with open(path) as f: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody holds it any more


def test_a_trial_above_a_limit_is_given_up_and_learnt_from(tmp_path, monkeypatch):
    "The trainers of a study report what they need; the one that needs too much goes no further, live and in the replay"
    from test_tuner import go, make, timeless

    from tts_tuner.tuner.loop import replay
    monkeypatch.setenv('FAKE_MEMORY', 't002@9000')
    settings = make(tmp_path, optimization=dict(constraints=dict(max_memory_gb=8.0)))
    result = go(settings)
    told = [d.reason for d in timeless(settings.folder) if d.subject == 't002']
    assert any('needs more than the study allows: memory_gb is 8.79, and 8 is allowed' in r for r in told) and result.winner != 't002'
    trial = open_engine(settings, read_only=True).trials()[2]
    assert trial.state == 'pruned' and not trial.feasible and trial.excess['memory_gb'] == pytest.approx(0.789, abs=0.001)
    assert replay(settings.folder) == timeless(settings.folder)
