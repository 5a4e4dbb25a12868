"""What the promotion policy gives away at 8, 13, 20 and 30 % of the compute, beside fixed rungs, with what each of its rules adds.

    python bench/promotion.py --curves DIR                      # the tasks that are reported
    python bench/promotion.py --curves DIR --name promotion_fit # the tasks the constants were chosen on

DIR holds taskset_*.npz with `valid_loss` [trials, epochs] and `hp` [trials, d] each: learning curves of TaskSet (Metz and others
2020), as redistributed by DyHPO (github.com/releaunifreiburg/DyHPO, Apache-2.0). Draw d of task t takes 100 trials, seeded by (t, d).
The rival at each budget is the best of some 500 ladders of fixed rungs, chosen afterwards on these very draws.
"""
import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import results

from tts_tuner.tuner.promotion import PromotionRule, promotion
from tts_tuner.tuner.replay import Policy, Result, StudyView, Task, hyperband, interval, median_rule, paired, replay, run_to, rungs, top

SHARES = (0.08, 0.13, 0.20, 0.30)
CHOSEN = (0.13, 0.20)  # the budgets at which parts are taken away


def named(policy: Policy, name: str) -> Policy:
    policy.__name__ = name
    return policy


def ladders(n: int, T: int) -> list[Policy]:
    "Fixed rungs of one, two and three steps"
    one = [((e, k),) for e, k in product((1, 2, 3, 4, 5, 6, 8, 10), (1, 2, 3, 5, 8, 10, 15))]
    two = [((e, k), (f, m)) for e, k, f, m in product((1, 2, 3, 4, 5), (15, 20, 25, 30, 40), (6, 9, 12, 16), (2, 3, 5, 10)) if m < k]
    three = [((e, k), (2 * e + 2, k // 3), (6 * e + 2, m)) for e, k, m in product((1, 2, 3, 4), (20, 30, 40, 60), (1, 2, 3))]
    def cost(steps): return (n * steps[0][0] + sum(k * (f - e) for (e, k), f in zip(steps, [e for e, _ in steps[1:]] + [T]))) / (n * T)
    return [rungs(*steps) for steps in one + two + three if 0.05 <= cost(steps) <= max(SHARES)]


def by_settings(weight: float, length: float) -> Policy:
    "Two rungs whose ranks are mixed with what a Gaussian process over the settings (ranks in each column) says of a trial's neighbours"
    def predicted(study: StudyView, alive: list[int], rank: np.ndarray) -> np.ndarray:
        x = study.hp[alive].argsort(0).argsort(0) / max(len(alive) - 1, 1)
        kernel = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / (2 * length**2))
        hat = kernel @ np.linalg.inv(kernel + 0.3 * np.eye(len(alive)))
        off = rank - rank.mean()
        return (hat @ off - np.diag(hat) * off) / (1 - np.diag(hat))  # each without itself

    def policy(study: StudyView) -> None:
        alive = list(range(study.n))
        for epoch, keep in ((3, 25), (9, 5)):
            for i in alive: run_to(study, i, epoch)
            rank = np.argsort(np.argsort([study.seen[i][-1] for i in alive])) / max(len(alive) - 1, 1)
            order = np.argsort(rank + weight * predicted(study, alive, rank), kind='stable')
            alive = [alive[k] for k in order[:keep]]
        for i in alive: run_to(study, i, study.T)
    return named(policy, f'rungs 3>25 9>5, settings {weight:g}')


def row(r: Result, rng: np.random.Generator) -> dict[str, object]:
    low, high = interval(r.regret, rng)
    tasks = [float(r.regret[r.task == t].mean()) for t in np.unique(r.task)]
    return dict(policy=r.name, compute=float(r.compute.mean()), regret=float(r.regret.mean()), low=low, high=high, found=r.found(), worst=r.worst(),
                tasks=tasks)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--curves', type=Path, required=True, help='folder with taskset_*.npz')
    ap.add_argument('--draws', type=int, default=20)
    ap.add_argument('--n', type=int, default=100)
    ap.add_argument('--name', default='promotion')
    a = ap.parse_args()
    files = sorted(a.curves.glob('taskset_*.npz'))
    if not files: sys.exit(f'no taskset_*.npz in {a.curves}')
    tasks = [Task(f.stem, z['valid_loss'].astype(np.float64), z['hp']) for f in files for z in [np.load(f)]]
    ours = [promotion(s) for s in SHARES]
    parts = {'without the plateau': dict(company=1.0), 'without hope': dict(hope=1e9), 'without second looks': dict(looks=False)}
    less = [named(promotion(rule=replace(PromotionRule(share=s), **change)), f'promotion {100 * s:g} % {name}')
            for s in CHOSEN for name, change in parts.items()]
    others = [top(5, 3), top(5, 5), median_rule(), hyperband(), rungs((3, 25), (9, 5)), *(by_settings(w, 1.0) for w in (0.2, 0.5, 1.0))]
    fixed = ladders(a.n, tasks[0].loss.shape[1])
    all_of_them = replay(ours + less + others + fixed, tasks, a.draws, a.n)
    mine, parted = all_of_them[:len(ours)], all_of_them[len(ours):len(ours) + len(less)]
    rest, ladder = all_of_them[len(ours) + len(less):-len(fixed)], all_of_them[-len(fixed):]
    rng, metrics, rows = np.random.default_rng(0), dict[str, float](), [row(r, np.random.default_rng(0)) for r in mine + parted + rest]
    for share, r in zip(SHARES, mine):
        rival = min((x for x in ladder if x.compute.mean() <= share), key=lambda x: float(x.regret.mean()))
        mean, low, high = paired(r, rival, rng)
        at = f'{100 * share:g} %'
        metrics |= {f'{at}: compute': float(r.compute.mean()), f'{at}: regret': float(r.regret.mean()), f'{at}: worst task': r.worst(),
                    f'{at}: best found': r.found(), f'{at}: rungs, regret': float(rival.regret.mean()), f'{at}: rungs, worst task': rival.worst(),
                    f'{at}: difference': mean, f'{at}: difference, lower': low, f'{at}: difference, upper': high}
        rows.append({**row(rival, np.random.default_rng(0)), 'at': at})
    for r in sorted(rows, key=lambda r: float(str(r['compute']))):
        print(f'{r["policy"]:40} {r["compute"]:.3f} {r["regret"]:.4f} ({r["low"]:.4f} to {r["high"]:.4f})  found {r["found"]:.2f}  worst {r["worst"]:.4f}')
    for k, v in metrics.items(): print(f'{k:32} {v:.4f}')
    results.save(a.name, metrics, rows=rows, tasks=[t.name for t in tasks], draws=a.draws, n=a.n, ladders=len(fixed))


if __name__ == '__main__': main()
