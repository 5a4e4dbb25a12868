"""How often does each detector fire for nothing, and how often does it see what is there?

    python bench/false_alarms.py --series 2000

Noise of which a share phi is carried over from each point to the next (AR(1), standard deviation 1). Trend tests: 200 points,
tested at 5 %, without a trend and with a slope of 0.01 sigma a point; the test in use also at other lengths, with a heavy tail
and with a curve that has flattened. Detectors of a change: average number of points between false alarms, all designed for 500,
raw and whitened by the true phi, by a reference of 200 points and of 50.
"""
import argparse
import time

import numpy as np
import results

from tts_tuner.signals.cusum import CusumDesign, design_for
from tts_tuner.signals.mann_kendall import MannKendall, mann_kendall
from tts_tuner.signals.page_hinkley import PageHinkleyDesign
from tts_tuner.signals.series import Abstention
from tts_tuner.signals.streaming import StreamingMannKendall
from tts_tuner.signals.trend import Trend, hamed_rao, prewhitened, trend, trend_free_prewhitened, yue_wang
from tts_tuner.signals.whitening import block_means, carried_noise, reference

PHIS = (0, 0.5, 0.9, 0.98)
TESTS = {
    'trend (in use)': trend,
    'plain Mann-Kendall': mann_kendall,
    'Hamed-Rao, 10 lags': hamed_rao,
    'Hamed-Rao, all lags': lambda x: hamed_rao(x, len(x)),
    'Yue-Wang, 1 lag': yue_wang,
    'Yue-Wang, all lags': lambda x: yue_wang(x, len(x)),
    'pre-whitened': prewhitened,
    'trend-free pre-whitened': trend_free_prewhitened,
    'plain on means of 10': lambda x: mann_kendall(block_means(x, 10)[1]),
}


def probability(found: Trend | MannKendall | Abstention | float) -> float:
    "p of whatever a test returns; 1 for an abstention"
    return 1.0 if isinstance(found, Abstention) else float(found) if isinstance(found, float) else found.p


def fired(test, batch: np.ndarray) -> float:
    "Share of series a test at 5 % calls a trend"
    return float(np.mean([probability(test(x)) <= 0.05 for x in batch]))


def cusum_life(z: np.ndarray, design: CusumDesign) -> float:
    "Average points between false alarms, all rows at once"
    up, down, first = np.zeros(len(z)), np.zeros(len(z)), np.full(len(z), -1)
    for i, v in enumerate(z.T):
        up, down = np.maximum(0, up + v - design.allowance), np.maximum(0, down - v - design.allowance)
        first = np.where((first < 0) & (np.maximum(up, down) > design.limit), i, first)
    return float(np.where(first < 0, z.shape[1], first + 1).sum() / max((first >= 0).sum(), 1))


def page_hinkley_life(z: np.ndarray, design: PageHinkleyDesign) -> float:
    "The same for Page-Hinkley"
    mean, up, down, first = np.zeros(len(z)), np.zeros(len(z)), np.zeros(len(z)), np.full(len(z), -1)
    for i, v in enumerate(z.T):
        mean = mean + (v - mean) / (i + 1)
        up, down = np.maximum(0, up + v - mean - design.allowance), np.maximum(0, down - v + mean - design.allowance)
        first = np.where((first < 0) & (i + 1 >= design.least) & (np.maximum(up, down) > design.limit), i, first)
    return float(np.where(first < 0, z.shape[1], first + 1).sum() / max((first >= 0).sum(), 1))


def trend_tests(series: int, rng: np.random.Generator) -> dict[str, float]:
    "Every test on 200 points"
    out: dict[str, float] = {}
    for phi in PHIS:
        noise = carried_noise(phi, (series, 200), rng)
        for name, test in TESTS.items():
            out[f'{name}: false alarms at phi {phi}'] = fired(test, noise)
            out[f'{name}: power at phi {phi}'] = fired(test, noise - 0.01 * np.arange(200))
            print(f'phi {phi:<4} {name:26} {out[f"{name}: false alarms at phi {phi}"]:.3f}  {out[f"{name}: power at phi {phi}"]:.3f}', flush=True)
    return out


def heavy_tail(phi: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    "AR(1) driven by Student's t with 3 degrees of freedom, standard deviation 1"
    e = rng.standard_t(3, shape) / np.sqrt(3)
    e[:, 1:] *= np.sqrt(1 - phi**2)
    for i in range(1, shape[1]): e[:, i] += phi * e[:, i - 1]
    return e


def other_conditions(series: int, rng: np.random.Generator) -> dict[str, float]:
    "The test in use where it is not at home"
    out: dict[str, float] = {}
    for phi in PHIS:
        for n in (10, 20, 50, 100, 500): out[f'trend (in use): false alarms at phi {phi}, {n} points'] = fired(trend, carried_noise(phi, (series, n), rng))
        noise = heavy_tail(phi, (series, 200), rng)
        out[f'trend (in use): false alarms at phi {phi}, heavy tail'] = fired(trend, noise)
        out[f'trend (in use): power at phi {phi}, heavy tail'] = fired(trend, noise - 0.01 * np.arange(200))
        print({k: v for k, v in out.items() if f'phi {phi}' in k})
    return out


def change_detectors(series: int, rng: np.random.Generator) -> dict[str, float]:
    "Points between false alarms"
    out: dict[str, float] = {}
    cusum, page = design_for(500), PageHinkleyDesign()
    for phi in PHIS:
        noise = carried_noise(phi, (series, 2701), rng)
        white = (noise[:, 1:] - phi * noise[:, :-1]) / np.sqrt(1 - phi**2)
        out[f'CUSUM, raw: phi {phi}'] = cusum_life(noise[:, :2500], cusum)
        out[f'CUSUM, true phi: phi {phi}'] = cusum_life(white[:, :2500], cusum)
        for calm in (200, 50):
            rest = np.stack([reference(x[:calm]).innovations(x[calm:calm + 2500], x[calm - 1]) for x in noise])
            out[f'CUSUM, reference of {calm}: phi {phi}'] = cusum_life(rest, cusum)
            if calm == 200: out[f'Page-Hinkley, reference of 200: phi {phi}'] = page_hinkley_life(rest, page)
        out[f'Page-Hinkley, raw: phi {phi}'] = page_hinkley_life(noise[:, :2500], page)
        print({k: round(v) for k, v in out.items() if k.endswith(f'phi {phi}')}, flush=True)
    return out


def speed(rng: np.random.Generator) -> dict[str, float]:
    "Processor time, medians: the machine may be shared"
    long, out = rng.standard_normal(100_000), {}
    for name, call in (('Mann-Kendall', mann_kendall), ('trend', trend)):
        taken = []
        for _ in range(9):
            start = time.process_time()
            call(long)
            taken.append(time.process_time() - start)
        out[f'{name} of 100,000 points, s'] = float(np.median(taken))
    stream = StreamingMannKendall()
    for x in rng.standard_normal(10_000).tolist(): stream.append(x)
    taken = []
    for group in rng.standard_normal((50, 10)).tolist():
        start = time.process_time()
        for x in group: stream.append(x)
        taken.append((time.process_time() - start) / 10)
    out['streaming append at 10,000 points, microseconds'] = float(np.median(taken)) * 1e6
    print(out)
    return out


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--series', type=int, default=2000, help='series for each figure')
    ap.add_argument('--seed', type=int, default=0)
    a = ap.parse_args()
    rng = np.random.default_rng(a.seed)
    metrics = speed(rng) | trend_tests(a.series, rng) | other_conditions(a.series, rng) | change_detectors(a.series // 4, rng)
    results.save('false alarms', metrics, 'false_alarms')


if __name__ == '__main__': main()
