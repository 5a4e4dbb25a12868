"Engines and clusters that are extras: Hyperopt, Ray's searchers, trainers on a Ray cluster. Run by `make test-engines`, in an environment of its own"
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tts_tuner.config.contracts import read_decisions
from tts_tuner.config.errors import UserError
from tts_tuner.config.settings import load_settings, save_settings
from tts_tuner.tuner import engine_suite as suite
from tts_tuner.tuner.engines import make_engine, open_engine
from tts_tuner.tuner.loop import Data, run_study
from tts_tuner.tuner.trainer_wrapper import find_trainer
from tts_tuner.tuner.trials import PlainView, read_status

pytestmark = [pytest.mark.engines, pytest.mark.skipif(os.environ.get('TTS_TUNER_ENGINES') != '1', reason='extras: make test-engines runs them')]
FAKE = (sys.executable, str(Path(__file__).with_name('fake_trainer.py')))
LOOPBACK = dict(RAY_USAGE_STATS_ENABLED='0', RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER='0')
if os.environ.get('TTS_TUNER_ENGINES') == '1': os.environ.update(LOOPBACK)  # before Ray is imported

DRIVER = '''
import sys
from tts_tuner.config.settings import load_settings
from tts_tuner.tuner.loop import Data, run_study
try: print(run_study(load_settings(sys.argv[1]), trainer=sys.argv[2:], prepare=lambda s, say: Data('corpus', 'abc'), poll=0.05).winner)
except Exception as e: print(e, file=sys.stderr); sys.exit(getattr(e, 'exit_code', 1))
'''


class Silent(PlainView):
    def say(self, text): pass
    def update(self, rows): pass


def by(name, sampler='tpe'):
    "How the suite opens this engine"
    def make(plan, folder):
        folder.mkdir(parents=True, exist_ok=True)
        return make_engine(name, replace(plan, sampler=sampler), folder / 'study.journal')
    return make


@pytest.mark.parametrize('name', ['hyperopt', 'ray_tune'])
def test_every_promise_is_kept(tmp_path, name):
    assert len(suite.conform(by(name), tmp_path)) == len(suite.CHECKS)


@pytest.mark.parametrize('name', ['hyperopt', 'ray_tune'])
def test_by_chance(tmp_path, name):
    suite.conform(by(name, 'random'), tmp_path, skip=('check_better_than_chance', 'check_importance', 'check_workers'))


@pytest.mark.parametrize('name', ['hyperopt', 'ray_tune'])
def test_limits_are_learnt(tmp_path, name):
    "Deep models are better here, and too large: proposals stay where they fit"
    late = {}
    for word, limits in dict(limited=dict(memory_gb=4.0), free={}).items():
        engine = by(name)(suite.plan(limits=limits, space={k: suite.SPACE[k] for k in ('depth', 'dropout')}), tmp_path / word)
        for n in range(80):
            engine.ask(n + 1)
            depth = engine.trials()[n].params['depth']
            engine.tell(n, 'complete', depth / 8, dict(memory_gb=float(depth)))
        late[word] = sum(t.params['depth'] for t in engine.trials()[-16:]) / 16
    assert late['limited'] < 4.4 and late['free'] > 5.4, late  # 4.5 by chance


@pytest.mark.parametrize('name', ['hyperopt', 'ray_tune'])
def test_known_good_points_come_first(tmp_path, name):
    settings = load_settings(runs=str(tmp_path), study='s', trials=8, core_engine=dict(primary_engine=name), optimization=dict(known_good=[dict(learning_rate=5e-3)]))
    engine = open_engine(settings)
    engine.ask(5)
    assert [t.role for t in engine.trials()] == ['recipe', 'failure example', 'known good', 'proposal', 'proposal']
    assert open_engine(load_settings(runs=str(tmp_path), study='s'), read_only=True).trials() == engine.trials()  # any engine reads it


def test_another_searcher_of_ray(tmp_path):
    "Ray's searcher around Hyperopt, driven by the same three words"
    from ray import tune
    from ray.tune.search.hyperopt import HyperOptSearch

    from tts_tuner.tuner.ray_engine import METRIC, RayEngine
    space = dict(learning_rate=tune.loguniform(1e-4, 1e-1), dropout=tune.uniform(0, 0.5), depth=tune.randint(1, 9), attention=tune.choice(['forward', 'location', None]))

    def searchers(plan, number, seed, points):
        return HyperOptSearch(space=HyperOptSearch.convert_search_space(space), metric=METRIC, mode='max', points_to_evaluate=points or None,
                              n_initial_points=plan.n_startup, random_state_seed=seed)

    def make(plan, folder):
        folder.mkdir(parents=True, exist_ok=True)
        return RayEngine(plan, folder / 'study.journal', searchers=searchers)

    suite.check_values(make, tmp_path / 'values')
    suite.check_reopening(make, tmp_path / 'again', trials=8)
    suite.check_better_than_chance(make, tmp_path / 'learns')


def test_samplers_they_do_not_have(tmp_path):
    for name, sampler in (('hyperopt', 'gp'), ('hyperopt', 'cma_es'), ('ray_tune', 'cma_es'), ('ray_tune', 'grid')):
        with pytest.raises(UserError, match=f'optimization.sampler: {name} .*{sampler}; take tpe'): by(name, sampler)(suite.plan(), tmp_path)


# Trainers on a cluster


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.05)


NODES = """
import sys
from ray.cluster_utils import Cluster
share = dict(num_cpus=1, include_dashboard=False, object_store_memory=10**8)
cluster = Cluster(initialize_head=True, head_node_args=dict(share))
nodes = [cluster.add_node(**share)]
print(cluster.address, flush=True)
for word in sys.stdin:
    if word.strip() == 'add': nodes.append(cluster.add_node(**share))
    else: cluster.remove_node(nodes.pop(), allow_graceful=False)
cluster.shutdown()
"""


class Nodes:
    "A cluster of two nodes on the loopback address, one core each"
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, '-c', NODES], env={**os.environ, **LOOPBACK, 'FAKE_PACE': '0.02'}, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.address = self.process.stdout.readline().strip()

    def tell(self, word):
        self.process.stdin.write(f'{word}\n')
        self.process.stdin.flush()


@pytest.fixture(scope='module')
def nodes():
    found = Nodes()
    from tts_tuner.tuner.ray_launcher import connect
    connect(found.address)
    import ray
    assert ray.cluster_resources().get('CPU') == 2
    yield found
    ray.shutdown()
    found.process.stdin.close()
    found.process.wait(60)


@pytest.fixture(scope='module')
def cluster(nodes): return nodes.address


LONG: dict = dict(hparams='max_steps=320,device=cpu', rungs=dict(steps=[160, 300]))  # the first rung is seconds away


def make(tmp_path, cluster=None, **flags):
    core = dict(cluster=cluster, primary_engine='ray_tune' if cluster else 'optuna')
    given = dict(study='s', runs=str(tmp_path / 'runs'), hparams='max_steps=200,device=cpu', trials=4, workers=2, tracking=dict(enabled=False), rungs=dict(steps=[40, 120]))
    return load_settings(**given | flags, core_engine=core)


def go(settings): return run_study(settings, Silent(), trainer=FAKE, prepare=lambda s, say: Data('corpus', 'abc'), poll=0.05)


def drive(settings, tmp_path) -> subprocess.Popen:
    save_settings(tmp_path / 'driver.yaml', settings)
    command = [sys.executable, '-c', DRIVER, str(tmp_path / 'driver.yaml'), *FAKE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def decided(folder): return [(d.kind, d.subject, d.step, d.reason) for d in read_decisions(folder / 'decisions.jsonl')]


def steps_of(folder): return {p.parents[1].name: [json.loads(line)['step'] for line in p.read_text().splitlines()] for p in sorted(folder.glob('t*/g001/metrics.jsonl'))}


def each_step_once(folder):
    for name, steps in steps_of(folder).items(): assert steps == list(range(1, len(steps) + 1)), (name, steps)


def seat_of(trainer) -> psutil.Process:
    "The actor that holds a trainer"
    assert 'Seat' in (found := trainer.parent()).cmdline()[0], found.cmdline()
    return found


def test_a_study_on_a_cluster(tmp_path, cluster):
    "Killed with SIGKILL while trainers work on the cluster; they go on, are found again, and no step is trained twice"
    settings = make(tmp_path, cluster)
    process = drive(settings, tmp_path)
    wait_for(lambda: read_status(settings.folder / 't000' / 'g001').get('step', 0) >= 20)
    process.kill()
    process.communicate()
    seat_of(find_trainer(settings.folder / 't000' / 'g001'))
    result = go(settings)
    each_step_once(settings.folder)
    assert (settings.folder / 't000' / 'g001' / 'starts').read_text().split() == ['0', '40', '120']
    assert not any(kind == 'restart' for kind, *_ in decided(settings.folder))
    engine = open_engine(settings, read_only=True)
    assert len(engine.trials()) == 4 and all(t.finished for t in engine.trials())
    import ray
    wait_for(lambda: ray.available_resources().get('CPU') == 2)
    assert ray.util.list_named_actors() == [] and result.winner


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_study_on_a_cluster_is_stopped(tmp_path, cluster, number):
    settings = make(tmp_path, cluster, **LONG)
    process = drive(settings, tmp_path)
    wait_for(lambda: read_status(settings.folder / 't001' / 'g001').get('step', 0) >= 20)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'the same command goes on' in err, err
    assert read_status(settings.folder / 't001' / 'g001')['state'] == 'stopped' and find_trainer(settings.folder / 't001' / 'g001') is None


def test_a_seat_is_lost(tmp_path, cluster):
    "The actor dies and leaves its trainer behind; that one is ended, and another goes on from its last checkpoint"
    settings = make(tmp_path, cluster, trials=2)
    process = drive(settings, tmp_path)
    run_dir = settings.folder / 't000' / 'g001'
    wait_for(lambda: read_status(run_dir).get('step', 0) >= 20)
    left = find_trainer(run_dir)
    seat_of(left).kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert not left.is_running() and any('Its place in the cluster was lost' in reason for kind, _, _, reason in decided(settings.folder) if kind == 'restart')
    each_step_once(settings.folder)


def test_a_machine_is_lost(tmp_path, nodes):
    "A node of the cluster is killed at work; its trial waits for room on another and goes on there"
    settings = make(tmp_path, nodes.address, trials=3, workers=3, **LONG)
    nodes.tell('add')
    import ray
    wait_for(lambda: ray.cluster_resources().get('CPU') == 3)
    process = drive(settings, tmp_path)
    folders = [settings.folder / f't00{i}' / 'g001' for i in range(3)]
    wait_for(lambda: all(read_status(f).get('step', 0) >= 20 for f in folders))
    nodes.tell('kill')
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    restarts = [(subject, reason) for kind, subject, _, reason in decided(settings.folder) if kind == 'restart']
    assert len(restarts) == 1 and 'Its place in the cluster was lost' in restarts[0][1], restarts
    each_step_once(settings.folder)
    wait_for(lambda: ray.cluster_resources().get('CPU') == 2)


def test_shares_of_a_cluster(cluster):
    from tts_tuner.tuner.ray_launcher import RayLauncher
    launcher = RayLauncher(cluster, gpu=True)
    assert len(launcher.shares('auto')) == 2 and launcher.shares(1)[0]['OMP_NUM_THREADS'] == '1' and len(launcher.shares(5)) == 5
    assert not launcher.gpu and launcher.at_work(Path('/nowhere')) == {}


def test_a_trial_that_waits_for_room_is_stopped(tmp_path, cluster):
    from tts_tuner.tuner.ray_launcher import RayLauncher
    from tts_tuner.tuner.trainer_wrapper import TrainerJob, stop_trainers
    launcher = RayLauncher(cluster)
    large = TrainerJob('t000', tmp_path / 't000' / 'g001', 'corpus', 'small', environment=dict(OMP_NUM_THREADS='64'))
    waiting = launcher.start(large, FAKE)
    time.sleep(0.5)
    assert waiting.alive() and waiting.exit_code is None
    assert stop_trainers([waiting]) == [] and not waiting.alive()
    assert 'before there was room' in (tmp_path / 't000' / 'g001' / 'train.log').read_text()


def test_addresses(tmp_path):
    begun = time.monotonic()
    for address, said in ((f'127.0.0.1:{free_port()}', 'nothing answers at 127.0.0.1'), ('somewhere', 'is no address')):
        with pytest.raises(UserError, match=said): go(make(tmp_path, address))
    assert time.monotonic() - begun < 10 and not (tmp_path / 'runs' / 's' / 'study.journal').exists()
