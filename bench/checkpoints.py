"""What a checkpoint costs training: written at once, or beside it; plain, or gzipped.

    python bench/checkpoints.py              the full-size model, 28 million weights and two moments for each
    python bench/checkpoints.py --quick      the demo's model, writes nothing

Every way trains the same steps and saves once in between. `seconds` is how long the training thread stood still for the save,
`seconds lost` how much longer all steps took than without a save (the writer uses a core too, if there is one to spare), `until
on disk` when the file had its name. Wall time, median of the repeats.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import results
import torch
from train_step import make_batch, spread

from tts_tuner.config.hparams import create_hparams, to_dict
from tts_tuner.data.loader import Batch
from tts_tuner.training.background import Saver
from tts_tuner.training.checkpoint import CheckpointFolder, load_checkpoint, rng_state
from tts_tuner.training.learner import Learner

WAYS = {'at once': (False, False), 'beside training': (True, False), 'at once, gzip': (False, True), 'beside training, gzip': (True, True)}


def steps(learner: Learner, batch: Batch, count: int) -> float:
    "Wall seconds of `count` steps"
    start = time.perf_counter()
    for _ in range(count): learner.learn(batch)
    return time.perf_counter() - start


def one_save(learner: Learner, batch: Batch, saver: Saver, step_seconds: float, most: int) -> tuple[float, float, float, float]:
    "Seconds stood still, seconds lost in all, seconds until the file was there, and its size in MB"
    landed: list[float] = []
    begun = time.perf_counter()
    saver.save(dict(learner.state(), rng=rng_state(), hparams=to_dict(learner.hp)), then=lambda: landed.append(time.perf_counter()))
    stood, done = time.perf_counter() - begun, 0
    while done < most and not landed:
        learner.learn(batch)
        done += 1
    lost = time.perf_counter() - begun - done * step_seconds
    saver.wait()
    if int(load_checkpoint(saver.folder.last)['step']) != learner.step - done: raise SystemExit('The file does not hold the step it was saved at.')
    return stood, lost, landed[0] - begun, saver.folder.last.stat().st_size / 1e6


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--folder', type=Path, help='where to write; a temporary folder when not given')
    ap.add_argument('--repeats', type=int, default=3)
    ap.add_argument('--steps', type=int, default=200, help='most steps beside one save')
    ap.add_argument('--quick', action='store_true', help='small model, one repeat, writes nothing')
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    hp = create_hparams('small' if a.quick else 'paper', dict(n_symbols=148))
    batch, learner = make_batch(hp, spread(10, 20, 4), spread(40, 80, 4)), Learner(hp)
    steps(learner, batch, 3)
    figures: dict[str, list[tuple[float, float, float, float]]] = {way: [] for way in WAYS}
    usual: list[float] = []
    with tempfile.TemporaryDirectory(dir=a.folder) as place:
        savers = {way: Saver(CheckpointFolder(Path(place) / way, keep=1, compress=packed), beside) for way, (beside, packed) in WAYS.items()}
        for turn in range(1 if a.quick else a.repeats + 1):
            for way, saver in savers.items():
                usual.append(steps(learner, batch, 5) / 5)
                found = one_save(learner, batch, saver, usual[-1], a.steps)
                if turn or a.quick: figures[way].append(found)  # the first save takes the memory that later ones use again
    words = ('seconds', 'seconds lost', 'until on disk', 'MB')
    middle = {way: [statistics.median(column) for column in zip(*rows)] for way, rows in figures.items()}
    step = statistics.median(usual)
    print(f'a step takes {step:.3f} s\n{"":24s}' + ''.join(f'{w:>16s}' for w in words))
    for way, row in middle.items(): print(f'{way:24s}' + ''.join(f'{x:16.3f}' for x in row))
    ratio = middle['at once'][3] / middle['at once, gzip'][3]
    print(f'gzip makes the file {ratio:.3f} times smaller and takes {middle["at once, gzip"][0] / middle["at once"][0]:.1f} times as long')
    if a.quick: return
    results.save('checkpoints', {'seconds of a step': round(step, 3), 'gzip: times smaller': round(ratio, 3),
                                 **{f'{way}: {w}': round(x, 3) for way, row in middle.items() for w, x in zip(words, row)}})


if __name__ == '__main__': main()
