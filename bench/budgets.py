"""What each pruner of the tuner saves and loses on recorded curves, beside Optuna's pruners of the same names.

    python bench/budgets.py --curves DIR            # about 5 minutes
    python bench/budgets.py --curves DIR --draws 2  # a try

DIR holds taskset_*.npz (`valid_loss` [trials, epochs]: TaskSet, Metz and others 2020, as redistributed by DyHPO, Apache-2.0).
Ours are played by the climb that runs studies, one step an epoch, with the usual settings; resources count from 1 to the 51 epochs
of a trial, those of bohb as its block says, 10 to 100. Optuna's pruners stop trials and do not continue them; they are asked after
each epoch. Draw d of task t takes n trials, seeded by (t, d), the same for every pruner: 6 are those of a small study, 20 and 100
those of larger ones. Regret: 0 where the best trial was found, 1 where what was found is no better than the median trial.
Intervals of 95 % by bootstrap. A replay has no sampler, so what it says is about stopping alone.
"""
import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results
from rich.console import Console

from tts_tuner.tuner.budgets import PRUNERS, Ladder
from tts_tuner.tuner.climb import as_policy
from tts_tuner.tuner.histories import read_npz
from tts_tuner.tuner.policies import policy_of
from tts_tuner.tuner.replay import Policy, Result, StudyView, Task, interval, replay, table


def ours(pruner: str) -> Policy:
    "A pruner of the tuner with its usual settings"
    def rule(T: int) -> Ladder: return Ladder(T, pruner=pruner, min_resource=10 if pruner == 'bohb' else 1, max_resource=100 if pruner == 'bohb' else T)
    return as_policy(rule, pruner)


def optunas(name: str, make: Callable[[int], Any]) -> Policy:
    "A pruner of Optuna, asked after every epoch"
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def policy(study: StudyView) -> None:
        theirs = optuna.create_study(study_name='replay', direction='minimize', pruner=make(study.T))
        for i in range(study.n):
            trial, state = theirs.ask(), optuna.trial.TrialState.COMPLETE
            for epoch in range(1, study.T + 1):
                trial.report(study.advance(i), epoch)
                if not trial.should_prune(): continue
                state = optuna.trial.TrialState.PRUNED
                break
            best = min(study.seen[i])
            theirs.tell(trial, best if state.name == 'COMPLETE' and math.isfinite(best) else None,
                        state if state.name == 'PRUNED' or math.isfinite(best) else optuna.trial.TrialState.FAIL)
    policy.__name__ = f'Optuna {name}'
    return policy


def rivals() -> list[Policy]:
    "Optuna's pruners"
    from optuna.pruners import HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
    return [optunas('hyperband', lambda T: HyperbandPruner(1, T, 3)), optunas('successive_halving', lambda T: SuccessiveHalvingPruner(1, 3)),
            optunas('median', lambda T: MedianPruner(5, 5))]


def figures(r: Result, n: int) -> dict[str, float]:
    "Metrics of a pruner"
    low, high = interval(r.regret, np.random.default_rng(0))
    values = dict(compute=float(r.compute.mean()), regret=float(r.regret.mean()), low=low, high=high, found=r.found(), worst=r.worst())
    return {f'{n} trials, {r.name}: {k}': v for k, v in values.items()}


def played(tasks: list[Task], n: int, draws: int) -> dict[str, float]:
    "All pruners on studies of n trials; the table"
    policies = [*map(ours, PRUNERS), *rivals(), policy_of('promotion:0.13')]
    def said(done: int, of: int) -> None: print(f'\r{n} trials: {100 * done // of} %', end='', file=sys.stderr, flush=True)
    found = replay(policies, tasks, draws, n, said)
    print(file=sys.stderr)
    print(f'\n{n} trials, {draws} draws of each of {len(tasks)} tasks; "promotion 13 %" looks after every epoch and at all trials together')
    Console(width=130).print(table(found, np.random.default_rng(0)))
    return {k: v for r in found for k, v in figures(r, n).items()}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--curves', type=Path, required=True, help='folder with taskset_*.npz')
    ap.add_argument('--draws', type=int, default=20)
    a = ap.parse_args()
    files = sorted(a.curves.glob('taskset_*.npz'))
    if not files: sys.exit(f'no taskset_*.npz in {a.curves}')
    tasks = [read_npz(f) for f in files]
    metrics = {k: v for n in (6, 20, 100) for k, v in played(tasks, n, a.draws).items()}
    results.save('budgets', metrics, tasks=[f.stem for f in files], draws=a.draws)


if __name__ == '__main__': main()
