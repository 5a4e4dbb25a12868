"""What it costs to ask all voters about one new evaluation.

    python bench/voters.py

Statistics, forecaster, attention and both patience rules on each of the last evaluations of runs in bench/curves/, one after the other as they would come
in; the forecaster once with its settings from the evaluation before and once weighing them anew. Processor milliseconds, median over evaluations.
"""
import gzip
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import results

from tts_tuner.signals.forecast import RULE, forecast, weigh
from tts_tuner.signals.patience import patience
from tts_tuner.signals.stopping import stopping
from tts_tuner.signals.trend import statistics_opinion
from tts_tuner.signals.vote import attention_vote
from tts_tuner.signals.will_it_align import FULL, will_it_align

RUNS, LAST = 12, 12  # runs, evaluations of each
NAMES = {n.removeprefix('best_') for n in FULL}


def milliseconds(ask: Callable[..., Any], *args: Any, **more: Any) -> float:
    "Processor time of one call"
    start = time.process_time()
    ask(*args, **more)
    return 1000 * (time.process_time() - start)


def foresee(y: np.ndarray, t: Sequence[int], until: int, settings: Any) -> None: forecast(y, t, until, settings=settings).gain(0.005)


def attend(columns: Mapping[str, np.ndarray], t: Sequence[int], budget: int) -> None:
    attention_vote(columns['alignment_score'], will_it_align(columns, t, budget))


def wait(y: np.ndarray, t: Sequence[int]) -> None:
    patience(y, t)
    stopping(y, t, y)


def spent_on(run: Mapping[str, Any], n: int) -> dict[str, float]:
    "Processor milliseconds of each voter at the evaluation `n` of a run"
    y, t, budget = np.array(run['validation']['val_loss'][:n], float), run['step'][:n], run['budget']
    columns = {k: np.array(run['validation'][k][:n], float) for k in NAMES}
    voters = {'statistics': milliseconds(statistics_opinion, y, t),
              'forecaster between refits': milliseconds(foresee, y, t, budget + 1, weigh(y[:-1], t[:-1])),
              'attention': milliseconds(attend, columns, t, budget),
              'patience, both rules': milliseconds(wait, y, t)}
    return {**voters, 'all': sum(voters.values()), 'refit of the forecaster': milliseconds(weigh, y, t)}


def main() -> None:
    packed = (Path(__file__).parent / 'curves/tacotron2.jsonl.gz').read_bytes()
    runs = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
    whole = [r for r in runs if len(r['step']) >= 30 and all(None not in r['validation'][n] for n in ('val_loss', *NAMES))][:RUNS]
    rows = [spent_on(run, n) for run in whole for n in range(len(run['step']) - LAST, len(run['step']))]
    metrics: dict[str, float] = {'evaluations': len(rows), 'settings the forecaster weighs': RULE.settings}
    for name in rows[0]:
        times = [r[name] for r in rows]
        metrics |= {f'{name}: milliseconds': statistics.median(times), f'{name}: slowest twentieth': float(np.quantile(times, 0.95))}
    for k, v in metrics.items(): print(f'{k:50} {v:.2f}')
    results.save('voters', metrics)


if __name__ == '__main__': main()
