"Trainers that hang, freeze, die, are deaf or left behind; tuners killed at any moment; clocks that jump"
import importlib
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
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.training.heartbeat import Heart, process_start, read_beat
from tts_tuner.tuner.book import StudyStopped
from tts_tuner.tuner.fleet import Fleet
from tts_tuner.tuner.lease import Lease, Limits, Signs, look_at, pause_before
from tts_tuner.tuner.trainer_wrapper import (
    Stopping,
    TrainerJob,
    TrainerProcess,
    clear_folder,
    ending_of,
    find_processes,
    find_trainer,
    rotate_log,
    stop_trainers,
    worker_environments,
)
from tts_tuner.tuner.trials import read_status

FAKE = (sys.executable, str(Path(__file__).with_name('fake_trainer.py')))


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.01)


def jobs_in(home, *names, until=60, **options): return [TrainerJob(n, home / n / 'g001', 'c', 'small', {'max_steps': 1000}, until, **options) for n in names]


def starts(home, trial): return [int(n) for n in (home / trial / 'g001' / 'starts').read_text().split()]


def steps(home, trial): return [json.loads(line)['step'] for line in (home / trial / 'g001' / 'metrics.jsonl').read_text().splitlines()]


class Room:
    "A fleet of fakes in a folder, and what it was told"

    def __init__(self, home, workers=2, trainer=FAKE, allowed=5, **options):
        self.home, self.told, self.at = home, [], []
        def restart(job, ended):
            self.told.append((job.trial, ended.reason))
            self.at.append(time.monotonic())
            return len(self.told) <= allowed
        given = dict(poll=0.02, glance=0.05, waits=(0.05, 0.2), patience=(0.5, 0.5, 5.0), stop=lambda: False, tick=lambda working: None) | options
        self.fleet = Fleet([{} for _ in range(workers)], trainer, restart, **given)


# leases

def signs(beat, deeds, step, beats=True): return Signs((7, beat) if beats else None, (deeds * 80, deeds, 0, 0, 0, 0, 7, deeds), step)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.floats(-5, 40)), max_size=60))
def test_whoever_works_keeps_the_lease(looks):
    "Whatever the clock does, a trainer that did something since the last look is never taken for one that hangs"
    lease, now, beat, deeds = Lease(signs(0, 0, 0), 0.0, Limits(5, 10, 20, 3, 8)), 0.0, 0, 0
    for more_beats, more_deeds, passed in looks:
        beat, deeds, now = beat + more_beats, deeds + more_deeds, now + passed
        why = lease.renew(signs(beat, deeds, deeds), now)
        assert not (why and more_deeds)
        if why: return
        assert lease.idle <= max(20, 3 * lease.longest)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.2, 9), st.floats(0.5, 5))
def test_whoever_does_nothing_loses_it_in_time(look, silent):
    "However often one looks: not before the limit, and at the first look after it"
    limits = Limits(silent=silent, stuck=3 * silent, starting=5 * silent, glance=10.0)
    for kind, limit in (('frozen', silent), ('hangs', 3 * silent), ('mute', 3 * silent)):
        beats = kind != 'mute'
        lease = Lease(signs(0, 0, 0, beats), 0.0, limits)
        lease.renew(signs(1, 1, 1, beats), look)
        now, n = look, 2
        while not (why := lease.renew(signs(n if kind == 'hangs' else 1, 1, 1) if beats else signs(1, 1, 1, False), now := now + look)):
            n += 1
            assert now - look <= limit * 1.001 + 1e-9, kind
        assert now - look >= limit * 0.999 and ('frozen' in why) == (kind == 'frozen')


def test_slow_steps_are_given_time():
    lease = Lease(signs(0, 0, 0), 0.0, Limits(silent=1e9, stuck=10, times=5, glance=1e9))
    now = 0.0
    for k, gap in enumerate((1, 1, 8), 1): assert not lease.renew(signs(k, k, k), now := now + gap)
    assert not lease.renew(signs(9, 3, 3), now + 39) and 'did nothing for 41 s after step 3' in lease.renew(signs(10, 3, 3), now + 41)


def test_waits_grow_to_a_ceiling(): assert [pause_before(n) for n in (1, 2, 3, 4, 7, 900)] == [1, 2, 4, 8, 60, 60]


def test_a_beat_names_one_process_only(tmp_path):
    with Heart(tmp_path, 0.01) as heart: heart.did(4)
    beat = read_beat(tmp_path)
    assert beat.lives() and beat.step == 4 and look_at(tmp_path).beat == (os.getpid(), beat.number)
    stranger = subprocess.Popen(['sleep', '60'])
    try: assert not replace(beat, pid=stranger.pid).lives(), 'a number that another program was given'
    finally:
        stranger.kill()
        stranger.wait()
    assert process_start(stranger.pid) == 0 and not replace(beat, pid=stranger.pid).lives() and not replace(beat, boot='another').lives()


def test_a_heart_costs_training_nothing(tmp_path):
    with Heart(tmp_path, 0.01) as heart:
        begin = time.process_time()
        for step in range(20_000): heart.did(step)
        assert (time.process_time() - begin) / 20_000 < 5e-6


# trainers that hang

@pytest.mark.parametrize('kind, said', [('HANG', 'it did nothing'), ('FREEZE', 'no sign of life')])
def test_one_that_hangs_is_ended_and_started_again(tmp_path, monkeypatch, kind, said):
    "With its heart beating or frozen; the other is not held up"
    for name, value in ((f'FAKE_{kind}', 't000@30'), ('FAKE_BEAT', '0.05'), ('FAKE_PACE', '0.005')): monkeypatch.setenv(name, value)
    left = []
    room = Room(tmp_path, limits=Limits(silent=0.6 if kind == 'FREEZE' else 60, stuck=0.6, starting=20), tick=lambda working: left.append(set(working)))
    endings = room.fleet.run(jobs_in(tmp_path, 't000', 't001'), 60)
    assert {e.verdict for e in endings.values()} == {'done'} and [t for t, _ in room.told] == ['t000'] and said in room.told[0][1]
    assert starts(tmp_path, 't000') == [0, 30 if kind == 'FREEZE' else 20], 'a frozen one is woken and saves itself'
    assert steps(tmp_path, 't000') == steps(tmp_path, 't001') == list(range(1, 61)) and {'t000'} in left


def test_one_that_hangs_again_and_again_is_given_up(tmp_path):
    (tmp_path / 'waits.py').write_text('import time\ntime.sleep(99)')
    room = Room(tmp_path, trainer=(sys.executable, str(tmp_path / 'waits.py')), allowed=1, limits=Limits(starting=0.2))
    ended = room.fleet.run(jobs_in(tmp_path, 't000'), 60)['t000']
    assert ended.verdict == 'died' and 'it did nothing' in ended.reason and len(room.told) == 2 and find_trainer(tmp_path / 't000' / 'g001') is None


def test_a_trainer_that_dies_is_noticed_within_two_beats(tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_PACE', '0.01')
    def tick(working):
        if working and not died and read_status(tmp_path / 't000' / 'g001').get('step', 0) >= 20:
            working['t000'].signal(signal.SIGKILL)
            died.append(time.monotonic())
    died, room = [], Room(tmp_path, tick=tick)
    room.fleet.run(jobs_in(tmp_path, 't000'), 60)
    assert room.at[0] - died[0] < 2 * read_beat(tmp_path / 't000' / 'g001').every


def test_restarts_wait_longer_each_time_and_hold_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_PACE', '0.02')
    program = tmp_path / 'dies.py'
    program.write_text(f"import runpy, sys\nif '/t000/' in ' '.join(sys.argv): sys.exit('no memory')\nrunpy.run_path({FAKE[1]!r}, run_name='__main__')")
    room = Room(tmp_path, trainer=(sys.executable, str(program)), waits=(0.2, 0.8))
    began = time.monotonic()
    endings = room.fleet.run(jobs_in(tmp_path, 't000', 't001'), 60)
    gaps = [b - a for a, b in zip(room.at, room.at[1:])]
    assert endings['t000'].verdict == 'died' and 'no memory' in endings['t000'].reason
    assert all(gap >= wait for gap, wait in zip(gaps, (0.2, 0.4, 0.8, 0.8))) and gaps[2] > gaps[0] and len(gaps) == 5
    last = json.loads((tmp_path / 't001/g001/metrics.jsonl').read_text().splitlines()[-1])['time']
    assert last - time.time() + time.monotonic() < began + sum(gaps), 'the other was done before'


def test_progress_begins_the_waits_anew(tmp_path):
    room, [job] = Room(tmp_path, waits=(1.0, 60.0)), jobs_in(tmp_path, 't000')
    job.run_dir.mkdir(parents=True)
    def died_at(saved):
        (job.run_dir / 'status.json').write_text(json.dumps(dict(state='running', step=saved, saved=saved)))
        return room.fleet.wait_for(job)
    assert [died_at(s) for s in (0, 0, 0, 20, 20, 40)] == [1, 2, 4, 1, 2, 1]


def test_stopping_the_study_does_not_wait_for_a_pause(tmp_path):
    room = Room(tmp_path, trainer=(sys.executable, '-c', 'import sys; sys.exit(1)'), waits=(60.0, 60.0), allowed=9)
    room.fleet.stop = lambda: bool(room.told)
    began = time.monotonic()
    with pytest.raises(StudyStopped): room.fleet.run(jobs_in(tmp_path, 't000'), 60)
    assert time.monotonic() - began < 10


# those left behind

@pytest.mark.parametrize('policy, begun', [('adopt', 1), ('end', 2)])
def test_orphans_are_adopted_or_ended(tmp_path, monkeypatch, policy, begun):
    monkeypatch.setenv('FAKE_PACE', '0.01')
    [job] = jobs_in(tmp_path, 't000')
    orphan = TrainerProcess(job, FAKE)
    wait_for(lambda: read_status(job.run_dir).get('step', 0) >= 20)
    room = Room(tmp_path, orphans=policy)
    assert room.fleet.run([job], 60)['t000'].verdict == 'done' and not room.told, 'neither is held against the trial'
    assert len(starts(tmp_path, 't000')) == begun and steps(tmp_path, 't000') == list(range(1, 61)) and not orphan.alive()


def test_one_that_works_for_nobody_any_more_is_ended(tmp_path, monkeypatch):
    "Left by a killed tuner at work on what the next one does not want to know; somebody's own run beside it goes on"
    monkeypatch.setenv('FAKE_PACE', '0.01')
    stray, own = (TrainerProcess(replace(jobs_in(tmp_path, 't009', until=100_000)[0], run_dir=tmp_path / place), FAKE) for place in ('t009/g001', 'mine/try1'))
    wait_for(lambda: all(read_status(p.job.run_dir).get('state') == 'running' for p in (stray, own)))
    assert set(Room(tmp_path).fleet.run(jobs_in(tmp_path, 't000'), 60)) == {'t000'}
    assert not stray.alive() and read_status(stray.job.run_dir)['state'] == 'stopped' and own.alive()
    assert stop_trainers([own], (5, 5, 5)) == []


def test_a_stranger_with_the_number_of_a_dead_trainer_is_left_alone(tmp_path):
    import psutil
    stranger = subprocess.Popen(['sleep', '60'], start_new_session=True)
    try:
        known = psutil.Process(stranger.pid)
        known._ident = (stranger.pid, known._ident[1] - 100.0)  # as if the trainer of this number had started earlier
        adopted = TrainerProcess(jobs_in(tmp_path, 't000')[0], FAKE, adopt=known)
        assert not adopted.alive() and stop_trainers([adopted], (0.1, 0.1, 0.1)) == []
        for number in (signal.SIGINT, signal.SIGKILL): adopted.signal(number)
        time.sleep(0.1)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


FAMILY = '''
import os, sys, time
if not os.fork():  # a rank, or a worker that loads data: the same words, the same group
    time.sleep(99)
time.sleep(99)
'''


def test_what_a_killed_trainer_started_goes_with_it(tmp_path):
    program = (sys.executable, '-c', FAMILY)
    [job] = jobs_in(tmp_path, 't000')
    process = TrainerProcess(job, program)
    wait_for(lambda: len(find_processes(tmp_path).get(job.run_dir.resolve(), [])) == 2)
    assert find_trainer(job.run_dir).pid == process.pid, 'the one that started the other'
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not process.alive())
    wait_for(lambda: not find_processes(tmp_path), 5)
    assert process.exit_code == -signal.SIGKILL and 'SIGKILL' in ending_of(job.run_dir, 60, process.exit_code).reason
    process.signal(signal.SIGKILL)  # to nobody


def test_what_an_adopted_one_left_is_cleared_before_the_next_start(tmp_path):
    [job] = jobs_in(tmp_path, 't000')
    process = subprocess.Popen([sys.executable, '-c', FAMILY, '--run-dir', str(job.run_dir)])
    wait_for(lambda: len(find_processes(tmp_path).get(job.run_dir.resolve(), [])) == 2)
    process.kill()
    process.wait()
    assert clear_folder(job.run_dir) == 1 and find_trainer(job.run_dir) is None and clear_folder(job.run_dir) == 0


def test_the_ladder_of_a_deaf_trainer_ends(tmp_path):
    job = replace(jobs_in(tmp_path, 't000', until=100_000)[0], environment=dict(FAKE_DEAF='1', FAKE_PACE='0.01'))
    process = TrainerProcess(job, FAKE)
    wait_for(lambda: read_status(job.run_dir).get('state') == 'running')
    now = [0.0]
    ladder, sent = Stopping(process, (30, 10, 5), lambda: now[0]), []
    while not ladder.step():
        sent.append((now[0], ladder.sent))
        now[0] += 1
        time.sleep(0.02)
    assert ladder.killed and {n: next(t for t, m in sent if m == n) for n in (1, 2, 3)} == {1: 0, 2: 30, 3: 40}


def test_a_process_that_nothing_ends_is_given_up_with_a_sentence(tmp_path, monkeypatch):
    "As one that waits in the kernel for a disk: signals change nothing"
    monkeypatch.setenv('FAKE_PACE', '0.01')
    monkeypatch.setattr(TrainerProcess, 'signal', lambda self, number: None)
    room = Room(tmp_path, enough=lambda trial: 'enough' if read_status(tmp_path / trial / 'g001').get('step', 0) >= 20 else '', patience=(0.05, 0.05, 0.05))
    [job] = jobs_in(tmp_path, 't000', until=100_000)
    ended = room.fleet.run([job], 100_000)['t000']
    find_trainer(job.run_dir).kill()
    assert ended.verdict == 'failed' and 'cannot be ended' in ended.reason and not room.told


def test_logs_are_kept_over_restarts_and_set_aside_when_large(tmp_path, monkeypatch):
    monkeypatch.setenv('FAKE_CRASH', 't000@33')
    [job] = jobs_in(tmp_path, 't000')
    assert Room(tmp_path).fleet.run([job], 60)['t000'].verdict == 'done'
    log = job.run_dir / 'train.log'
    assert log.read_text().count('$ ') == 2 and '--resume' in log.read_text()
    kept = [log.read_text()]
    for _ in range(2):
        assert rotate_log(job.run_dir, limit=10)
        log.write_text(f'later {len(kept)} and more')
        kept.append(log.read_text())
    assert [(job.run_dir / f'train.log.{n}').read_text() for n in (1, 2)] == kept[:2] and log.read_text() == kept[2]


# several GPUs

def test_shares_of_several_gpus():
    assert [e['CUDA_VISIBLE_DEVICES'] for e in worker_environments(3, 4, 8, ranks=2)] == ['0,1', '2,3', '0,1']
    assert worker_environments('auto', 1, 8, ranks=4) == [{'CUDA_VISIBLE_DEVICES': '0'}], 'more ranks than GPUs see what there is'


@pytest.mark.parametrize('launcher', ['ranks', 'torchrun'])
def test_the_trainer_learns_how_many_ranks(tmp_path, launcher):
    program = tmp_path / 'trainer.py'
    program.write_text('import json, os, pathlib, sys\nfolder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])\n'
                       'with open(folder / "seen", "a") as f: f.write(json.dumps([sys.argv[1:3], os.environ.get("WORLD_SIZE")]) + chr(10))\n'
                       'if os.environ.get("RANK", "0") == "0": (folder / "status.json").write_text(json.dumps(dict(state="paused", step=60)))')
    job = replace(jobs_in(tmp_path, 't000')[0], ranks=2, launcher=launcher)
    assert Room(tmp_path, trainer=(sys.executable, str(program))).fleet.run([job], 60)['t000'].verdict == 'done'
    seen = [json.loads(line) for line in (job.run_dir / 'seen').read_text().splitlines()]
    assert seen == ([[['--ranks', '2'], None]] if launcher == 'ranks' else [[['--corpus', 'c'], '2']] * 2)


# clocks

def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    "The trainer's clock is set back two hours in the middle, the tuner's goes to and fro at every look"
    for name, value in (('FAKE_CLOCK', '7200'), ('FAKE_PACE', '0.005'), ('FAKE_BEAT', '0.05')): monkeypatch.setenv(name, value)
    real, draw = time.time, random.Random(0)
    monkeypatch.setattr(time, 'time', lambda: real() + draw.choice((-86400, 0, 86400)))
    room = Room(tmp_path, limits=Limits(silent=5, stuck=5, starting=20))
    assert room.fleet.run(jobs_in(tmp_path, 't000', 't001'), 60)['t001'].verdict == 'done' and not room.told
    assert starts(tmp_path, 't000') == [0] and steps(tmp_path, 't000') == list(range(1, 61))


def test_numbers_reach_the_tracker_once_whatever_the_clock_says():
    "Set back two hours after step 30; and steps 21 to 40 done again after a kill"
    from tts_tuner.tuner.tracker import thin
    rows = [dict(step=s, time=1e9 + s - (7200 if s > 30 else 0), train_loss=1 / s) for s in range(1, 61)]
    assert [n[3] for n in thin(rows, since=30)] == [40, 50, 60]
    again = rows[:20] + [dict(r, time=1e9 + 900 + r['step']) for r in rows[20:]]
    assert [n[3] for n in thin(again, since=40)] == [50, 60]


# everything at once

def test_ten_kills_at_random(tmp_path, monkeypatch):
    "What `bench/chaos.py` does two hundred times: tuner, watcher and trainers killed, nothing lost, doubled or stuck"
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / 'bench'))
    chaos = importlib.import_module('chaos')
    monkeypatch.setattr(chaos, 'PACE', 0.012)
    found = chaos.attack(tmp_path, kills=10, real=False, seed=4)
    assert found['kills'] == 10 and found['going on after imports, s: median'] < 3
