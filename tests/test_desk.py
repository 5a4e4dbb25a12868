"Servers that are waited for and ended, and a study looked at from outside while it runs"
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from tts_tuner import desk
from tts_tuner.config.errors import TTSTunerError
from tts_tuner.facts import toy_study
from tts_tuner.status import study_status
from tts_tuner.tuner.book import study_lock, tuner_of

UI = (sys.executable, '-m', 'tts_tuner.cli', 'ui')


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.1)


@pytest.fixture
def start(tmp_path):
    "Starts a desk; those left over are ended with the test"
    begun = []
    def one(*words):
        (tmp_path / 'runs').mkdir(exist_ok=True)
        begun.append(subprocess.Popen([*UI, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]
    yield one
    for process in begun:
        process.kill()
        process.communicate()


def addresses(process) -> list[str]:
    "Addresses, as they are printed once all of them answer"
    found = []
    for line in process.stdout:
        found += [w for w in line.split() if w.startswith('http://')]
        if 'Ctrl-C' in line: return found
    raise AssertionError(process.stderr.read())


def gone(pids) -> bool: return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


def test_both_pages_answer_and_end_with_the_command(start):
    with socket.socket() as taken:
        taken.bind((desk.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start('--mlflow-port', str(port), '--tensorboard-port', str(port))
        mlflow, board = addresses(process)
    assert str(port) not in mlflow + board, 'a port that is taken is not taken twice'
    assert 'MLflow' in urllib.request.urlopen(mlflow).read().decode() and urllib.request.urlopen(board).status == 200
    children = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    listening = {c.laddr.ip for p in children for c in psutil.Process(p).net_connections('tcp') if c.status == 'LISTEN'}
    assert listening == {desk.HOST}, 'nothing listens to the network'
    process.send_signal(signal.SIGINT)
    assert process.wait(20) in (0, 130) and len(children) >= 2
    wait_for(lambda: gone(children), 10)


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux ends children with their parent')
def test_a_killed_desk_leaves_nothing_behind(start):
    process = start('--only', 'tensorboard')
    addresses(process)
    children = [p.pid for p in psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.wait()
    wait_for(lambda: gone(children), 10)


def test_a_server_that_is_slow_is_waited_for_and_one_that_hangs_is_not(tmp_path):
    program = tmp_path / 'slow.py'
    program.write_text('import http.server, sys, time\ntime.sleep(float(sys.argv[2]))\n'
                       "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()")
    port = desk.free_port(18700)
    make = lambda pause: desk.Server('Slow', (sys.executable, str(program), str(port), str(pause)), f'http://{desk.HOST}:{port}', tmp_path / 'log')
    begun = time.monotonic()
    with desk.servers([make(1.0)]): assert time.monotonic() - begun >= 1
    hanging = make(60)
    with pytest.raises(TTSTunerError, match='did not answer within'), desk.servers([hanging], seconds=0.5): pass
    assert hanging.process.poll() is not None


def test_looking_at_a_study_does_not_disturb_it(tmp_path):
    folder = toy_study(tmp_path / 'runs' / 'toy', finished=False)
    with study_lock(folder):
        assert study_status(folder).state == 'running' and tuner_of(folder) == os.getpid()
        before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
        for words in (('status', str(folder)), ('status', str(folder), '--json')):
            done = subprocess.run([sys.executable, '-m', 'tts_tuner.cli', *words], capture_output=True, text=True)
            assert done.returncode == 0 and 't002' in done.stdout, done.stderr
        assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before
    assert study_status(folder).state == 'interrupted'


def test_a_number_that_another_process_has_now_is_not_the_tuner(tmp_path):
    folder = toy_study(tmp_path / 'runs' / 'toy')
    (folder / '.lock').write_text(str(os.getpid()))
    os.utime(folder / '.lock', (1e9, 1e9))  # written long before this process began
    assert tuner_of(folder) is None
    (folder / '.lock').write_text('nobody')
    assert tuner_of(Path(folder)) is None
