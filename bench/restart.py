"""From SIGINT to the first step of the next generation: how long a training stands still when it is restarted with other settings.

    python bench/restart.py --corpus data/demo

A real trainer of the small preset is asked to end right after its validation and checkpoint, as the tuner asks it, and the next one starts from
the best checkpoint with another learning rate. Seconds of wall clock, parted into: the old trainer saves and ends; the new one
starts its interpreter and imports; reads corpus, features and checkpoint; does its first step. A noisy machine makes all of them
longer, so the median of the repeats is given beside the longest. `data/demo` is what `make demo` leaves behind.
"""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import results

from tts_tuner.tuner.ledger import checkpoint_at, second_name
from tts_tuner.tuner.trainer_wrapper import TRAINER, TrainerJob, TrainerProcess, stop_trainers
from tts_tuner.tuner.trials import read_status

PARTS = ('the old one ends', 'interpreter and imports', 'corpus, features, checkpoint', 'first step')


def wait(condition, seconds: float = 120.0) -> float:
    "Wait until something is so; the time it was"
    end = time.time() + seconds
    while not condition():
        if time.time() > end: raise TimeoutError
        time.sleep(0.005)
    return time.time()


def said(folder: Path, words: str) -> bool:
    "Does train.log hold these words?"
    return (folder / 'train.log').exists() and words in (folder / 'train.log').read_text()


def first_row(folder: Path) -> float:
    "Time of the first step in metrics.jsonl, 0 before there is one"
    try: return float(json.loads((folder / 'metrics.jsonl').read_text().splitlines()[0])['time'])
    except (FileNotFoundError, IndexError, ValueError): return 0.0


def once(corpus: str, cache: str, home: Path, steps: int) -> list[float]:
    "One restart, in its parts"
    settings = dict(max_steps=900, eval_every=steps, checkpoint_every=steps, device='cpu')
    folders = [home / 't000' / g for g in ('g001', 'g002')]
    job = lambda folder, **more: TrainerJob('t000', folder, corpus, 'small', settings | more, None, cache)
    old = TrainerProcess(job(folders[0]))
    wait(lambda: read_status(folders[0]).get('saved') == steps)
    asked = time.time()
    stop_trainers([old])
    ended = time.time()
    source = checkpoint_at(folders[0], steps)
    assert source is not None
    second_name(source, folders[1] / 'start.pt')
    new = TrainerProcess(job(folders[1], learning_rate=5e-3), (*TRAINER, '--checkpoint-path', str(folders[1] / 'start.pt')))
    awake = wait(lambda: bool(read_status(folders[1])))
    ready = wait(lambda: said(folders[1], 'Settings that change'))
    wait(lambda: first_row(folders[1]) > 0)
    first = first_row(folders[1])
    stop_trainers([new])
    return [ended - asked, awake - ended, ready - awake, first - ready]


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--corpus', required=True, help='folder in the LJSpeech layout')
    ap.add_argument('--cache', default='data/cache', help='features')
    ap.add_argument('--repeats', type=int, default=5)
    ap.add_argument('--steps', type=int, default=20, help='steps before the restart')
    a = ap.parse_args()
    found = []
    for i in range(a.repeats):
        with tempfile.TemporaryDirectory() as home: found.append(once(a.corpus, a.cache, Path(home), a.steps))
        print(f'restart {i + 1}: {sum(found[-1]):.2f} s = ' + ' + '.join(f'{s:.2f} {name}' for s, name in zip(found[-1], PARTS)), flush=True)
    whole = [sum(parts) for parts in found]
    metrics = {'median seconds': statistics.median(whole), 'longest': max(whole), 'repeats': float(len(whole))}
    metrics |= {f'of it: {name}': statistics.median(parts[i] for parts in found) for i, name in enumerate(PARTS)}
    print(f'SIGINT to first step: median {metrics["median seconds"]:.2f} s, longest {metrics["longest"]:.2f} s')
    results.save('restart', metrics)


if __name__ == '__main__': main()
