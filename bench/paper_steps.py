"""The full-size model takes its first steps on real read speech: does the loss fall?

    python bench/paper_steps.py --corpus DIR

`paper` preset, batch 4, ten steps. Prints the loss of each step and the mean of the last three over the mean of the first three;
0.9 or less is the goal. Neither validation nor a study: this is about the full size being able to learn at all.
"""
import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import results
import torch

from tts_tuner.config.hparams import create_hparams
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import build_features
from tts_tuner.data.loader import BatchStream, TTSDataset, split
from tts_tuner.training.learner import Learner, prepare_machine


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--corpus', type=Path, required=True, help='folder in the LJSpeech layout')
    ap.add_argument('--steps', type=int, default=10)
    ap.add_argument('--batch', type=int, default=4, help='clips')
    ap.add_argument('--threads', type=int, default=torch.get_num_threads())
    a = ap.parse_args()
    hp = create_hparams('paper', f'batch_size={a.batch},max_steps={a.steps},n_validation=2,threads={a.threads}')
    with tempfile.TemporaryDirectory() as folder:
        features = build_features(read_corpus(a.corpus, hp), hp, Path(folder))
        hp = dataclasses.replace(hp, n_symbols=len(features.table))
        learner = Learner(hp, prepare_machine(hp))
        parameters = sum(p.numel() for p in learner.model.parameters())
        print(f'{len(features)} clips, {parameters:,} parameters')
        stream = BatchStream(TTSDataset(features, split(features, hp)[0], hp), hp)
        losses, start = [], time.monotonic()
        for _ in range(a.steps):
            found = learner.learn(next(stream))
            losses.append(float(found['train_loss']))
            print(f'step {learner.step:3d}  loss {losses[-1]:8.4f}  mel {float(found["mel_loss"]):8.4f}  gate {float(found["gate_loss"]):7.4f}  '
                  f'{time.monotonic() - start:6.0f} s', flush=True)
    first, last = sum(losses[:3]) / 3, sum(losses[-3:]) / 3
    print(f'mean of the last three over the first three: {last / first:.3f}')
    results.save('paper_steps', dict(steps=a.steps, batch=a.batch, loss_first_3=round(first, 4), loss_last_3=round(last, 4), ratio=round(last / first, 4),
                                     seconds=round(time.monotonic() - start), parameters=parameters))


if __name__ == '__main__': main()
