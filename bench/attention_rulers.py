"""How much sooner the batch rulers of attention are done than one map after the other, and how far the two and the torch twin differ.

    python bench/attention_rulers.py

Processor time, the least of eleven repeats taken in turns; random maps whose lengths lie between half and all of the size. Ratios, so that a
busy machine matters little.
"""
import argparse
import time
from collections.abc import Callable
from dataclasses import astuple

import numpy as np
import results
import torch

from tts_tuner.quality.alignment import score_alignment
from tts_tuner.quality.attention_batch import pad_maps, score_batch
from tts_tuner.training.attention_twin import twin_scores

SIZES = ((20, 45, 30), (64, 60, 40), (32, 200, 100), (16, 800, 150))  # sentences, steps, tokens


def fastest(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    "Least processor time of each job, seconds"
    found = dict.fromkeys(jobs, float('inf'))
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            found[name] = min(found[name], time.process_time() - start)
    return found


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--repeats', type=int, default=11)
    a = ap.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    metrics: dict[str, float] = {}
    for B, T, N in SIZES:
        maps = [rng.dirichlet(np.full(int(n), 0.3), int(t)) for t, n in zip(rng.integers(T // 2, T + 1, B), rng.integers(N // 2, N + 1, B))]
        A, steps, tokens = pad_maps(maps)
        there = torch.from_numpy(A)
        spent = fastest({'one by one': lambda: [score_alignment(m) for m in maps], 'batch': lambda: score_batch(A, steps, tokens),  # noqa: B023  run at once
                         'torch': lambda: twin_scores(there, steps, tokens).numpy()}, a.repeats)  # noqa: B023
        ours = np.stack(astuple(score_batch(A, steps, tokens)), 1)
        alone = np.array([astuple(score_alignment(m)) for m in maps])
        twin = np.stack(astuple(twin_scores(there, steps, tokens).numpy()), 1)
        size = f'{B} maps of up to {T} x {N}'
        metrics |= {f'{size}: times as fast as one by one': round(spent['one by one'] / spent['batch'], 2),
                    f'{size}: torch twin on a processor, the same': round(spent['one by one'] / spent['torch'], 2),
                    f'{size}: milliseconds': round(1e3 * spent['batch'], 2), f'{size}: largest difference': float(np.abs(ours - alone).max()),
                    f'{size}: largest difference, torch': float(np.abs(ours - twin).max())}
    for name, value in metrics.items(): print(f'{name:70} {value:.3g}')
    results.save('attention_rulers', metrics)


if __name__ == '__main__': main()
