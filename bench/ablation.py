"""What each voter adds when a single run is to be stopped, on recorded runs.

    python bench/ablation.py --curves DATA/curves [--every 2] [--recorded bench/curves/tacotron2.jsonl.gz]

Every voter is asked after every evaluation, then votes are counted in all the ways there are: each voter alone, patience and the
fitted rule, attention with statistics, the ensemble, the ensemble with one voter less, the fitted rule with a voter's consent or
with the ensemble beside it. LibriSpeech runs have no attention scores: that voter abstains there. On Tacotron 2 runs the value
is the validation loss. Figures as in bench/stop.py; the fitted rule was fitted to the LibriSpeech runs, see there for figures on
runs of another family.
"""
import argparse
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import results
from stop import TOLERANCE, distinct, figures, read_given

from tts_tuner.signals.forecast import forecast
from tts_tuner.signals.patience import PatienceRule, patience
from tts_tuner.signals.series import Abstention
from tts_tuner.signals.stopping import stopping
from tts_tuner.signals.trend import statistics_opinion
from tts_tuner.signals.vote import Switches, Vote, attention_vote, bayesian_vote, decide, patience_vote, statistics_vote
from tts_tuner.signals.will_it_align import will_it_align

CODES = {'stop': 1, 'continue': 0, 'abstain': -1}
FIRST, WORTH, FRESH = 6, 0.005, 5  # evaluations before anybody is asked; share of the best value worth waiting for; evaluations a fit is kept


def finite_prefix(x: np.ndarray) -> np.ndarray:
    "Series for voters that cannot see NaN: what is not finite is twice as bad as the worst so far"
    finite = np.isfinite(x)
    return np.where(finite, x, 2 * np.abs(x[finite]).max() if finite.any() else 1.0)


def ask(run: dict[str, Any]) -> dict[str, np.ndarray]:
    "Codes of every voter at every evaluation"
    t, v = np.array(run['step'], float), np.array(run['value'], float)
    n, said = len(v), {k: np.full(len(v), -1) for k in ('plain', 'fitted', 'statistics', 'bayesian', 'attention')}
    kept = None
    for i in range(1, n + 1):
        loss, training = (np.array(run[k][:i], float) if run.get(k) is not None else None for k in ('loss', 'training'))
        votes = {'plain': patience_vote(patience(v[:i], rule=PatienceRule(15, 0.0))),
                 'fitted': patience_vote(stopping(v[:i], t[:i], loss, training))}
        if i >= FIRST:
            x = finite_prefix(v[:i])
            votes['statistics'] = statistics_vote(statistics_opinion(x, t[:i], worth=WORTH))
            seen = forecast(x, t[:i], settings=kept if i % FRESH else None)
            if not isinstance(seen, Abstention): kept = seen.settings
            votes['bayesian'] = bayesian_vote(seen if isinstance(seen, Abstention) else seen.gain(WORTH * abs(seen.best)))
        if 'attention' in run:
            whole = {k: s[:i] for k, s in run['validation'].items()}
            verdict = will_it_align(whole, t[:i], run['budget'])
            votes['attention'] = attention_vote(np.array(run['attention'][:i], float), verdict)
        for k, vote in votes.items(): said[k][i - 1] = CODES[vote.says]
    return said


def counted(said: dict[str, np.ndarray], switches: Switches) -> np.ndarray:
    "Does the vote stop, at each evaluation?"
    words = {code: says for says, code in CODES.items()}
    votes = zip(*(said[k] for k in ('fitted', 'statistics', 'bayesian', 'attention')))
    names = ('patience', 'statistics', 'bayesian', 'attention')
    return np.array([decide([Vote(v, words[int(c)]) for v, c in zip(names, codes)], switches).stop for codes in votes])


def ways(said: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    "All ways of counting: where each of them would stop"
    yes = {k: s == 1 for k, s in said.items()}
    every = counted(said, Switches(level=3))
    found = {'patience 15': yes['plain'], 'fitted rule (level 1)': yes['fitted'], 'statistics alone': yes['statistics'], 'bayesian alone': yes['bayesian'],
             'attention alone': yes['attention'], 'attention and statistics (level 2)': counted(said, Switches(level=2)), 'ensemble (level 3)': every}
    for voter in ('statistics', 'bayesian', 'attention'): found[f'ensemble without {voter}'] = counted(said, Switches(level=3, **{voter: False}))
    for voter in ('statistics', 'bayesian', 'attention'): found[f'fitted rule unless {voter} says continue'] = yes['fitted'] & (said[voter] != 0)
    return found | {'fitted rule or ensemble': yes['fitted'] | every}


def cost(run: dict[str, Any], stop: np.ndarray) -> tuple[float, float, bool]:
    "Saved, saved by the oracle, and was it a false stop"
    t, v = np.array(run['step'], float), np.array(run['value'], float)
    v = np.where(np.isfinite(v), v, np.inf)
    at = int(stop.argmax()) if stop.any() else len(v) - 1
    oracle = int(np.argmax(v <= v.min() * (1 + TOLERANCE)))
    return 1 - t[at] / t[-1], 1 - t[oracle] / t[-1], bool(v[:at + 1].min() > v.min() * (1 + TOLERANCE))


def table(name: str, runs: list[dict[str, Any]]) -> dict[str, float]:
    "One row a way of counting"
    print(f'{name}: {len(runs)} runs\n{"":40} saved  share                 false stops')
    said = [ways(ask(r)) for r in runs]
    metrics: dict[str, float] = {}
    for way in said[0]:
        saved, oracle, false = (np.array(c) for c in zip(*(cost(r, s[way]) for r, s in zip(runs, said))))
        metrics |= {f'{name}, {k}': v for k, v in figures(way, saved, false, oracle).items()}
    return metrics


def speech_runs(curves: Path, every: int) -> list[dict[str, Any]]:
    "LibriSpeech runs as voters take them"
    return [dict(step=r['step'], value=r['valid_wer'], loss=r['valid_loss'], training=r['train_loss']) for r in distinct(read_given(curves))[::every]]


def own_runs(path: Path) -> list[dict[str, Any]]:
    "Recorded Tacotron 2 runs as voters take them; those with ten finite validations"
    if path.is_dir(): found = [json.loads(p.read_text()) for p in sorted(path.glob('*.json'))]
    else:
        with gzip.open(path, 'rt') as f: found = [json.loads(line) for line in f]
    runs = []
    for r in found:
        v = r['validation']
        value = np.array(v['val_loss'], float)
        if np.isfinite(value).sum() < 10: continue
        steps = np.rint(np.array(r['step'], float)).astype(int)
        trained = np.array(r['each_step']['train_loss'], float)
        training = trained[np.minimum(steps, len(trained)) - 1]
        runs.append(dict(step=r['step'], value=value, loss=value, training=training, attention=v['alignment_score'], validation=v, budget=r['budget']))
    return runs


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--curves', type=Path, help='folder with librispeech_runs.jsonl.gz')
    ap.add_argument('--every', type=int, default=1, help='take every so many of its runs')
    ap.add_argument('--recorded', type=Path, help='Tacotron 2 runs packed by bench/record_runs.py, or the folder of its parts')
    a = ap.parse_args()
    if not a.curves and not a.recorded: sys.exit('Give --curves, --recorded or both.')
    metrics: dict[str, float] = {}
    if a.curves: metrics |= table('LibriSpeech', speech_runs(a.curves, a.every))
    if a.recorded: metrics |= table('Tacotron 2', own_runs(a.recorded))
    results.save('ablation', metrics)


if __name__ == '__main__': main()
