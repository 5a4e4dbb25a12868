"""The demonstration, as `make demo` runs it, for several seeds.

    python bench/demo.py --seeds 1 2 3
    python bench/demo.py --seeds 1 2 3 --path plain      the same with the decoder step by step, to compare

Each seed gets a study of its own, runs/bench-demo-SEED; one that is finished is only read. The seconds include making the
corpus and its features the first time. Processor seconds are those of all processes of a study; other work on the machine
hardly shows in them.
"""
import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import results


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seeds', type=int, nargs='+', default=[1, 2, 3])
    ap.add_argument('--path', choices=['auto', 'plain'], default='auto', help='decoder_path')
    ap.add_argument('--prefix', default='bench-demo', help='first part of the studies\' names')
    a = ap.parse_args()
    kind = 'demo' if a.path == 'auto' else f'demo_{a.path}'
    for seed in a.seeds:
        study = Path('runs') / '-'.join([a.prefix, *([a.path] if a.path != 'auto' else []), str(seed)])
        start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, '-m', 'tts_tuner.cli', 'run', '--study', study.name, '--seed', str(seed), f'hparams.decoder_path={a.path}'], check=True)
        seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        numbers = {'seed': seed, 'seconds': round(seconds), 'processor_seconds': round(processor), **results.final_metrics(study)}
        results.save(kind, numbers, file=f'{kind}-{seed}')


if __name__ == '__main__': main()
