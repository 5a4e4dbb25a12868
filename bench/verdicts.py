"""Verdicts about runs, on recorded ones: will it align at a third of the budget, is it diverging, does it never stop.

    python bench/verdicts.py [--runs bench/curves/tacotron2.jsonl.gz] [--curves DIR]
    python bench/verdicts.py --later bench/curves/tacotron2_later.jsonl.gz

`--runs` are the runs of bench/record_runs.py, on two corpora; the verdict at a third is fitted on one and tested on the other, both ways, beside
diagonality alone. DIR holds runs of another Tacotron 2 (a CSV and a JSON each), which are only tested on. Runs that somebody meddled with after
that third are left out there, for nobody can know, and counted apart. `--later` are runs that were recorded when the verdict in the package was
fixed: it is only tested on them, beside diagonality alone as fitted on the others. Divergence is simulated too, with draws that nothing was set on.
"""
import argparse
import csv
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results

from tts_tuner.signals.diverging import diverging_history
from tts_tuner.signals.never_stops import StopVerdict, never_stops
from tts_tuner.signals.simulator import draw_recipe, simulate
from tts_tuner.signals.will_it_align import FORCED, FORCED_MODEL, FULL, FULL_MODEL, SHARE, SpeakingModel, early_numbers, fit_model, rates

Run = dict[str, Any]
ALONE = ('alignment_score',)
COLUMNS = dict(alignment_score='ev_diag', attention_coverage='ev_cov', val_mel_loss='ev_mel', success='fr_ok', stop_rate='fr_stop')


def read_runs(path: Path) -> list[Run]:
    "Runs as bench/record_runs.py left them: packed, or a folder of one file each"
    if path.is_dir(): return [json.loads(p.read_text()) for p in sorted(path.glob('*.json'))]
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]


def read_foreign(folder: Path) -> list[Run]:
    "Runs of one CSV and one JSON each, under the names used here"
    out = []
    for path in sorted(folder.glob('*.json')):
        told = json.loads(path.read_text())
        rows = [r for r in csv.DictReader(path.with_suffix('.csv').open()) if r['ev_diag']]
        validation = {name: [float(r[c]) if r[c] else None for r in rows] for name, c in COLUMNS.items()}
        out.append(dict(name=path.stem, corpus='foreign', fault='hot' if 'nan' in path.stem else '', jump=None, budget=told['config']['steps'],
                        step=[int(r['step']) for r in rows], validation=validation))
    return out


def column(run: Run, name: str, until: float = 1.0) -> np.ndarray:
    "A metric of the validations up to a share of the budget; NaN where there is no number"
    n = sum(s <= until * run['budget'] + 1e-9 for s in run['step'])
    return np.array([np.nan if v is None else v for v in run['validation'][name][:n]])


def spoke(run: Run) -> bool: return bool(column(run, 'success')[-1] >= 0.5)


def meddled_late(run: Run) -> bool: return bool(run['jump']) or run['fault'] == 'kicks'


def table(runs: Sequence[Run], names: Sequence[str], until: float = SHARE) -> tuple[list[Run], np.ndarray, np.ndarray]:
    "Runs that have the numbers, these, and which spoke at the end"
    kept, x = [], []
    for run in runs:
        if len(column(run, 'success')) == 0: continue
        found = early_numbers({n: column(run, n, until) for n in {m.removeprefix('best_') for m in names}}, names)
        if isinstance(found, np.ndarray):
            kept.append(run)
            x.append(found)
    return kept, np.array(x), np.array([spoke(r) for r in kept])


def auc(p: np.ndarray, y: np.ndarray) -> float:
    "Probability that a run that speaks has the higher number"
    return float(np.mean((p[y][:, None] > p[~y]) + 0.5 * (p[y][:, None] == p[~y])))


def across(runs: Sequence[Run], names: Sequence[str], until: float = SHARE) -> tuple[dict[str, float], list[tuple[Run, float]]]:
    "Fitted on one corpus, tested on the other, both ways; error rates of both together"
    out: dict[str, float] = {}
    kept, p, y = [], [], []
    for fitted, tested in (('demo', 'digits'), ('digits', 'demo')):
        _, x, s = table([r for r in runs if r['corpus'] == fitted and not meddled_late(r)], names, until)
        model = fit_model(x, s, names)
        k, x, s = table([r for r in runs if r['corpus'] == tested and not meddled_late(r)], names, until)
        found = model.probability(x)
        out |= {f'{fitted} to {tested}: {n}': v for n, v in rates(found, s, model).items()} | {f'{fitted} to {tested}: AUC': auc(found, s)}
        kept += k
        p.append(found)
        y.append(s)
    both = rates(np.concatenate(p), np.concatenate(y), model)
    return out | {f'both: {n}': v for n, v in both.items()}, list(zip(kept, np.concatenate(p).tolist()))


def first_alarm(losses: np.ndarray, verdict: str = 'diverging') -> int | None:
    "Evaluations taken when it is first said"
    return next((n for n, v in enumerate(diverging_history(losses), 1) if v.verdict == verdict), None)


def simulated(kinds: Sequence[str], n: int, seed: int, steps: int = 300, every: int = 10) -> Iterator[tuple[np.ndarray, int | None]]:
    "Losses at the evaluations and the first of them at which a divergence may show"
    rng, at = np.random.default_rng(seed), np.arange(every - 1, steps, every)
    for _ in range(n):
        curve = simulate(draw_recipe(rng, steps, kinds), rng)
        yield curve.values[at], None if curve.diverges_at is None else int(np.searchsorted(at, curve.diverges_at))


def plain(y: np.ndarray, alpha: float = 0.2) -> int | None:
    "The rival: more than `alpha` above the best, twice in a row"
    high = np.r_[False, y[1:] > (1 + alpha) * np.fmin.accumulate(y)[:-1]] | ~np.isfinite(y)
    return next((n for n in range(2, len(y) + 1) if high[n - 2:n].all()), None)


def divergence(runs: Sequence[Run], draws: int) -> dict[str, float]:
    "Share said within three evaluations, and false alarms; simulated and recorded"
    out: dict[str, float] = {}
    alarms: dict[str, Callable[[np.ndarray], int | None]] = {'': first_alarm, ', 20 % over best twice': plain}
    for name, alarm in alarms.items():
        waits = [(alarm(y), onset) for y, onset in simulated(('divergence',), draws, 1000)]
        out[f'simulated, said within 3 evaluations{name}'] = float(np.mean([a is not None and 0 < a - (o or 0) <= 3 for a, o in waits]))
        for kind in ('', 'spike', 'plateau', 'rate drop', 'alignment', 'u-turn'):
            false = [alarm(y) is not None for y, _ in simulated((kind,) if kind else (), draws // 3, 1001)]
            out[f'simulated, false alarms, {kind or "nothing happens"}{name}'] = float(np.mean(false))
        in_time, late, calm, wrong, rows = recorded_divergence(runs, alarm)
        out |= {f'recorded, diverging runs{name}': in_time + late, f'recorded, said within 3 evaluations{name}': in_time / max(in_time + late, 1),
                f'recorded, runs that go well{name}': calm, f'recorded, false alarms{name}': wrong / max(calm, 1)}
        for row in rows: print(f'  divergence{name}: {row}')
    return out


def broken(run: Run, onset: int, name: str = 'alignment_score') -> bool:
    "Was a ruler lost for good at an evaluation? The loss is not asked. A run that was meddled with from its start had no level, so half of all counts"
    v = column(run, name)
    before = np.median(v[max(0, onset - 5):onset]) if run['jump'] else 0.5
    return bool(np.median(v[onset:onset + 5]) < 0.6 * before and v[-1] < 0.6 * before)


def recorded_divergence(runs: Sequence[Run], alarm: Callable[[np.ndarray], int | None]) -> tuple[int, int, int, int, list[str]]:
    "Numbers of: diverging and said in time, diverging and not, going well, going well and called diverging; what was found, in words"
    in_time = late = calm = wrong = 0
    rows = []
    for run in runs:
        name = 'val_loss' if 'val_loss' in run['validation'] else 'val_mel_loss'
        if not len(y := column(run, name)): continue
        at = alarm(y)
        half = run['budget'] / 2 if run['jump'] else 0
        onset = sum(s <= half for s in run['step'])
        if (run['jump'] or run['fault'] == 'hot') and broken(run, onset):
            good = at is not None and 0 < at - onset <= 3
            in_time, late = in_time + good, late + (not good)
            rows.append(f'{run["name"]} broke at evaluation {onset + 1}, said at {at}')
        elif not run['fault'] and not run['jump'] and spoke(run):
            calm, wrong = calm + 1, wrong + (at is not None)
            if at is not None: rows.append(f'{run["name"]} goes well and was called diverging at {at}')
    return in_time, late, calm, wrong, rows


def stopping(runs: Sequence[Run], sentences: int = 16) -> dict[str, float]:
    "Does the verdict about the gate, the first one given, hold at the end of the run?"
    said: dict[str, list[bool]] = {'never stops': [], 'stops too early': [], 'stops': []}
    found, bad = 0, 0
    for run in runs:
        if meddled_late(run) or 'stop_rate' not in run['validation'] or 'duration_ratio' not in run['validation']: continue
        p, d, length = (column(run, n) for n in ('stop_rate', 'alignment_score', 'duration_ratio'))
        end = 'never stops' if p[-3:].mean() < 0.5 else 'stops too early' if length[-3:].mean() < 0.5 else 'stops'
        aligned = bool((d[-8:] >= 0.8).all())
        first = next((v for n in range(1, len(p) + 1) if isinstance(v := never_stops(p[:n], d[:n], sentences, length[:n]), StopVerdict)), None)
        if aligned and end != 'stops':
            bad += 1
            found += first is not None and first.verdict == end
        if first is not None: said[first.verdict].append(first.verdict == end)
        if first is not None and first.verdict != end: print(f'  gate: {run["name"]} was first said to be "{first.verdict}", and at the end it is "{end}"')
    out: dict[str, float] = {'aligned runs whose gate fails': bad, 'of these said': found}
    for verdict, right in said.items(): out |= {f'"{verdict}" said': len(right), f'"{verdict}" right at the end': sum(right)}
    return out


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--runs', type=Path, default=Path(__file__).parent / 'curves/tacotron2.jsonl.gz', help='runs of bench/record_runs.py')
    ap.add_argument('--curves', type=Path, help='folder of runs of another Tacotron 2, a CSV and a JSON each')
    ap.add_argument('--draws', type=int, default=1500, help='simulated divergences')
    ap.add_argument('--later', type=Path, help='runs recorded after the verdict in the package was fixed; nothing else is measured then')
    ap.add_argument('--dry', action='store_true', help='print and write nothing')
    a = ap.parse_args()
    runs = [r for r in read_runs(a.runs) if r['step']]
    if a.later: return afterwards(runs, read_runs(a.later), a.dry)
    foreign = read_foreign(a.curves) if a.curves else []
    early = [r for r in runs if not meddled_late(r)]
    metrics: dict[str, float] = {'runs': len(runs), 'runs not meddled with late': len(early), 'of these failed': sum(not spoke(r) for r in early)}
    for label, names in (('full', FULL), ('attention', FORCED), ('diagonality alone', ALONE)):
        found, each = across(runs, names)
        metrics |= {f'{label}, {k}': v for k, v in found.items()}
        if label == 'full':
            for run, p in sorted(each, key=lambda e: e[1]): print(f'  {run["name"]:32} P {p:.2f}  success at the end {column(run, "success")[-1]:.2f}')
    for label, model in (('full', FULL_MODEL), ('attention', FORCED_MODEL)):
        metrics |= {f'{label}, {k}': v for k, v in shipped(label, model, runs, early, foreign).items()}
    metrics |= {f'diverging, {k}': v for k, v in divergence(runs + foreign, a.draws).items()}
    metrics |= {f'gate, {k}': v for k, v in stopping(runs).items()}
    for k, v in metrics.items(): print(f'{k:70} {v:.3f}')
    if not a.dry: results.save('verdicts', metrics)


def afterwards(runs: Sequence[Run], later: Sequence[Run], dry: bool) -> None:
    "The verdict as it is in the package, on runs it could not be fitted to"
    _, x, y = table([r for r in runs if not meddled_late(r)], ALONE)
    metrics: dict[str, float] = {}
    for label, model in (('full', FULL_MODEL), ('attention', FORCED_MODEL), ('diagonality alone', fit_model(x, y, ALONE))):
        for part in ('all', 'demo', 'digits', 'meddled with late'):
            mine = [r for r in later if r['step'] and part in ('all', 'meddled with late', r['corpus'])]
            chosen = [r for r in mine if meddled_late(r) == (part == 'meddled with late')]
            if not chosen: continue
            kept, p_x, spoken = table(chosen, model.names)
            p = model.probability(p_x)
            metrics |= {f'{label}, {part}: {k}': v for k, v in rates(p, spoken, model).items()}
            if part == 'all':
                metrics[f'{label}, {part}: AUC'] = auc(p, spoken)
                for run, q in sorted(zip(kept, p.tolist()), key=lambda e: e[1]) if label == 'full' else ():
                    print(f'  {run["name"]:32} P {q:.2f}  success at the end {column(run, "success")[-1]:.2f}')
    for k, v in metrics.items(): print(f'{k:70} {v:.3f}')
    if not dry: results.save('verdicts_later', metrics)


def shipped(label: str, model: SpeakingModel, runs: Sequence[Run], early: Sequence[Run], foreign: Sequence[Run]) -> dict[str, float]:
    "The model in the package: is it the one these runs give, what does it say of runs it has never seen, and of those meddled with late"
    _, x, y = table(early, model.names)
    again = fit_model(x, y, model.names)
    print(f'{label}: SpeakingModel({again.bias:.3f}, ({", ".join(f"{w:.3f}" for w in again.weights)}))')
    out = {'largest change of a weight by fitting again': float(np.abs(np.array([model.bias - again.bias, *np.subtract(model.weights, again.weights)])).max())}
    _, x, y = table([r for r in runs if meddled_late(r)], model.names)
    if len(y): out |= {f'meddled with late: {k}': v for k, v in rates(model.probability(x), y, model).items()}
    if foreign and model.names == FORCED:
        _, x, y = table(foreign, model.names)
        out |= {f'another model: {k}': v for k, v in rates(model.probability(x), y, model).items()} | {'another model: AUC': auc(model.probability(x), y)}
    return out


if __name__ == '__main__': main()
