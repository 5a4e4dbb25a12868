"""What the engine adds to the bare search library: one ask and one tell with 13 parameters, in studies of 100 and 1,000 trials.

    python bench/ask_tell.py

The same journal of finished trials is continued twice, by turns in one process: by Optuna alone (its own journal, TPE, `study.ask`
with the space, one `report`, `study.tell`) and by OptEngine (`ask`, `trials`, one `report`, `tell`). Medians of 30 trials each, in
milliseconds of wall clock and of processor time; the machine may be shared, so the difference is what counts, not either number.
Goal: at most 2 ms more at 100 trials and 5 ms more at 1,000. With `--memory` also how much the process grows over 1,000 trials
(goal: less than 10 MB), for both, in processes of their own.
"""
import argparse
import gc
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import results
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial

from tts_tuner.config.dimension import Dimension
from tts_tuner.tuner.engine import SearchPlan
from tts_tuner.tuner.opt_engine import OptEngine
from tts_tuner.tuner.space import to_distribution

SPACE = {f'x{i}': Dimension(type='uniform', low=0, high=1) for i in range(6)} | {f'y{i}': Dimension(type='loguniform', low=1e-5, high=1e-1) for i in range(3)} \
    | {f'n{i}': Dimension(type='int', low=1, high=64) for i in range(2)} | {f'c{i}': Dimension(type='choice', choices=('a', 'b', None)) for i in range(2)}
PLAN = SearchPlan('bench', SPACE, {}, n_startup=15)
DRAW = {name: to_distribution(d) for name, d in SPACE.items()}


def score(params: dict[str, Any]) -> float:
    "Any smooth function of the point"
    return 1 - sum((params[f'x{i}'] - 0.3) ** 2 for i in range(6)) / 6 - 0.1 * (params['c0'] == 'a')


def bare(path: Path) -> Any:
    "The library alone, on its own journal"
    return optuna.create_study(study_name='bench', storage=JournalStorage(JournalFileBackend(str(path))), direction='maximize', load_if_exists=True,
                               sampler=optuna.samplers.TPESampler(n_startup_trials=15, seed=1), pruner=optuna.pruners.NopPruner())


def one_bare(study: Any) -> None:
    "One trial of the library alone"
    trial = study.ask(DRAW)
    trial.report(0.5, 40)
    study.tell(trial, score(trial.params))


def one_ours(engine: OptEngine) -> None:
    "One trial of the engine"
    number = len(engine.trials())
    engine.ask(number + 1)
    trial = engine.trials()[number]
    engine.report(number, 40, 0.5)
    engine.tell(number, 'complete', score(trial.params))


def timed(step: Callable[[], None]) -> tuple[float, float]:
    "Milliseconds of wall clock and of processor time"
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def compare(trials: int, folder: Path, repeats: int) -> dict[str, float]:
    "Medians at a study of so many trials"
    draw, first = random.Random(trials), folder / f'{trials}.journal'
    study = bare(first)
    for _ in range(trials):
        params = {f'x{i}': draw.random() for i in range(6)} | {f'y{i}': 10 ** draw.uniform(-5, -1) for i in range(3)} \
            | {f'n{i}': draw.randint(1, 64) for i in range(2)} | {f'c{i}': draw.choice(('a', 'b', None)) for i in range(2)}
        study.add_trial(create_trial(state=TrialState.COMPLETE, params=params, distributions=DRAW, value=score(params)))
    other = Path(shutil.copy(first, folder / f'{trials}.ours.journal'))
    study, engine = bare(first), OptEngine(PLAN, other)
    one_bare(study)
    one_ours(engine)
    times: dict[str, list[tuple[float, float]]] = dict(bare=[], ours=[])
    gc.disable()
    for _ in range(repeats):
        times['bare'].append(timed(lambda: one_bare(study)))
        times['ours'].append(timed(lambda: one_ours(engine)))
    gc.enable()
    middle = {f'{who}_{what}_ms': statistics.median(t[i] for t in times[who]) for who in times for i, what in enumerate(('wall', 'processor'))}
    more = {f'more_{what}_ms': middle[f'ours_{what}_ms'] - middle[f'bare_{what}_ms'] for what in ('wall', 'processor')}
    for name, value in {**middle, **more}.items(): print(f'{trials:5} trials  {name:20} {value:7.2f}')
    return {f'{name.removesuffix("_ms")}_at_{trials}_ms': value for name, value in {**middle, **more}.items()}


def grow(who: str, trials: int) -> None:
    "Print the growth of this process over so many trials, in MB, after 100 to warm up"
    with tempfile.TemporaryDirectory() as folder:
        study: Any = bare(Path(folder) / 'j') if who == 'bare' else OptEngine(PLAN, Path(folder) / 'j')
        step = one_bare if who == 'bare' else one_ours
        for n in range(100 + trials):
            if n == 100: gc.collect(); before = psutil.Process(os.getpid()).memory_info().rss
            step(study)
        gc.collect()
        print((psutil.Process(os.getpid()).memory_info().rss - before) / 2**20)


def main() -> None:
    "Measure and save"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=30, help='trials timed at each length')
    parser.add_argument('--memory', action='store_true', help='also the growth over 1,000 trials (two minutes)')
    parser.add_argument('--grow', choices=('bare', 'ours'), help=argparse.SUPPRESS)
    parser.add_argument('--trials', type=int, default=1000, help=argparse.SUPPRESS)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if args.grow: return grow(args.grow, args.trials)
    with tempfile.TemporaryDirectory() as folder:
        metrics = compare(100, Path(folder), args.repeats) | compare(1000, Path(folder), args.repeats)
    if args.memory:
        for who in ('bare', 'ours'):
            out = subprocess.run([sys.executable, __file__, '--grow', who], capture_output=True, text=True, check=True).stdout
            metrics[f'{who}_growth_mb'] = float(out.split()[-1])
            print(f'{who} grows by {metrics[f"{who}_growth_mb"]:.1f} MB over 1,000 trials')
    results.save('ask_tell', metrics)


if __name__ == '__main__': main()
