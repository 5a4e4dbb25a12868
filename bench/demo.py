"""The demonstration, as `make demo` runs it, for several seeds.

    python bench/demo.py --seeds 1 2 3

Each seed gets a study of its own, runs/bench-demo-SEED; one that is finished is only read. The seconds include making the
corpus and its features the first time.
"""
import argparse
import subprocess
import sys
import time
from pathlib import Path

import results


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    ap.add_argument('--prefix', default='bench-demo', help='first part of the studies\' names')
    a = ap.parse_args()
    for seed in a.seeds:
        study, start = Path('runs') / f'{a.prefix}-{seed}', time.monotonic()
        subprocess.run([sys.executable, '-m', 'tts_tuner.cli', 'run', '--study', study.name, '--seed', str(seed)], check=True)
        seconds = time.monotonic() - start
        results.save('demo', {'seed': seed, 'seconds': round(seconds), **results.final_metrics(study)}, file=f'demo-{seed}')


if __name__ == '__main__': main()
