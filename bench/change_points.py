"""False alarms and hits of change points on noise that carries over, beside the usual penalty.

    python bench/change_points.py

Share of series without a change in which one is reported, and share of series with a change of four standard deviations in the middle in which
exactly that one is reported, within two points. The usual penalty is 2 sigma^2 ln n with the true sigma; s is the strength of ours.
"""
import argparse

import numpy as np
import results
import ruptures

from tts_tuner.signals.change_points import ChangePoints, change_points
from tts_tuner.signals.whitening import carried_noise


def usual(y: np.ndarray) -> tuple[int, ...]:
    "Change points by the penalty of white noise of variance one"
    return tuple(ruptures.KernelCPD(kernel='linear', min_size=5).fit(y).predict(pen=2 * np.log(len(y)))[:-1])


def ours(y: np.ndarray, **settings: float | str) -> tuple[int, ...]:
    "Change points found together with the noise"
    found = change_points(y, **settings)  # type: ignore[arg-type]
    assert isinstance(found, ChangePoints)
    return found.indices


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--series', type=int, default=200, help='of each kind')
    a = ap.parse_args()
    rng = np.random.default_rng(0)
    metrics: dict[str, float] = {}
    for n in (60, 200):
        for phi in (0.0, 0.5, 0.9, 0.98):
            noise = carried_noise(phi, (a.series, n), rng)
            readers = {'usual penalty': usual, 's 1': lambda y: ours(y, strength=1.0), 's 1.5': ours}
            for name, read in readers.items():
                metrics[f'false alarms, n {n}, phi {phi:g}: {name}'] = float(np.mean([bool(read(y)) for y in noise]))
                moved = noise + 4.0 * (np.arange(n) >= n // 2)
                hit = [len(cuts := read(y)) == 1 and abs(cuts[0] - n // 2) <= 2 for y in moved]
                metrics[f'found exactly, n {n}, phi {phi:g}: {name}'] = float(np.mean(hit))
            lines = noise + 0.05 * np.arange(n)
            if n == 60: metrics[f'false alarms, n {n}, phi {phi:g}: lines, s 1.5'] = float(np.mean([bool(ours(y, kind='line')) for y in lines]))
    for name, value in metrics.items(): print(f'{name:60} {value:.3f}')
    results.save('change_points', metrics)


if __name__ == '__main__': main()
