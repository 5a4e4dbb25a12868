"""How well the end of a run is forecast from its first 25, 50 and 75 %, beside the last value, a power law and an exponential.

    python bench/forecast.py --curves DIR [--tacotron2 bench/curves/tacotron2.jsonl.gz]
    python bench/forecast.py --curves DIR --parts --sample 40 --name forecast_parts

DIR holds learning curves: `taskset_*.npz` with `valid_loss` [runs, evaluations], `librispeech_runs.jsonl.gz` with `step` and `valid_wer` a line, and the folder
`tacotron2` with one CSV a run. A run counts when it has ten finite evaluations and a finite last one. Everything is relative: an error of 0.1 is a tenth of the
value the run ended with, and no error counts for more than 1, or the few runs that explode would be all one sees. Abstentions are left out of errors for
everybody and counted. `gain` is the chance that a later evaluation is better than the best so far by more than half a percent, against what came.
`--parts` takes the parts of the forecaster away one by one. Its numbers were chosen on other curves: eight further TaskSet tasks, and runs of translation,
image and molecule models of the AlgoPerf logs. No speech model was among them.
"""
import argparse
import csv
import dataclasses
import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import results

from tts_tuner.signals.forecast import RULE, Forecast, ForecastRule, forecast, weigh
from tts_tuner.signals.rivals import Point, exponential, last_value, power_law
from tts_tuner.signals.series import Abstention

SHARES, WORTH = (0.25, 0.5, 0.75), 0.005
Run = tuple[np.ndarray, np.ndarray]  # steps and values


def taskset(folder: Path, sample: int) -> Iterator[tuple[str, Run]]:
    "`sample` runs of each task, drawn with a fixed seed"
    draw = np.random.default_rng(0)
    for path in sorted(folder.glob('taskset_*.npz')):
        values = np.load(path)['valid_loss'].astype(float)
        for i in draw.permutation(len(values))[:sample]: yield path.stem, (np.arange(1.0, values.shape[1] + 1), values[i])


def lines(path: Path, field: str) -> Iterator[tuple[str, Run]]:
    "One run a line"
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rt') as f:
        for r in map(json.loads, f): yield r['workload'], (np.array(r['step'], float), np.array(r[field], float))


def tacotron2(folder: Path) -> Iterator[tuple[str, Run]]:
    "Spectrogram error on held-out clips, from one CSV a run"
    for path in sorted(folder.glob('*.csv')):
        with path.open() as f: rows = [(float(r['step']), float(r['ev_mel'])) for r in csv.DictReader(f) if r.get('ev_mel')]
        if rows: yield path.stem[0], (np.array([r[0] for r in rows]), np.array([r[1] for r in rows]))


def recorded(path: Path) -> Iterator[tuple[str, Run]]:
    "Our own recordings: spectrogram loss on held-out clips"
    with gzip.open(path, 'rt') as f:
        for r in map(json.loads, f):
            values = np.array([np.nan if v is None else v for v in r['validation'].get('val_mel_loss', [])], float)
            yield r['corpus'], (np.array(r['step'], float), values)


def judge(run: Run, share: float, rule: ForecastRule = RULE, rivals: bool = True) -> dict[str, float] | None:
    "All there is to say of one forecast; None where the run does not count"
    steps, values = run
    n = int((steps <= steps[0] + share * (steps[-1] - steps[0])).sum())
    if np.isfinite(values).sum() < 10 or not np.isfinite(values[-1]) or n >= len(values): return None
    t, y, end, until = steps[:n], values[:n], values[-1], float(steps[-1])
    found = forecast(y, t, until, rule=rule)
    if isinstance(found, Abstention): return dict(answered=0.0)
    assert isinstance(found, Forecast)
    low, high = (float(x[-1]) for x in found.interval())
    worth = WORTH * abs(found.best)
    answer = dict(answered=1.0, covered=float(low <= end <= high), below=float(end < low), above=float(end > high), width=(high - low) / end,
                  chance=found.gain(worth).chance, improved=float(np.nanmin(values[n:]) < found.best - worth))
    others = (last_value, power_law, exponential) if rivals else (last_value,)
    for name, value in (('forecast', float(found.median[-1])), *((f.__name__, f(y, t, until)) for f in others)):
        if isinstance(value, Abstention): raise AssertionError(f'{name} abstains where the forecast does not: {value.reason}')
        if isinstance(value, Point): answer[f'{name} covered'], value = float(value.low <= end <= value.high), value.value
        answer[f'error {name}'] = min(abs(value - end) / abs(end), 1.0)
    return answer


def auc(score: np.ndarray, label: np.ndarray) -> float:
    "Probability that a case with the label scores above one without"
    a, b = score[label > 0], score[label == 0]
    return float(np.mean((a[:, None] > b) + 0.5 * (a[:, None] == b))) if len(a) and len(b) else float('nan')


def report(name: str, rows: list[dict[str, float]]) -> dict[str, float]:
    "Figures of one group; printed in a line"
    some = [r for r in rows if r['answered']]
    if not some: return {f'{name}: forecasts': len(rows), f'{name}: abstained': 1.0}
    of = {k: np.array([r[k] for r in some]) for k in some[0]}
    errors = {k: float(of[f'error {k}'].mean()) for k in ('forecast', 'last_value', 'power_law', 'exponential')}
    draw = np.random.default_rng(0).integers(len(some), size=(2000, len(some)))
    against = {k: np.percentile((of['error forecast'] - of[f'error {k}'])[draw].mean(1), 97.5) for k in ('last_value', 'power_law')}
    quiet, chance, improved = of['chance'] < 0.05, of['chance'], of['improved']
    found = dict(forecasts=len(rows), abstained=1 - len(some) / len(rows), covered=of['covered'].mean(), **{f'error, {k}': v for k, v in errors.items()})
    found |= {f'forecast less {k}, upper end': v for k, v in against.items()} | {f'covered, {k}': of[f'{k} covered'].mean() for k in against}
    found |= {'width': np.median(of['width']), 'gain: area under the curve': auc(chance, improved), 'gain: Brier score': ((chance - improved) ** 2).mean(),
              'gain: Brier score of the base rate': improved.var(), 'gain: share with a chance below 0.05': quiet.mean(),
              'gain: of these, improved': improved[quiet].mean() if quiet.any() else np.nan}
    print(f'{name:26} n {len(rows):4d}  abstained {found["abstained"]:.2f}  covered {found["covered"]:.3f} ({of["below"].mean():.2f} below, '
          f'{of["above"].mean():.2f} above)  error {errors["forecast"]:.4f}  last {errors["last_value"]:.4f} ({against["last_value"]:+.4f})  '
          f'power {errors["power_law"]:.4f} ({against["power_law"]:+.4f})  exp {errors["exponential"]:.4f}  gain AUC {auc(chance, improved):.3f} '
          f'Brier {found["gain: Brier score"]:.3f} of {improved.var():.3f}  quiet {quiet.mean():.2f}, improved '
          f'{found["gain: of these, improved"]:.3f}', flush=True)
    return {f'{name}: {k}': round(float(v), 4) for k, v in found.items() if np.isfinite(v)}


def timing() -> dict[str, float]:
    "Milliseconds of processor time, median of 15, on a run of 100 evaluations"
    t = np.arange(1.0, 101)
    y = 0.3 + 2 * np.exp(-t / 25) + 0.02 * np.random.default_rng(0).standard_normal(100)
    settings = weigh(y, t)
    assert not isinstance(settings, Abstention)

    def median_of(call: Callable[[], object]) -> float:
        spent = []
        for _ in range(15):
            begun = time.process_time()
            call()
            spent.append(1000 * (time.process_time() - begun))
        return float(np.median(spent))

    def look() -> None:
        found = forecast(y, t, 200, settings=settings)
        assert isinstance(found, Forecast) and found.gain(0.01).chance >= 0
    found = {'ms of a refit': median_of(lambda: weigh(y, t)), 'ms between refits': median_of(look)}
    print(found)
    return found


def parts(sets: dict[str, list[tuple[str, Run]]]) -> dict[str, float]:
    "Coverage, error and Brier score without one part each, over the three shares of a run; of many runs every third"
    still = (RULE.centres[0], RULE.centres[1], 1e-9, *RULE.centres[3:]), (*RULE.spreads[:2], 0.01, *RULE.spreads[3:])
    without = {'as it is': RULE, 'weights as likely as the evaluations say': dataclasses.replace(RULE, trust=1.0),
               'the one likeliest setting': dataclasses.replace(RULE, trust=1.0, kept=1), 'not widened': dataclasses.replace(RULE, widen=(1.0, 0.0)),
               'the likeliest, not widened': dataclasses.replace(RULE, trust=1.0, kept=1, widen=(1.0, 0.0)),
               'the beginning not passed over': dataclasses.replace(RULE, early=0.0), 'no logarithms': dataclasses.replace(RULE, logs=False),
               'nothing that wanders': dataclasses.replace(RULE, centres=still[0], spreads=still[1])}
    metrics: dict[str, float] = {}
    for name, runs in sets.items():
        for what, rule in without.items():
            some = [r for _, run in runs[::1 if len(runs) < 200 else 3] for share in SHARES if (r := judge(run, share, rule, False)) and r['answered']]
            of = {k: float(np.mean([r[k] for r in some])) for k in ('covered', 'error forecast', 'error last_value')}
            of['Brier score of the gain'] = float(np.mean([(r['chance'] - r['improved']) ** 2 for r in some]))
            print(f'{name:14} {what:42}', '  '.join(f'{k} {v:.4f}' for k, v in of.items()), flush=True)
            metrics |= {f'{name}, {what}: {k}': round(v, 4) for k, v in of.items()}
    return metrics


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--curves', type=Path, required=True, help='folder of learning curves')
    ap.add_argument('--lines', nargs=2, action='append', default=[], metavar=('FILE', 'FIELD'), help='more runs, one a line: `workload`, `step`, FIELD')
    ap.add_argument('--tacotron2', type=Path, help='our recordings')
    ap.add_argument('--sample', type=int, default=150, help='runs of each TaskSet task')
    ap.add_argument('--groups', action='store_true', help='print tasks and workloads one by one as well')
    ap.add_argument('--parts', action='store_true', help='what each part of the forecaster is worth')
    ap.add_argument('--name', default='forecast', help='of the file in bench/results; empty to write none')
    a = ap.parse_args()
    sets = {'TaskSet': list(taskset(a.curves, a.sample))}
    if (a.curves / 'librispeech_runs.jsonl.gz').exists(): sets['LibriSpeech'] = list(lines(a.curves / 'librispeech_runs.jsonl.gz', 'valid_wer'))
    for path, field in a.lines: sets[Path(path).stem] = list(lines(Path(path), field))
    if (a.curves / 'tacotron2').is_dir(): sets['Tacotron 2, given'] = list(tacotron2(a.curves / 'tacotron2'))
    if a.tacotron2: sets['Tacotron 2, recorded'] = list(recorded(a.tacotron2))
    if a.parts:
        metrics = parts({k: v for k, v in sets.items() if k in ('TaskSet', 'LibriSpeech')})
        if a.name: results.save(a.name, metrics)
        return
    metrics = timing()
    for name, runs in sets.items():
        if not runs: continue
        rows = [(group, share, found) for group, run in runs for share in SHARES if (found := judge(run, share))]
        for share in SHARES: metrics |= report(f'{name}, {share:.0%}', [r for _, s, r in rows if s == share])
        if a.groups:
            for group in sorted({g for g, _, _ in rows}): report('  ' + group, [r for g, _, r in rows if g == group])
    if a.name: results.save(a.name, metrics)


if __name__ == '__main__': main()
