"Checkpoints survive a process that dies, a disk that is full and weights that are broken"
import errno
import gzip
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.training import checkpoint
from tts_tuner.training.background import Saver, Snapshot
from tts_tuner.training.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint


def state(step, size=4): return dict(step=step, model={'weight': torch.full((size,), float(step))})


@pytest.mark.parametrize('save', ['kept.save', 'saver.save'], ids=['at once', 'beside'])
def test_kill_while_writing_leaves_a_whole_file(tmp_path, save):
    writer = textwrap.dedent(f'''
        import torch
        from tts_tuner.training.background import Saver
        from tts_tuner.training.checkpoint import CheckpointFolder
        kept = CheckpointFolder({str(tmp_path)!r}, keep=2)
        saver, weight = Saver(kept), torch.zeros(2_000_000)
        for step in range(1, 10**6): {save}(dict(step=step, model={{'weight': weight.add_(1)}}), best=step % 3 == 0)
    ''')
    best = 0
    for pause in (0.05, 0.21, 0.33):
        process = subprocess.Popen([sys.executable, '-c', writer])
        deadline = time.monotonic() + 60
        kept = CheckpointFolder(tmp_path, keep=2)
        while not kept.best.exists() and time.monotonic() < deadline: time.sleep(0.02)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in [kept.last, kept.best, *kept.steps().values()]:
            found = load_checkpoint(path)
            assert bool((found['model']['weight'] == found['step']).all()), f'{path.name} is a mixture'
        newest, said = kept.load_newest()
        assert newest and not said
        best = max(best, load_checkpoint(kept.best)['step'])
    kept.save(state(10**6))
    assert not list(tmp_path.glob('.*.tmp')), 'half-written files are swept up'
    assert load_checkpoint(kept.best)['step'] <= best


def test_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    kept = CheckpointFolder(tmp_path, keep=3)
    kept.save(state(1), best=True)

    def full(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr('tts_tuner.config.files.os.fsync', full)
    with pytest.raises(TTSTunerError, match='No space left') as e: kept.save(state(2), best=True)
    assert e.value.exit_code == 1
    monkeypatch.undo()
    assert [load_checkpoint(p)['step'] for p in (kept.last, kept.best)] == [1, 1] and list(kept.steps()) == [1]


def test_only_our_own_files_are_removed(tmp_path):
    theirs = ['notes.txt', 'step_final.pt', 'best_of_all.pt', 'step_12.pt', '.hidden.tmp']
    for name in theirs: (tmp_path / name).write_text('mine')
    kept = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 9): kept.save(state(step), best=step == 2)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {*theirs, 'step_00000007.pt', 'step_00000008.pt', 'last.pt', 'best.pt'}
    assert load_checkpoint(kept.best)['step'] == 2


def test_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args): raise OSError(errno.EPERM, 'no links here')
    monkeypatch.setattr('tts_tuner.training.checkpoint.os.link', refuse)
    kept = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3): kept.save(state(step), best=step == 1)
    assert [load_checkpoint(p)['step'] for p in (kept.last, kept.best)] == [3, 1]


@pytest.mark.parametrize('content', [b'', b'RIFF....WAVE', b'PK\x03\x04 and then nothing', b'\x80\x04\x95junk'])
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / 'a.pt').write_bytes(content)
    with pytest.raises(UserError, match='a.pt'): load_checkpoint(tmp_path / 'a.pt')


def test_newer_format_is_refused(tmp_path):
    torch.save(dict(format='tts_tuner', version=99, model={}), tmp_path / 'a.pt')
    with pytest.raises(UserError, match='newer tts_tuner'): load_checkpoint(tmp_path / 'a.pt')


def test_objects_are_refused(tmp_path):
    with pytest.raises(TypeError, match='state.extra is a set'): save_checkpoint(tmp_path / 'a.pt', dict(step=1, model={}, extra={1}))
    assert not list(tmp_path.iterdir())


def test_a_kill_between_two_names_loses_no_best(tmp_path, monkeypatch):
    "Whatever last.pt has seen as the best lies in best.pt: both names cannot move in one step"
    kept = CheckpointFolder(tmp_path)
    kept.save(state(1), best=True)
    move = checkpoint._same_content

    def killed(source, target):
        move(source, target)
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, '_same_content', killed)
    with pytest.raises(KeyboardInterrupt): kept.save(state(2), best=True)
    assert load_checkpoint(kept.best)['step'] >= load_checkpoint(kept.last)['step']


@pytest.mark.parametrize('version', [None, 'new', 2])
def test_another_version_is_named(tmp_path, version):
    path = tmp_path / 'x.pt'
    torch.save({'format': 'tts_tuner', 'step': 1} | ({'version': version} if version else {}), path)
    with pytest.raises(UserError, match='format version'): load_checkpoint(path)


# ---------------------------------------------------------------- beside training

class Slow(CheckpointFolder):
    "A disk that waits until it is told to go on"

    def __init__(self, path, **more):
        super().__init__(path, **more)
        self.go, self.under_way = threading.Event(), threading.Event()

    def save(self, state, best=False):
        self.under_way.set()
        assert self.go.wait(20)
        return super().save(state, best=best)


def test_the_file_holds_one_step_though_weights_move_on(tmp_path):
    net = torch.nn.Linear(50, 50)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    numbers, folder = dict(score=1.0), Slow(tmp_path)
    saver, told = Saver(folder), []
    saver.save(dict(step=1, model=net.state_dict(), metrics=numbers), best=True, then=lambda: told.append(folder.last.exists()))
    assert folder.under_way.wait(20) and not told and not folder.last.exists(), 'nobody is told of a file that is not there'
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
    numbers['score'] = 2.0
    folder.go.set()
    saver.wait()
    found = load_checkpoint(folder.last)
    assert told == [True] and found['metrics'] == dict(score=1.0) and all(torch.equal(found['model'][k], v) for k, v in before.items())


def test_one_state_under_way_at_a_time(tmp_path):
    folder = Slow(tmp_path, keep=9)
    saver, order = Saver(folder), []
    saver.save(state(1), then=lambda: order.append('on the disk'))
    assert folder.under_way.wait(20)
    threading.Timer(0.1, folder.go.set).start()
    saver.save(state(2))
    order.append('second taken')
    assert order[0] == 'on the disk', 'the second waited for the first'
    saver.wait()
    assert [load_checkpoint(p)['step'] for p in folder.steps().values()] == [1, 2]


@pytest.mark.parametrize('how', ['save', 'wait', 'settle'])
def test_a_full_disk_surfaces_later_and_once(tmp_path, monkeypatch, how):
    kept, told = CheckpointFolder(tmp_path), []
    saver = Saver(kept)
    saver.save(state(1), best=True)
    saver.wait()

    def full(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr('tts_tuner.config.files.os.fsync', full)
    saver.save(state(2), then=lambda: told.append(2))
    if how == 'settle': assert 'No space left' in str(saver.settle())
    else:
        with pytest.raises(TTSTunerError, match='No space left') as e: saver.wait() if how == 'wait' else saver.save(state(3))
        assert e.value.exit_code == 1
    monkeypatch.undo()
    saver.wait()
    assert not told and list(kept.steps()) == [1] and load_checkpoint(kept.best)['step'] == 1
    saver.save(state(4))
    saver.wait()
    assert load_checkpoint(kept.last)['step'] == 4


def test_poisoned_weights_surface_too(tmp_path):
    saver = Saver(CheckpointFolder(tmp_path))
    saver.save(dict(step=1, model=dict(w=torch.tensor([float('nan')]))))
    with pytest.raises(TTSTunerError, match='NaN or infinity, first w'): saver.wait()
    assert not list(tmp_path.iterdir())


def test_what_is_no_plain_value_is_named_at_once(tmp_path):
    with pytest.raises(TypeError, match='state.model.x is a set'): Saver(CheckpointFolder(tmp_path)).save(dict(step=1, model=dict(x={1})))


def test_a_program_that_dies_by_an_error_still_leaves_the_file(tmp_path):
    program = textwrap.dedent(f'''
        import torch
        from tts_tuner.training.background import Saver
        from tts_tuner.training.checkpoint import CheckpointFolder
        Saver(CheckpointFolder({str(tmp_path)!r})).save(dict(step=7, model=dict(w=torch.zeros(3_000_000))))
        raise ValueError('something else')
    ''')
    assert subprocess.run([sys.executable, '-c', program], capture_output=True).returncode == 1
    assert load_checkpoint(tmp_path / 'last.pt')['step'] == 7


def test_a_snapshot_shares_nothing_and_follows_changes_of_shape():
    kept, weights = Snapshot(), torch.arange(6.0).reshape(2, 3)
    shared = dict(a=weights, b=weights.t(), c=[weights[0], 'x', None], n=torch.tensor(3))
    first = kept.take(shared)
    pointers = {t.data_ptr() for t in (first['a'], first['b'], first['c'][0])}
    assert len(pointers) == 3 and weights.data_ptr() not in pointers and torch.equal(first['b'], weights.t())
    second = kept.take(dict(shared, a=torch.ones(4), n=torch.tensor(3.0)))
    assert second['a'].tolist() == [1, 1, 1, 1] and second['n'].dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_copies_from_a_gpu_hold_the_step_they_were_asked_at(tmp_path):
    saver, weight = Saver(CheckpointFolder(tmp_path, keep=9)), torch.zeros(20_000_000, device='cuda')
    for step in range(1, 6):
        weight += 1
        saver.save(dict(step=step, model=dict(w=weight)))
        weight *= 1  # queued behind the copy
    saver.wait()
    for step, path in saver.folder.steps().items(): assert bool((load_checkpoint(path)['model']['w'] == step).all())
    assert all(t.is_pinned() for t in saver._snapshot._kept.values())


# ---------------------------------------------------------------- gzip

def test_gzipped_files(tmp_path):
    kept = CheckpointFolder(tmp_path, keep=2, compress=True)
    for beside, steps in ((False, (1, 2)), (True, (3,))):
        saver = Saver(kept, beside)
        for step in steps: saver.save(state(step, 100_000), best=step == 1)
        saver.wait()
    assert kept.last.read_bytes()[:2] == b'\x1f\x8b' and kept.last.stat().st_size < 40_000 and load_checkpoint(kept.last)['step'] == 3
    assert load_checkpoint(kept.best)['step'] == 1 and list(kept.steps()) == [2, 3]
    CheckpointFolder(tmp_path, keep=2).save(state(4))  # plain files beside gzipped ones
    assert CheckpointFolder(tmp_path, keep=2, compress=True).load_newest()[0]['step'] == 4 and list(kept.steps()) == [3, 4]


def test_torn_gzipped_files(tmp_path):
    draw, path = random.Random(0), save_checkpoint(tmp_path / 'a.pt', state(1, 500), compress=True)
    whole = path.read_bytes()
    for i in range(60):
        spoilt = bytearray(whole[:draw.randrange(2, len(whole))] if i % 2 else whole)
        if not i % 2: spoilt[draw.randrange(12, len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(UserError, match='a.pt'): load_checkpoint(path)
    path.write_bytes(gzip.compress(pickle.dumps(os.getcwd)))
    with pytest.raises(UserError, match='a.pt'): load_checkpoint(path)
