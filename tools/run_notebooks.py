"""Run every notebook as a test, print its time, and hold the whole to a budget.

The cells run as `nbdev-test` runs them (same function, same flags); this adds exact times and a budget for the sum.
"""
import argparse
import contextlib
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(path: Path) -> tuple[str, bool, float]:
    "Name, outcome and seconds of one notebook"
    from nbdev.config import get_config
    from nbdev.test import test_nb
    cfg = get_config(ROOT)
    flags = cfg.tst_flags if isinstance(cfg.tst_flags, list) else cfg.tst_flags.split()
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():  # filters that one notebook sets do not reach the next
        passed, seconds = test_nb(path, skip_flags=flags, basepath=ROOT, cell_timeout=cfg.cell_timeout)
    return str(path.relative_to(ROOT)), passed, seconds


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument('--workers', type=int, default=2)
    ap.add_argument('--budget', type=float, default=150, help='seconds for all notebooks together')
    ap.add_argument('--only', type=Path, nargs='+', help='these notebooks instead of all')
    a = ap.parse_args()
    os.chdir(ROOT)
    paths = [p.resolve() for p in a.only or ()] or sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    start, rows = time.monotonic(), []
    from run_notebooks import run as worker  # under its own name: a running notebook takes the place of __main__
    with ProcessPoolExecutor(a.workers, multiprocessing.get_context('spawn')) as pool:  # a Pool's workers may not start processes, some notebooks do
        for done in as_completed([pool.submit(worker, p) for p in paths]):
            rows.append(row := done.result())
            print(f'{"ok  " if row[1] else "FAIL"} {row[2]:6.1f} s  {row[0]}', flush=True)
    wall, times = time.monotonic() - start, [r[2] for r in rows]
    print(f'{len(rows)} notebooks in {wall:.0f} s; median {statistics.median(times):.1f} s, longest {max(times):.1f} s')
    failed = [r[0] for r in rows if not r[1]]
    if failed: sys.exit('Notebooks that failed: ' + ', '.join(sorted(failed)))
    if wall > a.budget: sys.exit(f'The notebooks took {wall:.0f} s, more than the {a.budget:g} s they may take together.')


if __name__ == '__main__': main()
