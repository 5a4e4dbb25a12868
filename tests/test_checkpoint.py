"Checkpoints survive a process that dies, a disk that is full and weights that are broken"
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.training import checkpoint
from tts_tuner.training.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint


def state(step, size=4): return dict(step=step, model={'weight': torch.full((size,), float(step))})


def test_kill_while_writing_leaves_a_whole_file(tmp_path):
    writer = textwrap.dedent(f'''
        import torch
        from tts_tuner.training.checkpoint import CheckpointFolder
        kept = CheckpointFolder({str(tmp_path)!r}, keep=2)
        for step in range(1, 10**6): kept.save(dict(step=step, model={{'weight': torch.full((2_000_000,), float(step))}}), best=step % 3 == 0)
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
