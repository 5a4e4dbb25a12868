"Atomic writing under a real file-size limit and real kills"
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from tts_tuner.config.errors import TTSTunerError
from tts_tuner.config.files import append_line, write_atomic


@pytest.fixture
def small_disk():
    "At most 10 000 bytes to a file, and no signal when it is reached: a write then fails as on a full disk"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, before)


def test_full_disk_keeps_the_old_file(tmp_path, small_disk):
    path = write_atomic(tmp_path / 'model.pt', b'old')
    with pytest.raises(TTSTunerError, match='No space left to write model.pt.*nothing was lost'): write_atomic(path, b'x' * 50_000)
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_while_appending(tmp_path, small_disk):
    log = tmp_path / 'log.jsonl'
    append_line(log, 'a' * 9_000)
    with pytest.raises(TTSTunerError, match='No space left to write log.jsonl'): append_line(log, 'b' * 9_000)
    assert log.read_text().splitlines()[0] == 'a' * 9_000


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_append_to_a_full_device():
    with pytest.raises(TTSTunerError, match='No space left'): append_line('/dev/full', 'line')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs /dev/full')
def test_devices_and_pipes_are_written_to_and_stay(tmp_path, monkeypatch):
    renamed = []
    monkeypatch.setattr(os, 'replace', lambda *names: renamed.append(names))  # were it called, it would take the device from the machine
    with pytest.raises(TTSTunerError, match='No space left'): write_atomic('/dev/full', 'x')
    write_atomic('/dev/null', 'x')
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, b'through the pipe')
    assert os.read(reader, 100) == b'through the pipe' and not renamed
    os.close(reader)
    with pytest.raises(TTSTunerError, match='directory'): write_atomic(tmp_path, 'x')


def test_a_link_keeps_pointing_to_the_file_behind_it(tmp_path):
    real = write_atomic(tmp_path / 'disk' / 'best.pt', 'old')
    link = tmp_path / 'best.pt'
    link.symlink_to(real)
    assert write_atomic(link, 'new') == link and link.is_symlink() and real.read_text() == 'new'


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(TTSTunerError, match='cannot be written'): write_atomic(tmp_path / 'file' / 'x.txt', 'y')


KILLED_BEFORE_RENAME = '''
import os, signal, sys
from tts_tuner.config import files
files.os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)
files.write_atomic(sys.argv[1], b'new' * 1000)
'''


def test_kill_between_writing_and_renaming(tmp_path):
    path = write_atomic(tmp_path / 'last.pt', b'old')
    p = subprocess.run([sys.executable, '-c', KILLED_BEFORE_RENAME, str(path)])
    assert p.returncode == -signal.SIGKILL
    assert path.read_bytes() == b'old'
    assert write_atomic(path, b'newer').read_bytes() == b'newer'


WRITER = '''
import sys
from tts_tuner.config.files import write_atomic
k = 0
while True:
    k = (k + 1) % 10
    write_atomic(sys.argv[1], str(k).encode() * 300_000)
'''


def test_killed_at_any_moment(tmp_path):
    path = write_atomic(tmp_path / 'last.pt', b'0' * 300_000)
    for wait in (.05, .12, .21):
        p = subprocess.Popen([sys.executable, '-c', WRITER, str(path)])
        while path.read_bytes()[:1] == b'0' and p.poll() is None: time.sleep(.01)
        time.sleep(wait)
        p.kill()
        p.wait()
        data = path.read_bytes()
        assert len(data) == 300_000 and len(set(data)) == 1
        write_atomic(path, b'0' * 300_000)


APPENDER = '''
import sys
from tts_tuner.config.files import append_line
for i in range(100): append_line(sys.argv[1], sys.argv[2] * 500)
'''


def test_two_processes_do_not_mix_lines(tmp_path):
    log = tmp_path / 'log'
    ps = [subprocess.Popen([sys.executable, '-c', APPENDER, str(log), c]) for c in 'ab']
    for p in ps: assert p.wait() == 0
    lines = log.read_text().splitlines()
    assert len(lines) == 200 and all(line in ('a' * 500, 'b' * 500) for line in lines)


def test_permissions_are_kept(tmp_path):
    path = write_atomic(tmp_path / 'f', 'x')
    assert path.stat().st_mode & 0o777 == 0o666 & ~_mask()
    path.chmod(0o640)
    write_atomic(path, 'y')
    assert path.stat().st_mode & 0o777 == 0o640


def _mask():
    m = os.umask(0)
    os.umask(m)
    return m
