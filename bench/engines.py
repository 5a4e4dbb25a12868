"""What each engine adds to a trial: processor time of ask and tell, late in studies of 100 and of 300 trials.

    make test-engines && .venv-engines/bin/python bench/engines.py

The search is that of `ask_tell.py`, thirteen parameters; trials are told at once. Every engine runs in the same process, one study after the
other; the figure is the median over the last ten trials of a study. Engines that are not installed are left out. Hyperopt and Ray's searcher
are told the whole study at each proposal, so their cost grows with it.
"""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')

import results
from ask_tell import PLAN, score

from tts_tuner.config.errors import UserError
from tts_tuner.tuner.engines import ENGINES, make_engine


def measure(name: str, trials: int) -> float:
    "Milliseconds of processor time that ask and tell take at the end of a study"
    with tempfile.TemporaryDirectory() as folder:
        engine, spent = make_engine(name, PLAN, Path(folder) / 'study.journal'), []
        for n in range(trials):
            begun = time.process_time()
            engine.ask(n + 1)
            params = engine.trials()[n].params
            engine.tell(n, 'complete', score(params))
            spent.append(time.process_time() - begun)
        engine.close()
    return 1000 * statistics.median(spent[-10:])


def main() -> None:
    "Measure and save"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--trials', type=int, nargs='+', default=[100, 300], help='lengths of the studies')
    args = parser.parse_args()
    metrics: dict[str, float] = {}
    for name in ENGINES:
        try: metrics |= {f'{name}_ms_at_{n}': measure(name, n) for n in args.trials}
        except UserError as e: print(e)
        else: print(f'{name:9}', '  '.join(f'{metrics[f"{name}_ms_at_{n}"]:7.1f} ms at {n} trials' for n in args.trials))
    results.save('engines', metrics)


if __name__ == '__main__': main()
