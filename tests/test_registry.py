"Who is in use and who says so: the audit log under attack and under load, gates, the registry on MLflow itself, its verbs."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_tiny_corpus, tiny_hparams
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.command import asked
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.tuner.audit import Anchor, AuditLog, read_entry, verify_lines, whoami
from tts_tuner.tuner.deployment import DeployGates, Measurement, Version, decide_moves, past_holders
from tts_tuner.tuner.registry import ModelRegistry, NoModel


def written(n: int, folder: Path) -> AuditLog:
    log = AuditLog(folder / 'audit.jsonl', who='anna@studio')
    for k in range(n): log.record('alias moved', 'voice@production', str(k), str(k + 1), f'Reason {k}.')
    return log


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    "Lines and head of a log of nine entries"
    log = written(8, tmp_path_factory.mktemp('log'))
    return log.path.read_bytes().split(b'\n')[:-1], log.head()


# The log

@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_tampering_shows(sound, data):
    lines, head = list(sound[0]), sound[1]
    pick = lambda: data.draw(st.integers(0, len(lines) - 1))
    way = data.draw(st.sampled_from(['byte', 'remove', 'swap', 'twice', 'cut', 'blank', 'forge', 'forge all', 'insert']))
    i = pick()
    if way == 'byte':
        raw, at = bytearray(lines[i]), data.draw(st.integers(0, len(lines[i]) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
        if bytes([raw[at]]) == b'\n': return
        lines[i] = bytes(raw)
    elif way == 'remove': del lines[i]
    elif way == 'swap':
        j = pick()
        if i == j: return
        lines[i], lines[j] = lines[j], lines[i]
    elif way == 'twice': lines.insert(pick(), lines[i])
    elif way == 'cut': del lines[i:]
    elif way == 'blank': lines.insert(i, b'')
    else:
        entries = [read_entry(raw) for raw in lines]
        if way == 'insert': entries.insert(i, replace(entries[i], who='nobody'))
        entries[i] = replace(entries[i], why='By order.')
        previous = entries[i].previous
        for k in range(i, len(entries) if way != 'forge' else i + 1):
            e = replace(entries[k], previous=previous, n=k + 1 if way == 'insert' else entries[k].n)
            entries[k] = replace(e, hash=e.true_hash())
            previous = entries[k].hash
        lines = [e.line() for e in entries]
    assert not verify_lines(lines, b'', head).ok, way


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 200))
def test_a_kill_is_no_tampering(sound, cut):
    "Whatever part of the next line a killed writer left"
    lines, head = sound
    half = lines[-1][:cut]
    assert verify_lines(lines, half, head).ok
    before = read_entry(lines[-2])
    assert verify_lines(lines, b'', Anchor(before.n, before.hash, 'audit.head')).ok  # killed before the head was written


def test_half_a_line_is_vouched_for_by_the_next_entry(tmp_path):
    log = written(3, tmp_path)
    with open(log.path, 'ab') as f: f.write(b'{"hash":"77')
    assert log.verify().ok
    e = log.record('rollback', 'voice@production', '3', '2')
    assert log.verify().ok and log.entries()[-2].what == 'entry torn' and e.previous == log.entries()[-2].hash
    raw = log.path.read_bytes()
    log.path.write_bytes(raw.replace(b'{"hash":"77\n', b'{"hash":"78\n'))  # what a writer left is vouched for by its hash
    assert [f.kind for f in log.verify().faults] == ['unreadable']


def test_an_entry_that_only_lacks_its_line_end_counts(tmp_path):
    log = written(3, tmp_path)
    log.path.write_bytes(log.path.read_bytes()[:-1])
    assert log.verify().ok and log.verify().entries == 4
    log.record('rollback', 'voice@production')
    assert log.verify().ok and log.verify().entries == 5


def test_writing_on_does_not_hide_what_is_gone(tmp_path):
    log = written(6, tmp_path)
    lines = log.path.read_bytes().split(b'\n')
    log.path.write_bytes(b'\n'.join(lines[:4]) + b'\n')
    for _ in range(3): log.record('alias moved', 'voice@production', '1', '2')
    assert [f.words for f in log.verify().faults] == ['Entries 5 to 7 are missing.']
    log.path.unlink()
    log.record('alias moved', 'voice@production', '1', '2')
    assert log.verify().faults[0].kind == 'removed'


def test_a_missing_or_damaged_head(tmp_path):
    log = written(4, tmp_path)
    for damage in (None, '', '{', '[1]', '{"n": 1}'):
        log.head_path.unlink(missing_ok=True)
        if damage is not None: log.head_path.write_text(damage)
        assert [f.kind for f in log.verify().faults] == ['headless']
        log.record('alias moved', 'voice@production', '4', '5')
        assert log.entries()[-2].what == 'head lost' and log.verify().ok


def test_tail_and_head_cut_are_known_elsewhere_only(tmp_path):
    log = written(5, tmp_path)
    kept = log.head()
    lines = log.path.read_bytes().split(b'\n')
    log.path.write_bytes(b'\n'.join(lines[:3]) + b'\n')
    e = log.entries()[-1]
    log.head_path.write_text(json.dumps(dict(n=e.n, hash=e.hash)))
    assert log.verify().ok  # honestly: nothing here knows better
    assert log.verify([replace(kept, where='MLflow')]).faults[0].kind == 'truncated' and not log.verify(noted=kept.hash).ok
    assert log.verify(noted=e.hash).ok and log.verify(noted=e.hash[:16]).ok and not log.verify(noted=e.hash[:8]).ok


WRITER = '''
import sys
from tts_tuner.tuner.audit import AuditLog
log = AuditLog(sys.argv[1], who=sys.argv[2])
for k in range(int(sys.argv[3])):
    log.record('study started', f'study {k}')
    print(k, flush=True)
'''


def writer(path, who, n, **more): return subprocess.Popen([sys.executable, '-c', WRITER, str(path), who, str(n)], stdout=subprocess.PIPE, **more)


def test_writers_side_by_side(tmp_path):
    path = tmp_path / 'audit.jsonl'
    crowd = [writer(path, f'w{i}', 25) for i in range(4)]
    for p in crowd: assert p.communicate(timeout=60) and p.returncode == 0
    log = AuditLog(path)
    assert log.verify().ok and log.verify().entries == 101 and not log.verify().notes
    for i in range(4): assert [e.subject for e in log.entries() if e.who == f'w{i}' and e.subject != 'log'] == [f'study {k}' for k in range(25)]


def test_writers_killed_at_random(tmp_path):
    "Nothing that was confirmed is lost, and no kill looks like tampering"
    path, chance, confirmed = tmp_path / 'audit.jsonl', random.Random(0), {}
    for i in range(6):
        p = writer(path, f'w{i}', 10_000)
        said = [p.stdout.readline()]  # at work
        timer = threading.Timer(chance.uniform(0.0, 0.15), lambda p=p: os.kill(p.pid, signal.SIGKILL))
        timer.start()
        said += p.stdout.readlines()
        p.wait()
        confirmed[f'w{i}'] = len([x for x in said if x.endswith(b'\n')])
    log = AuditLog(path)
    assert log.verify().ok
    for who, n in confirmed.items(): assert n <= len([e for e in log.entries() if e.who == who and e.subject != 'log']) <= n + 1
    log.record('study ended', 'study 0')
    assert log.verify().ok


def test_a_disk_that_fills(tmp_path):
    import resource
    path = tmp_path / 'audit.jsonl'
    p = writer(path, 'w', 100, stderr=subprocess.PIPE, preexec_fn=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                                                                       resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))))
    out, err = p.communicate(timeout=60)
    assert p.returncode and b'No space left to write audit.jsonl' in err and path.stat().st_size == 2000
    log = AuditLog(path)
    assert log.verify().ok and log.verify().entries == len(out.split()) + 1
    log.record('study ended', 'study 0')
    assert log.verify().ok and log.entries()[-2].what == 'entry torn'


def test_what_an_entry_may_say(tmp_path):
    log = AuditLog(tmp_path / 'a' / 'audit.jsonl', who='anna@studio', mask=lambda t: t.replace('anna', '[name]'))
    e = log.record('settings changed', 'study anna', 'x' * 9000, 'two\nlines\u2028 \ud800', 'привет "quoted" \\')
    assert e.who == '[name]@studio' and len(e.old) == 4000 and log.verify().ok and log.entries()[-1] == e
    with pytest.raises(ValueError, match='is not one of'): log.record('coffee', 'x')
    assert whoami(True) == 'somebody' and whoami().count('@') == 1
    assert [e.subject for e in log.settings_changed('study a', dict(x=1, y=2), dict(x=1, y=3, z=4))] == ['study a: y', 'study a: z']


def test_a_clock_that_jumps_back(tmp_path):
    log = AuditLog(tmp_path / 'audit.jsonl', clock=iter((2e9, 1e9, 1.5e9)).__next__)
    for _ in range(2): log.record('study started', 'study a')
    assert log.verify().ok and [e.n for e in log.entries()] == [1, 2, 3]


# Gates

@pytest.mark.parametrize('given_gates', [(0.97, 0.95, 0.9), (0.8, 0.97, 0.9), (0.95, 0.97, -1), (float('nan'), 1, 0.9)])
def test_gates_that_make_no_sense(given_gates):
    with pytest.raises(UserError, match='Gates rise'): DeployGates(*given_gates)


@settings(max_examples=200, deadline=None)
@given(score=st.floats(0, 1), best=st.floats(0.01, 1), auto=st.booleans(), same=st.booleans())
def test_gates_hold(score, best, auto, same):
    new, champion = Version(2, (Measurement(score, 'a'),)), Version(1, (Measurement(best, 'a' if same else 'b'),))
    moved = {d.subject for d in decide_moves(new, dict(champion=champion, production=champion), auto=auto) if d.kind == 'promote'}
    if not same: assert not moved
    if 'production' in moved: assert auto and score >= 0.97 * best - 1e-8 and 'staging' in moved
    if 'staging' in moved: assert score >= 0.95 * best - 1e-8
    assert ('champion' in moved) == (same and score >= best)


# The registry, on MLflow itself

@pytest.fixture(scope='module')
def empty_store(tmp_path_factory):
    from tts_tuner.training.sinks import connect_mlflow
    folder = tmp_path_factory.mktemp('store')
    connect_mlflow(f'sqlite:///{folder}/mlflow.db', 'e')
    return folder / 'mlflow.db'


@pytest.fixture
def store(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path / 'mlflow.db')
    return f'sqlite:///{tmp_path}/mlflow.db'


def opened(store: str, name: str = 'voice', who: str = 'anna@studio') -> ModelRegistry:
    from tts_tuner.training.sinks import mlflow_client
    return ModelRegistry(mlflow_client(store), name, AuditLog(Path(store.removeprefix('sqlite:///')).with_name('audit.jsonl'), who))


def add(registry: ModelRegistry, score: float, key: str, auto: bool = True, digest: str = 'a', folder: Path | None = None) -> list:
    return registry.register((folder or Path('/nowhere')).as_uri(), '', [Measurement(score, digest)], auto, f'study-{key}', key)


def test_from_registration_to_rollback(store):
    r = opened(store)
    for key, score in (('a', 0.7), ('b', 0.8), ('c', 0.79)): add(r, score, key)
    assert r.aliases() == dict(candidate='3', champion='2', staging='3', production='3')
    assert add(r, 0.79, 'c') == [] and len(r.versions()) == 3
    assert [(v.number, v.study, v.sha256, v.measurements) for v in r.versions()][1] == (2, 'study-b', 'b', (Measurement(0.8, 'a'),))
    r.measure(2, Measurement(0.75, 'a', 'exam'))
    back = [d for d in r.measure('production', Measurement(0.6, 'a', 'exam')) if d.kind == 'rollback']
    assert [d.subject for d in back] == ['production'] and 'version 3 to version 2' in back[0].reason and r.aliases()['production'] == '2'
    assert r.client.get_model_version_by_alias('voice', 'production').version in (2, '2')
    assert [(e.old, e.new) for e in r.entries() if e.what == 'rollback'] == [('3', '2')] and r.verify().ok
    start = time.process_time()
    assert 'version 2 to version 1' in r.rollback(why='It lisps.').reason and r.aliases()['production'] == '1'
    assert time.process_time() - start < 1
    with pytest.raises(UserError, match='Nobody is known to have held production before version 1'): r.rollback()
    with pytest.raises(UserError, match='is version 1 already'): r.rollback(to=1)
    with pytest.raises(UserError, match='candidate is not rolled back'): r.rollback('candidate')
    assert r.verify().ok and len(r.anchors()[0]) == 1


def test_an_exam_is_kept_once_and_counts(store, tmp_path):
    from tts_tuner.config.settings import load_settings
    from tts_tuner.tuner.registry import keep_exam
    given_settings, heard = load_settings(None, [f'tracking.uri={store}', 'tracking.model_name=voice'], runs=str(tmp_path)), []
    keep = lambda key, score, settings=given_settings: keep_exam(settings, key, score, 'a', heard.append)
    assert keep('a', 0.5) == []
    r = opened(store)
    for key, score in (('a', 0.70), ('b', 0.75)): add(r, score, key)
    assert [d.kind for d in keep('a', 0.69)] == ['continue'] and r.aliases()['champion'] == '2'  # b has sat none yet
    assert [(d.subject, d.kind) for d in keep('b', 0.60)] == [('production', 'rollback'), ('champion', 'rollback')]
    assert r.aliases() == dict(candidate='2', champion='1', staging='2', production='1') and keep('b', 0.60) == [] and not heard
    (tmp_path / 'text.db').write_text('This is no database. ' * 100)
    assert keep('a', 0.5, load_settings(None, [f'tracking.uri=sqlite:///{tmp_path}/text.db'])) == [] and 'exam.json has it' in heard[0]


def test_without_auto_only_what_nobody_hears_moves(store):
    r = opened(store)
    add(r, 0.7, 'a', auto=False), add(r, 0.8, 'b', auto=False)
    assert r.aliases() == dict(candidate='2', champion='2', staging='2')
    assert 'nobody' in _refusal(lambda: r.rollback()) and 'held by nobody' in _refusal(lambda: r.version('production'))
    assert 'There is no version 9' in _refusal(lambda: r.promote(9))


def _refusal(ask) -> str:
    with pytest.raises(UserError) as e: ask()
    return str(e.value)


def test_scores_on_different_corpora_are_never_compared(store):
    r = opened(store)
    add(r, 0.5, 'a'), add(r, 0.99, 'b', digest='other')
    assert r.aliases() == dict(candidate='2', champion='1', staging='1', production='1')
    assert 'never measured on the same sentences' in _refusal(lambda: r.promote(2)) and 'for a reason' in _refusal(lambda: r.promote(2, anyway=True))
    assert [e.what for e in r.entries()][-1] == 'deploy refused'
    for n, score in ((1, 0.5), (2, 0.6)): r.measure(n, Measurement(score, 'third', 'side-by-side'))
    assert r.aliases()['champion'] == '2'  # now there is something to compare
    assert r.promote(2).kind == 'promote' and r.aliases()['production'] == '2'


def test_a_registration_that_was_interrupted_is_finished(store):
    r = opened(store)
    add(r, 0.5, 'a')
    move = r._move
    def killed(alias, *rest, **more):
        if alias == 'staging': raise KeyboardInterrupt
        move(alias, *rest, **more)
    r._move = killed
    with pytest.raises(KeyboardInterrupt): add(r, 0.6, 'b')
    r._move = move
    assert r.aliases()['candidate'] == '1' and r.aliases()['champion'] == '2'
    add(r, 0.6, 'b')
    assert r.aliases() == dict.fromkeys(('candidate', 'champion', 'staging', 'production'), '2') and len(r.versions()) == 2
    assert len([e for e in r.entries() if e.what == 'version registered']) == 2 and r.verify().ok


def test_studies_that_end_together(store):
    "Each would have been champion alone"
    scores = [0.50, 0.51, 0.52, 0.53]
    opened(store).client.create_registered_model('voice')
    crowd = [threading.Thread(target=lambda s=s: add(opened(store), s, str(s))) for s in scores]
    for t in crowd: t.start()
    for t in crowd: t.join(60)
    r = opened(store)
    champion = r.version('champion')
    assert champion.measurements[0].score == 0.53 and len(r.versions()) == 4 and r.verify().ok
    assert past_holders('voice@champion', r.entries())[-1] == str(champion.number)


def test_a_store_of_an_older_version(store):
    "It had one score, without a ruler, and no log"
    from tts_tuner.training.sinks import mlflow_client
    client = mlflow_client(store)
    client.create_registered_model('voice')
    for score in ('0.5', '0.6', 'oops'): client.create_model_version('voice', 'file:///nowhere', tags=dict(score=score, digest='a'))
    client.set_registered_model_alias('voice', 'champion', '1')
    r = opened(store)
    assert r.versions()[1].measurements == (Measurement(0.6, 'a'),) and not r.versions()[2].speaks
    r.measure(2, Measurement(0.7, 'a', 'exam'))
    assert {m.ruler: m.score for m in r.version(2).measurements} == dict(validation=0.6, exam=0.7) and r.aliases() == dict(champion='2')
    assert [e.what for e in r.entries()] == ['log begun', 'alias found', 'version measured', 'alias moved']


def test_what_others_do_is_noted(store):
    r = opened(store)
    for key, score in (('a', 0.5), ('b', 0.5), ('c', 0.5)): add(r, score, key)
    r.client.set_registered_model_alias('voice', 'production', '2')  # in MLflow's window
    assert 'from version 2 to version 1' in r.rollback().reason
    found = [(e.old, e.new) for e in r.entries() if e.what == 'alias found']
    assert found == [('3', '2')] and r.verify().ok


def test_a_version_that_was_deleted_is_not_gone_back_to(store):
    r = opened(store)
    for key in 'abc': add(r, 0.5, key)
    r.client.delete_model_version('voice', '2')
    assert 'to version 1' in r.rollback().reason


def test_a_store_that_refuses_a_move(store, monkeypatch):
    r = opened(store)
    add(r, 0.5, 'a'), add(r, 0.5, 'b')
    def refuse(*_): raise RuntimeError('database is locked')
    with monkeypatch.context() as m:
        m.setattr(r.client, 'set_registered_model_alias', refuse)
        with pytest.raises(TTSTunerError, match='could not be moved to version 1 .database is locked'): r.rollback()
    assert r.aliases()['production'] == '2' and r.entries()[-1].what == 'not done'
    assert past_holders('voice@production', r.entries()) == ['1', '2']  # as if it had not been tried
    assert 'to version 1' in r.rollback().reason and not [e for e in r.entries() if e.what == 'alias found']


def test_a_tampered_log_names_nobody(store):
    r = opened(store)
    for key in 'abc': add(r, 0.5, key)
    r.audit.path.write_bytes(r.audit.path.read_bytes().replace(b'"old":"1"', b'"old":"7"', 1))
    with pytest.raises(TTSTunerError, match='was tampered with .*name the version'): r.rollback()
    assert r.aliases()['production'] == '3' and 'to version 1' in r.rollback(to=1).reason and not r.verify().ok


def test_without_a_log(store):
    from tts_tuner.training.sinks import mlflow_client
    r = ModelRegistry(mlflow_client(store), 'voice')
    add(r, 0.5, 'a'), add(r, 0.6, 'b')
    assert r.aliases()['production'] == '2' and 'nobody knows who came before' in _refusal(r.rollback)
    assert 'to version 1' in r.rollback(to=1).reason and r.verify().ok


def test_two_models_share_a_store_and_a_log(store):
    one, two = opened(store, 'anna'), opened(store, 'bert')
    add(one, 0.5, 'a'), add(two, 0.4, 'b'), add(one, 0.6, 'c'), add(two, 0.5, 'd')
    assert 'version 2 to version 1' in one.rollback().reason and two.aliases()['production'] == '2' and one.verify().ok and two.verify().ok


def test_the_file_that_was_registered(store, tmp_path):
    from tts_tuner.config.files import sha256_file
    (tmp_path / 'voice').mkdir()
    file = tmp_path / 'voice' / 'best_model.pt'
    file.write_bytes(b'weights')
    r = opened(store)
    add(r, 0.5, sha256_file(file), folder=file.parent)
    assert r.fetch('production').read_bytes() == b'weights'
    file.write_bytes(b'others')
    with pytest.raises(TTSTunerError, match='is not the file that was registered as version 1'): r.fetch(1)
    file.unlink()
    with pytest.raises(TTSTunerError, match='cannot be had from'): r.fetch(1)


def test_registries_that_cannot_be_opened(store, tmp_path):
    with pytest.raises(NoModel, match='has no model "voice" yet'): ModelRegistry.open(store, 'voice')
    with pytest.raises(NoModel): ModelRegistry.open(f'sqlite:///{tmp_path}/none.db')
    (tmp_path / 'text.db').write_text('This is no database. ' * 100)
    with pytest.raises(TTSTunerError, match='does not answer'): ModelRegistry.open(f'sqlite:///{tmp_path}/text.db')


# Where files go

def test_the_artifact_store_arrives(store, tmp_path, monkeypatch):
    from tts_tuner.config.settings import Tracking
    from tts_tuner.training.sinks import connect_mlflow
    from tts_tuner.tuner.tracker import Tracker
    monkeypatch.setattr('tts_tuner.training.metadata.run_metadata', lambda digest: {})  # it takes a second
    heard: list[str] = []
    tracker = Tracker(Tracking(uri=store, experiment='bucket'), tmp_path / 'runs' / 's', heard.append, artifacts='s3://ml-artifacts/voices')
    tracker.start('s', {}, {})
    tracker.close('FINISHED')
    client, made = connect_mlflow(store, 'bucket', 's3://ml-artifacts/voices/')
    assert not heard and client.get_experiment(made).artifact_location == 's3://ml-artifacts/voices'
    [run] = client.search_runs([made])
    assert run.info.artifact_uri.startswith('s3://ml-artifacts/voices/')
    client, made = connect_mlflow(store, 'folder', str(tmp_path / 'files'))
    assert client.get_experiment(made).artifact_location == (tmp_path / 'files').as_uri()
    with pytest.raises(UserError, match='keeps its files in s3://ml-artifacts/voices, not in'): connect_mlflow(store, 'bucket', str(tmp_path))
    assert connect_mlflow(store, 'bucket')[1]  # nothing asked for, nothing refused


# The verbs

def test_verbs(store, tmp_path, monkeypatch):
    import tts_tuner.cli_registry  # noqa: F401
    monkeypatch.chdir(tmp_path)
    r = opened(store, 'tts_tuner')
    for key, score in (('a', 0.7), ('b', 0.8)): add(r, score, key)
    def say(line: str) -> tuple[int, str]:
        status, out, err = asked(f'{line} --tracking-uri {store}')  # MLflow keeps connections by address, and tests have many a mlflow.db
        return status, (out + err).strip()
    status, text = say('registry list')
    assert status == 0 and 'study-b' in text and 'champion, staging, production' in text and '88 %' in text
    status, text = say('registry show production')
    assert status == 0 and 'score' in text and 'alias moved' in text and 'cannot be had' in text
    assert say('registry promote 2') == (2, 'production is version 2 already.')
    assert say('registry promote 1')[0] == 2 and '87.5 % of the champion' in say('registry promote 1')[1]
    assert say('registry promote 1 --anyway --why "It is warmer."') == (0, 'production moves to version 1 by hand: It is warmer.')
    assert say('registry rollback --why "Too warm."') == (0, 'production goes back from version 1 to version 2: Too warm.')
    assert say('registry rollback --alias nonsense')[0] == 2 and say('registry show 77')[0] == 2 and say('registry compare champion')[0] == 2
    assert 'give them: --corpus' in say('registry compare 1')[1]
    status, text = say('audit show --last 3')
    assert status == 0 and 'Too warm.' in text and len(json.loads(say('audit show --json --last 1')[1])) == 10
    status, text = say('audit verify')
    assert status == 0 and 'MLflow' in text and say(f'audit verify --noted {r.audit.head().hash[:20]}')[0] == 0
    status, text = say('audit verify --noted 0123456789abcdef')
    assert status == 1 and 'No entry has the hash' in text
    log = tmp_path / 'audit.jsonl'
    log.write_bytes(log.read_bytes().replace(b'It is warmer', b'It is colder'))
    status, text = say('audit verify')
    assert status == 1 and 'is not what was written' in text and text.count('changed') == 1


def test_compare_lets_both_speak(store, tmp_path, monkeypatch):
    import tts_tuner.cli_registry  # noqa: F401
    from tts_tuner.config.files import sha256_file
    from tts_tuner.training.trainer import export_model, train
    monkeypatch.chdir(tmp_path)
    corpus, r = make_tiny_corpus(tmp_path / 'corpus'), opened(store, 'tts_tuner')
    for i, digest in ((1, 'one'), (2, 'two')):
        train(corpus, tmp_path / f't{i}', tiny_hparams(max_steps=2, eval_every=2, checkpoint_every=2, seed=i), cache_dir=tmp_path / 'data/cache',
              tensorboard=False, console=lambda line: None, n_samples=0)
        file = export_model(tmp_path / f't{i}', tmp_path / f'v{i}' / 'best_model.pt')
        add(r, 0.5, sha256_file(file), folder=file.parent, digest=digest)
    status, out, err = asked(f'registry compare 2 --corpus corpus --sentences 2 --record --tracking-uri {store}')
    assert status == 0 and 'spoken successfully' in out, out + err
    place = tmp_path / 'comparisons' / '2-with-1'
    assert {'recording/00.wav', 'recording/01.wav'} <= {str(p.relative_to(place)) for p in place.rglob('*.wav')} and (place / 'index.html').is_file()
    shared = [{m.ruler for m in v.measurements} for v in r.versions()]
    assert len(shared[0] & shared[1]) == 2  # validation by name, and what both spoke
    assert 'measured on' not in out and 'side-by-side' in (place / 'comparison.json').read_text()


# A study leaves its trace

def test_a_study_on_record(tmp_path, monkeypatch):
    from test_tuner import go, make
    monkeypatch.chdir(tmp_path)
    for workers in (1, 1, 2): go(make(tmp_path, trials=2, workers=workers))
    log = AuditLog(tmp_path / 'runs' / 'audit.jsonl')
    assert log.verify().ok and not (tmp_path / 'audit.jsonl').exists()
    changed = [(e.subject, e.old, e.new) for e in log.entries() if e.what == 'settings changed']
    assert len(changed) == 1 and changed[0][0].startswith('study s: ') and changed[0][1:] == ('1', '2')
    assert [(e.what, e.new) for e in log.entries() if e.what.startswith('study') and e.what != 'study started'] == [('study ended', 'finished')] * 3
