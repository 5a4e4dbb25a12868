"""What the rule that stops one run saves on recorded runs, and the fit of its numbers.

    python bench/stop.py --curves DATA/curves [--logs DATA/submissions_algorithms]

`--curves` is a folder with librispeech_runs.jsonl.gz: one run a line with method, workload, step, valid_wer, valid_loss and
train_loss. `--logs` is a clone of github.com/mlcommons/submissions_algorithms, whose other LibriSpeech runs are used for
fitting only. A family of models (conformer, deepspeech) is tested with numbers fitted on the other one. Rows: saved steps as a
share of what the oracle saves, which stops at the first value within 0.5 % of the run's best; false stops lose more than that.
The last lines say whether the numbers fitted on all runs are the ones the module ships.
"""
import argparse
import csv
import gzip
import io
import json
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import results

from tts_tuner.signals.prechelt import PrecheltRule, prechelt
from tts_tuner.signals.stopping import RULES, Signs, StoppingRule, reasons, signs, stopping

TOLERANCE, SHARES = 0.005, (0.0, 0.002, 0.003, 0.005)
LIMITS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
SHIPPED = dict(careful=0.01, standard=0.0175, brisk=0.05, bold=0.1)  # limits; a little less than 2 % for a rule that is to keep to it


@dataclass
class Runs:
    "Recorded runs side by side, [runs, n] padded at the end"
    signs: Signs
    there: np.ndarray  # evaluations that exist
    last: np.ndarray  # [runs] index of the last one
    saved: np.ndarray  # share of the run's steps not run when stopped here
    lost: np.ndarray  # best value seen here above that of the whole run, as a share of it
    oracle: np.ndarray  # [runs] share the oracle saves
    family: np.ndarray
    method: np.ndarray
    given: np.ndarray  # of librispeech_runs.jsonl.gz?

    def play(self, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [runs] saved, and was it a false stop
        "Stop each run at the first evaluation that says so"
        stop = stop & self.there
        at, rows = np.where(stop.any(1), stop.argmax(1), self.last), np.arange(len(stop))
        return self.saved[rows, at], self.lost[rows, at] > TOLERANCE


def read_given(curves: Path) -> list[dict[str, Any]]:
    "Runs of librispeech_runs.jsonl.gz"
    with gzip.open(curves / 'librispeech_runs.jsonl.gz', 'rt') as f: return [json.loads(line) | {'given': True} for line in f]


def read_logs(clone: Path) -> list[dict[str, Any]]:
    "The LibriSpeech runs of a clone, by the evaluations it logged; a clone without work tree will do"
    git = ['git', '-C', str(clone)]
    listed = subprocess.run([*git, 'ls-tree', '-r', 'HEAD', '--name-only'], capture_output=True, text=True, check=True).stdout.splitlines()
    files = [f for f in listed if 'librispeech' in f and f.endswith('/eval_measurements.csv')]
    wanted = ''.join(f'HEAD:{f}\n' for f in files).encode()
    stream = io.BytesIO(subprocess.run([*git, 'cat-file', '--batch'], input=wanted, capture_output=True, check=True).stdout)
    columns = dict(step='global_step', valid_wer='validation/wer', valid_loss='validation/ctc_loss', train_loss='train/ctc_loss')
    runs = []
    for file in files:
        size = int(stream.readline().split()[2])
        rows = list(csv.DictReader(io.StringIO(stream.read(size).decode())))
        stream.read(1)
        parts = file.split('/')
        named = dict(method=parts[parts.index('logs') + 2], workload=next(p for p in parts if 'librispeech' in p), given=False)
        runs.append(named | {k: [float(r.get(c) or 'nan') for r in rows] for k, c in columns.items()})
    return runs


def distinct(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    "Runs with ten finite values and rising steps, each once"
    seen, kept = set(), []
    for r in runs:
        v = np.array(r['valid_wer'], float)
        key = (tuple(r['step'][:8]), tuple(np.nan_to_num(v[:8], nan=-1).round(3)))
        if key in seen or np.isfinite(v).sum() < 10 or (np.diff(r['step']) <= 0).any(): continue
        seen.add(key)
        kept.append(r)
    return kept


def pad(rows: list[np.ndarray], n: int) -> np.ndarray:
    "[runs, n], zeros at the end"
    return np.stack([np.concatenate([r, np.zeros(n - len(r))]) for r in rows])


def prepare(runs: list[dict[str, Any]], losses: bool = True, value: str = 'valid_wer') -> Runs:
    "Signs of all runs, and what stopping at each evaluation would cost"
    n = max(len(r['step']) for r in runs)
    each = [signs(r[value], r['valid_loss'] if losses else None, r['train_loss'] if losses else None, SHARES) for r in runs]
    stacked = {f: pad([getattr(s, f) for s in each], n) for f in Signs._fields if f != 'since'}
    since = {d: pad([s.since[d] for s in each], n) for d in SHARES}
    saved, lost, oracle = [], [], []
    for r in runs:
        v, s = np.array(r[value], float), np.array(r['step'], float)
        v = np.where(np.isfinite(v), v, np.inf)
        saved.append(1 - s / s[-1])
        lost.append(np.minimum(np.minimum.accumulate(v) / v.min() - 1, 10))
        oracle.append(saved[-1][int(np.argmax(v <= v.min() * (1 + TOLERANCE)))])
    length = np.array([len(r['step']) for r in runs])
    return Runs(Signs(since=since, **stacked), np.arange(n) < length[:, None], length - 1, pad(saved, n), pad(lost, n), np.array(oracle),
                np.array(['conformer' if 'conformer' in r['workload'] else 'deepspeech' for r in runs]), np.array([r['method'] for r in runs]),
                np.array([r['given'] for r in runs]))


def draw(rng: np.random.Generator) -> StoppingRule:
    "Settings to try"
    def one(*options: float) -> float: return float(rng.choice(options))
    return StoppingRule(one(*range(3, 17), 18, 20, 22, 25), one(0, .1, .15, .2, .25, .3, .35, .4), one(*SHARES), one(0, .5, 1, 2),
                        int(one(4, 5, 6, 7, 8, 10)), 2.0, one(.001, .0015, .002, .003, .004, .006, .01),
                        one(.0005, .001, .0015, .002, .003), one(.001, .002, .004, .008, .02))


class Fit:
    "Settings drawn at random, played on all runs once"
    def __init__(self, runs: Runs, draws: int, seed: int = 5):
        rng = np.random.default_rng(seed)
        self.runs, self.rules = runs, [draw(rng) for _ in range(draws)]
        played = [runs.play(reasons(runs.signs, r) > 0) for r in self.rules]
        self.saved, self.false = (np.array(p, np.float32) for p in zip(*played))

    def best(self, chosen: np.ndarray, limit: float, among: np.ndarray | None = None, sure: float = 0.7, resamplings: int = 100) -> int:
        "Index of the settings that save most on the chosen runs while false stops stay within the limit in a share of resamplings of methods"
        rng, group = np.random.default_rng(1), np.char.add(self.runs.method, self.runs.family)
        groups = np.unique(group[chosen])
        weight = np.zeros((resamplings, len(chosen)), np.float32)
        for w in weight:
            for g, times in zip(*np.unique(rng.choice(groups, len(groups)), return_counts=True)): w[chosen & (group == g)] = times
        rates = np.quantile(self.false @ weight.T / weight.sum(1), sure, axis=1)
        if among is not None: rates = np.where(among, rates, 2.0)
        within = rates <= limit
        return int(np.argmax(np.where(within, self.saved[:, chosen].sum(1), -1.0))) if within.any() else int(np.argmin(rates))


def figures(name: str, saved: np.ndarray, false: np.ndarray, oracle: np.ndarray) -> dict[str, float]:
    "Share and false stops with 95 % bootstrap intervals over runs; prints the row"
    rng = np.random.default_rng(0)
    picks = rng.integers(len(false), size=(2000, len(false)))
    shares, rates = np.percentile(saved[picks].sum(1) / oracle[picks].sum(1), [2.5, 97.5]), np.percentile(false[picks].mean(1), [2.5, 97.5])
    share = saved.sum() / oracle.sum()
    print(f'{name:40} {saved.mean():5.3f}  {share:5.2f} ({shares[0]:.2f} to {shares[1]:.2f})  {false.mean():.3f} ({rates[0]:.3f} to {rates[1]:.3f})')
    low_high = {'share, low': shares[0], 'share, high': shares[1], 'false stops, low': rates[0], 'false stops, high': rates[1]}
    return {f'{name}: {k}': round(float(v), 4) for k, v in (dict(saved=saved.mean(), share=share) | {'false stops': false.mean()} | low_high).items()}


def rivals(raw: list[dict[str, Any]], runs: Runs) -> dict[str, float]:
    "Patience and Prechelt's rules on the given runs"
    found: dict[str, float] = {}
    g = runs.given
    for p in range(3, 26):
        saved, false = runs.play(runs.signs.since[0.0] >= p)
        found |= figures(f'patience {p}', saved[g], false[g], runs.oracle[g])
    for rule in (PrecheltRule('GL', 2), PrecheltRule('GL', 5), PrecheltRule('PQ', 0.5), PrecheltRule('UP', 3), PrecheltRule('UP', 4)):
        stops = np.zeros_like(runs.there)
        for i in np.flatnonzero(g):
            v, tr = (np.array(raw[i][k], float) for k in ('valid_wer', 'train_loss'))
            v, tr = np.nan_to_num(v, nan=1e9, posinf=1e9), np.nan_to_num(tr, nan=1e9, posinf=1e9)
            for n in range(1, len(v) + 1):
                if prechelt(v[:n], tr[:n], rule) is True:
                    stops[i, n - 1] = True
                    break
        saved, false = runs.play(stops)
        found |= figures(f'{rule.kind} {rule.threshold:g}', saved[g], false[g], runs.oracle[g])
    return found


def across(name: str, fit: Fit, limit: float, may_fit: np.ndarray, change: Any = None, play: Runs | None = None, everyone: bool = False,
           among: np.ndarray | None = None, sure: float = 0.7) -> dict[str, float]:
    "The given runs, or all, of each family with the rule fitted on the other family, perhaps changed"
    runs = play or fit.runs
    shown = runs.given | everyone
    saved, false = np.zeros(len(runs.oracle)), np.zeros(len(runs.oracle), bool)
    for family in np.unique(runs.family):
        rule = fit.rules[fit.best(may_fit & (runs.family != family), limit, among, sure)]
        s, f = runs.play(reasons(runs.signs, change(rule) if change else rule) > 0)
        here = runs.family == family
        saved[here], false[here] = s[here], f[here]
    return figures(name, saved[shown], false[shown], runs.oracle[shown])


PARTS = {'without broken': dict(broken=10 ** 9), 'without collapsed': dict(collapse=10 ** 9), 'without still': dict(still_gain=-1.0),
         'without waited': dict(patience=1e9)}
SETTINGS = {'without caution': 'caution', 'without the share of evaluations': 'share', 'without a least gain': 'min_delta'}


def ablation(fit: Fit) -> dict[str, float]:
    "All runs with a part left out: what is left after fitting, or fitted anew among the settings without it"
    anyone = np.ones(len(fit.runs.oracle), bool)
    found = across('all parts, all runs', fit, 0.02, anyone, everyone=True)
    for name, change in PARTS.items(): found |= across(name, fit, 0.02, anyone, lambda r, c=change: replace(r, **c), everyone=True)
    for name, setting in SETTINGS.items():
        found |= across(f'{name}, fitted anew', fit, 0.02, anyone, everyone=True, among=np.array([getattr(r, setting) == 0 for r in fit.rules]))
    return found


def standard(run: Any) -> bool:
    "The shipped rule for scorers that hand over a run with values and extra"
    return stopping(run.values, None, run.extra.get('valid_loss'), run.extra.get('train_loss'), RULES['standard']).stop


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--curves', type=Path, required=True, help='folder with librispeech_runs.jsonl.gz')
    ap.add_argument('--logs', type=Path, help='clone of mlcommons/submissions_algorithms: more runs to fit on')
    ap.add_argument('--draws', type=int, default=12000, help='settings that are tried')
    a = ap.parse_args()
    raw = distinct(read_given(a.curves) + (read_logs(a.logs) if a.logs else []))
    runs = prepare(raw)
    anyone = np.ones(len(raw), bool)
    print(f'{int(runs.given.sum())} runs, {int((~runs.given).sum())} more to fit on\n{"rule":40} saved  share                 false stops')
    metrics = rivals(raw, runs)
    fit = Fit(runs, a.draws)
    for limit in LIMITS: metrics |= across(f'limit {limit:g}', fit, limit, anyone)
    for sure in (0.8, 0.9): metrics |= across(f'limit 0.02, kept in {sure:.0%} of resamplings', fit, 0.02, anyone, sure=sure)
    metrics |= ablation(fit)
    metrics |= across('value alone, no losses', fit, 0.02, anyone, play=prepare(raw, losses=False))
    metrics |= across('the loss as the value', fit, 0.02, anyone, play=prepare(raw, value='valid_loss'))
    if a.logs:
        metrics |= across('other family, other methods', fit, 0.02, ~runs.given)
        rule = fit.rules[fit.best(~runs.given, 0.02)]
        saved, false = runs.play(reasons(runs.signs, rule) > 0)
        metrics |= figures('other methods', saved[runs.given], false[runs.given], runs.oracle[runs.given])
    for name, rule in RULES.items():
        saved, false = runs.play(reasons(runs.signs, rule) > 0)
        metrics |= figures(f'shipped: {name} (fitted here too)', saved[runs.given], false[runs.given], runs.oracle[runs.given])
    for name, limit in SHIPPED.items():
        found = fit.rules[fit.best(anyone, limit)]
        print(name, 'as shipped' if found == RULES[name] else f'NOT as shipped: {found}')
    results.save('stop', metrics, runs=int(runs.given.sum()), fitted=int((~runs.given).sum()))


if __name__ == '__main__': main()
