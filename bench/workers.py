"""Many workers on one study at once: how many trials are lost, given twice or left running, and how fast it goes.

    python bench/workers.py

Each worker is a process that claims 10 trials of 13 parameters, draws them by chance, reports five times to each and tells it. By turns: our
engine with its journal and with SQLite, and Optuna alone with its default SQLite storage and with its journal. Lost is what was not
finished with its own result; twice is a number or a point that two workers were given. Goal: nothing lost by ours with 16 workers
(the default SQLite storage loses one to five trials in 160). The folder should lie on a real disk (`--folder`).
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import results
from ask_tell import DRAW, PLAN, score
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from tts_tuner.tuner.opt_engine import OptEngine

KINDS = dict(ours_journal='our engine, its journal', ours_sqlite='our engine, SQLite', optuna_journal='Optuna alone, its journal',
             optuna_sqlite='Optuna alone, default SQLite')


def open_study(kind: str, folder: Path) -> Any:
    "Engine, or study of the library"
    if kind == 'ours_journal': return OptEngine(replace(PLAN, sampler='random'), folder / 'study.journal')
    if kind == 'ours_sqlite': return OptEngine(replace(PLAN, sampler='random'), f'sqlite:///{folder}/study.db')
    storage = JournalStorage(JournalFileBackend(str(folder / 'study.journal'))) if kind == 'optuna_journal' else f'sqlite:///{folder}/study.db'
    return optuna.create_study(study_name='bench', storage=storage, direction='maximize', load_if_exists=True, sampler=optuna.samplers.RandomSampler())


def work(kind: str, folder: Path, rounds: int) -> None:
    "One worker: print number and point of every trial it brought to an end, and the slowest operation"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    done, slowest, errors = [], 0.0, 0
    study = open_study(kind, folder)
    print('ready', flush=True)
    sys.stdin.readline()
    for _ in range(rounds):
        begun = time.perf_counter()
        try:
            trial = study.claim() if kind.startswith('ours') else study.ask(DRAW)
            for step in range(5):
                if kind.startswith('ours'): study.report(trial.number, step, 0.1 * step)
                else: trial.report(0.1 * step, step)
            if kind.startswith('ours'): study.tell(trial.number, 'complete', score(trial.params))
            else: study.tell(trial, score(trial.params))
            done.append((trial.number, score(trial.params)))
        except Exception as e:  # the trial is lost; that is what is counted
            errors += 1
            print(f'{type(e).__name__}: {str(e).splitlines()[0][:100]}', file=sys.stderr)
        slowest = max(slowest, time.perf_counter() - begun)
    print(json.dumps(dict(done=done, slowest=slowest, errors=errors)))


def measure(kind: str, folder: Path, workers: int, rounds: int) -> dict[str, float]:
    "All workers at once on one study"
    folder.mkdir()
    open_study(kind, folder)
    command = [sys.executable, __file__, '--worker', kind, '--folder', str(folder), '--rounds', str(rounds)]
    crew = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(workers)]
    for p in crew: assert p.stdout and p.stdout.readline() == 'ready\n'
    begun = time.perf_counter()
    for p in crew:
        assert p.stdin
        p.stdin.write('go\n')
        p.stdin.flush()
    told = [json.loads(p.communicate()[0]) for p in crew]
    seconds = time.perf_counter() - begun
    done = [tuple(d) for t in told for d in t['done']]
    found = open_study(kind, folder)
    trials = found.trials() if kind.startswith('ours') else found.trials
    kept = {(t.number, t.value) for t in trials if t.value is not None}
    running = sum(str(getattr(t.state, 'name', t.state)).lower() == 'running' for t in trials)
    twice = 2 * len(done) - len({n for n, _ in done}) - len({s for _, s in done})
    out = dict(lost=workers * rounds - len(kept & set(done)), twice=twice, stuck=running, trials_a_second=len(done) / seconds,
               slowest_seconds=max(t['slowest'] for t in told))
    print(f'{KINDS[kind]:30} lost {out["lost"]:3}  twice {out["twice"]:3}  left running {running:3}  {out["trials_a_second"]:6.1f} trials/s  '
          f'slowest {out["slowest_seconds"]:5.1f} s')
    return {f'{kind}_{name}': value for name, value in out.items()}


def main() -> None:
    "Measure and save"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workers', type=int, default=16, help='processes')
    parser.add_argument('--rounds', type=int, default=10, help='trials of each')
    parser.add_argument('--folder', type=Path, help='where the studies are made; a temporary folder by default')
    parser.add_argument('--worker', choices=tuple(KINDS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return work(args.worker, args.folder, args.rounds)
    metrics: dict[str, float] = dict(workers=args.workers, trials=args.workers * args.rounds)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in KINDS: metrics |= measure(kind, Path(folder) / kind, args.workers, args.rounds)
    results.save('workers', metrics)


if __name__ == '__main__': main()
