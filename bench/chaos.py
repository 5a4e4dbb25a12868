"""A study under SIGKILL: tuner, watcher and trainers killed at random moments, again and again, until so many kills are done.

    python bench/chaos.py --kills 200              # over a stand-in for the trainer, about 6 minutes on two cores
    python bench/chaos.py --kills 20 --real        # over a real trainer of a very small model, about 4 minutes

Studies are run one after the other. After each of them: every trial is there and has ended, none is there twice, no decision
that was ever on record is lost or altered, every trial's metrics hold each step once and in order, nobody is left at work, and
the decisions are those of the same study left in peace. A watcher, a process of its own, keeps all metrics in a store; it has
each point once. The time to going on counts from the end of the tuner's imports to the first trainer at work, started or adopted;
imports are counted apart.
"""
import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).resolve().parents[1]
FAKE = (sys.executable, str(ROOT / 'tests' / 'fake_trainer.py'))
TINY = ('frontend=characters,n_mels=20,symbols_embedding_dim=16,encoder_embedding_dim=16,encoder_n_convolutions=1,attention_rnn_dim=24,attention_dim=8,'
        'attention_location_n_filters=4,attention_location_kernel_size=5,decoder_rnn_dim=24,prenet_dim=16,postnet_embedding_dim=8,'
        'postnet_n_convolutions=2,bucket_batches=2,n_validation=4,n_free_running=2,max_decoder_steps=80,device=cpu,'
        'max_steps=60,eval_every=20,checkpoint_every=10')
PACE = 0.03  # seconds a step of the stand-in takes
WEIGHTS = dict(tuner=3, trainer=3, watcher=2, everything=2)  # how often each is the victim


def drive(config: Path, notes: Path, real: bool) -> None:
    "A tuner, as a process of its own that notes how far it is"
    def note(word: str) -> None:
        with open(notes, 'a') as f: f.write(f'{word} {time.monotonic()} {time.process_time()}\n')
    note('begun')
    import optuna  # noqa: F401  # what a study imports before it does anything
    import psutil  # noqa: F401

    from tts_tuner.config.settings import load_settings
    from tts_tuner.tuner.loop import Data, prepare_data, run_study
    from tts_tuner.tuner.trainer_wrapper import TRAINER
    from tts_tuner.tuner.trials import PlainView
    if real: import tts_tuner.data.features  # noqa: F401
    note('imported')

    class View(PlainView):
        going = False

        def say(self, text: str) -> None: ...

        def update(self, rows: Any) -> None:
            if not self.going and any(r.state == 'running' for r in rows):
                self.going = True
                note('going')
    kind = dict(trainer=TRAINER, prepare=prepare_data) if real else dict(trainer=FAKE, prepare=lambda s, say: Data('corpus', 'abc'))
    run_study(load_settings(config), View(), poll=0.05, **kind)
    note('done')


def watch(folder: Path) -> None:
    "A watcher, as a process of its own: keeps all metrics of a study as they grow"
    from tts_tuner.tuner.metrics_store import MetricsStore
    watcher = watching(MetricsStore(folder / 'watched.db'))
    while True:
        look(watcher, folder)
        time.sleep(0.05)


def watching(store: Any) -> Any:
    "A watcher that goes on where the last one was"
    from tts_tuner.tuner.log_watcher import LogWatcher
    return LogWatcher(store, say=lambda text: None)


def look(watcher: Any, folder: Path) -> None:
    from tts_tuner.tuner.log_watcher import sources_of
    for source in sources_of(folder): watcher.add(source)
    watcher.poll()


class Victim:
    "One study with all its processes"

    def __init__(self, home: Path, settings: Any, real: bool) -> None:
        from tts_tuner.config.settings import save_settings
        self.settings, self.real, self.folder = settings, real, settings.folder
        self.config, self.notes = home / f'{settings.study}.yaml', home / f'{settings.study}.notes'
        save_settings(self.config, settings)
        self.tuner = self.begin()
        self.watcher = self.spawn('--watch', str(self.folder))
        self.kept: dict[str, list[bytes]] = {}

    def spawn(self, *words: str) -> subprocess.Popen[str]:
        env = {**os.environ, 'FAKE_PACE': str(PACE)}
        return subprocess.Popen([sys.executable, __file__, *words], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def begin(self) -> subprocess.Popen[str]:
        self.notes.write_text('')
        return self.spawn('--drive', str(self.config), '--notes', str(self.notes), *(['--real'] if self.real else []))

    def noted(self) -> dict[str, tuple[float, float]]:  # seconds of the clock, and of the processor
        lines = [line.split() for line in self.notes.read_text().splitlines(keepends=True) if line.endswith('\n')]
        return {word: (float(clock), float(busy)) for word, clock, busy in lines}

    def trainers(self) -> dict[Path, int]:
        from tts_tuner.tuner.trainer_wrapper import find_processes
        return {folder: group[0].pid for folder, group in find_processes(self.folder).items()}

    def remember(self) -> None:
        "Whole lines that are on record now must be on record for ever, in this order"
        for name in ('decisions.jsonl', 'study.journal'):
            path = self.folder / name
            whole = path.read_bytes() if path.exists() else b''
            lines = whole[:whole.rfind(b'\n') + 1].splitlines()
            before = self.kept.get(name, [])
            assert lines[:len(before)] == before, f'{name} of {self.folder.name} has lost or altered lines'
            self.kept[name] = lines

    def over(self) -> bool:
        "Has the tuner ended its study?"
        if self.tuner.poll() is None: return False
        if self.tuner.returncode: sys.exit(f'{self.settings.study}: the tuner ended with {self.tuner.returncode}: {self.tuner.communicate()[1]}')
        return True

    def close(self) -> None:
        for process in (self.tuner, self.watcher):
            if process.poll() is None: process.kill()
            process.wait()
        for pid in self.trainers().values():
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)


def until(condition: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end: sys.exit(f'waited {seconds:g} s in vain: {what}')
        time.sleep(0.01)


def kill(victim: Victim, kind: str, draw: random.Random, seen: dict[str, list[float]]) -> str:  # what was killed in the end
    "Kill, start again what nobody else starts again, and take the time until the study goes on"
    at_work = victim.trainers()
    if kind == 'trainer' and not at_work: kind = 'tuner'
    if kind == 'watcher':
        victim.watcher.kill()
        victim.watcher.communicate()
        victim.watcher = victim.spawn('--watch', str(victim.folder))
        return kind
    struck = [draw.choice(sorted(at_work))] if kind == 'trainer' else sorted(at_work) if kind == 'everything' else []
    if kind != 'trainer':
        victim.tuner.kill()
        victim.tuner.communicate()
    for folder in struck:
        with contextlib.suppress(ProcessLookupError): os.kill(at_work[folder], signal.SIGKILL)
    victim.remember()
    begun = time.monotonic()
    if kind == 'trainer':
        until(lambda: victim.trainers().get(struck[0], at_work[struck[0]]) != at_work[struck[0]] or victim.tuner.poll() is not None, 120, 'a new trainer')
        if victim.tuner.poll() is None: seen['trainer replaced'].append(time.monotonic() - begun)
        return kind
    victim.tuner = victim.begin()
    until(lambda: victim.noted().keys() & {'going', 'done'} or victim.over(), 120, 'the tuner to go on')
    noted = victim.noted()
    clock, busy = min(noted[w] for w in ('going', 'done') if w in noted)
    seen['going on after imports'].append(clock - noted['imported'][0])
    seen['processor time of that'].append(busy - noted['imported'][1])
    seen['imports'].append(noted['imported'][0] - begun)
    return kind


def essence(folder: Path) -> list[tuple[Any, ...]]:
    "Decisions that do not depend on who was killed"
    from tts_tuner.config.contracts import read_decisions
    return [(d.kind, d.subject, d.step, d.reason) for d in read_decisions(folder / 'decisions.jsonl') if d.kind != 'restart']


def check_watched(folder: Path) -> int:  # points
    "What the watchers kept is what was written, each point once and in order"
    from tts_tuner.tuner.metrics_store import MetricsHistory, MetricsStore
    store = MetricsStore(folder / 'watched.db')
    look(watching(store), folder)  # what was written last
    store.close()
    kept = {(s.run, s.name): list(zip(s.steps.tolist(), s.values.tolist())) for s in MetricsHistory(folder / 'watched.db').window()}
    written: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for path in folder.glob('t*/g*/metrics.jsonl'):
        for row in map(json.loads, path.read_text().splitlines()):
            for k in row.keys() - {'step', 'time'}: written.setdefault((str(path.parent.relative_to(folder)), k), []).append((row['step'], row[k]))
    assert kept == written, f'the watcher kept other points than were written in {folder.name}'
    return sum(map(len, kept.values()))


def check(victim: Victim, peace: Path) -> None:
    "What must hold of a study that was disturbed; AssertionError when it does not"
    from tts_tuner.config.contracts import read_decisions
    from tts_tuner.tuner.engines import open_engine
    victim.remember()
    folder, settings = victim.folder, victim.settings
    trials = open_engine(settings, read_only=True).trials()
    assert [t.name for t in trials] == [f't{n:03d}' for n in range(settings.n_trials)], f'trials lost or doubled: {[t.name for t in trials]}'
    assert all(t.state in ('complete', 'pruned', 'fail') for t in trials), f'stuck: {[(t.name, t.state) for t in trials]}'
    decisions = [replace(d, time=None) for d in read_decisions(folder / 'decisions.jsonl')]
    assert all(d not in decisions[:k] for k, d in enumerate(decisions)), 'a decision is on record twice'
    for t in trials:
        steps = [json.loads(line)['step'] for line in (folder / t.name / 'g001' / 'metrics.jsonl').read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)), f'{t.name} counts steps twice or leaves some out'
    assert not victim.trainers(), 'somebody is left at work'
    check_watched(folder)
    assert essence(folder) == essence(peace), f'other decisions than in peace: {essence(folder)} instead of {essence(peace)}'


def settings_of(home: Path, name: str, seed: int, real: bool) -> Any:
    from tts_tuner.config.settings import load_settings
    common = dict(study=name, runs=str(home / 'runs'), seed=seed, workers=2, restarts=10_000, tracking=dict(enabled=False))
    if real: return load_settings(**common, corpus=str(home / 'corpus'), data=str(home / 'data'), hparams=TINY, trials=3, rungs=dict(steps=[20, 40]))
    return load_settings(**common, hparams='max_steps=200,device=cpu', trials=4, rungs=dict(steps=[40, 120]))


def studies(home: Path, real: bool) -> Iterator[tuple[Any, Path]]:
    "Settings of study after study, and the same study in peace"
    peace: dict[int, Path] = {}
    for number in range(10_000):
        seed = number % (1 if real else 3)
        if seed not in peace:
            quiet = Victim(home, settings_of(home, f'peace{seed}', seed, real), real)
            until(quiet.over, 280, 'a study in peace')
            quiet.close()
            peace[seed] = quiet.folder
        yield settings_of(home, f'study{number}', seed, real), peace[seed]


def attack(home: Path, kills: int, real: bool, seed: int) -> dict[str, float]:
    "Kill until `kills` is reached and the last study has ended"
    draw, counts = random.Random(seed), dict.fromkeys(WEIGHTS, 0)
    seen = {k: list[float]() for k in ('going on after imports', 'processor time of that', 'imports', 'trainer replaced')}
    done = trials = 0
    for settings, peace in studies(home, real):
        victim = Victim(home, settings, real)
        try:
            while not victim.over():
                pause = time.monotonic() + draw.uniform(0.05, 8.0 if real else 0.8)
                while time.monotonic() < pause and not victim.over(): time.sleep(0.01)
                if victim.over() or sum(counts.values()) >= kills: until(victim.over, 280, f'the end of {settings.study}')
                else: counts[kill(victim, draw.choices(*zip(*WEIGHTS.items()))[0], draw, seen)] += 1
            check(victim, peace)
        finally: victim.close()
        done, trials = done + 1, trials + settings.n_trials
        print(f'{settings.study}: whole, {sum(counts.values())} kills so far')
        if sum(counts.values()) >= kills: break
    found: dict[str, float] = {'kills': sum(counts.values()), **{f'kills of {k}': n for k, n in counts.items()}, 'studies': done, 'trials': trials,
                               'trials lost': 0, 'trials doubled': 0, 'trials stuck': 0, 'steps counted twice': 0, 'decisions other than in peace': 0,
                               'points lost or doubled by the watcher': 0}
    for what, values in seen.items():
        if values: found |= {f'{what}, s: median': round(statistics.median(values), 2), f'{what}, s: longest': round(max(values), 2)}
    found['going on within 3 s of imports, %'] = round(100 * statistics.mean(s <= 3 for s in seen['going on after imports'] or [0.0]), 1)
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--kills', type=int, default=200)
    ap.add_argument('--real', action='store_true', help='over the real trainer')
    ap.add_argument('--seed', type=int, default=0)
    ap.add_argument('--dry', action='store_true', help='write no results')
    for name in ('--drive', '--notes', '--watch'): ap.add_argument(name, type=Path, help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.drive: return drive(a.drive, a.notes, a.real)
    if a.watch: return watch(a.watch)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        if a.real:
            from tts_tuner.data.demo import make_tone_corpus
            make_tone_corpus(home / 'corpus', n=24, seed=0)
        began = time.monotonic()
        found = attack(home, a.kills, a.real, a.seed)
        found['minutes'] = round((time.monotonic() - began) / 60, 1)
    for k, v in found.items(): print(f'{v:8g}  {k}')
    if not a.dry: results.save('studies under SIGKILL', found, file='chaos_real' if a.real else 'chaos')


if __name__ == '__main__': main()
