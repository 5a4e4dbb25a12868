"""How fast two trainings that ought to be the same drift apart: the fast path beside the plain one, and the plain one beside itself.

    python bench/drift.py --corpus data/demo

The same seed, clips and settings of the small preset. The control is the plain path again with its first weights changed by a
relative 1e-7, the size of one rounding in fp32. Relative differences of the training loss at some steps: if the fast path
drifts no faster than the control, what its runs differ by is rounding. `data/demo` is what `make demo` leaves behind.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import results
import torch

from tts_tuner.config.hparams import HParams, create_hparams
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import FeatureSet, build_features
from tts_tuner.data.loader import BatchStream, TTSDataset, split
from tts_tuner.training.learner import Learner, prepare_machine

STEPS = (1, 3, 6, 11, 21, 41, 60)


def losses(hp: HParams, features: FeatureSet, change: float = 0.0) -> list[float]:
    "Training loss of each step, the first weights changed by a relative `change`"
    prepare_machine(hp)
    learner = Learner(hp)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in learner.model.parameters(): p.mul_(1 + change * torch.randn(p.shape, generator=noise))
    stream = BatchStream(TTSDataset(features, split(features, hp)[0], hp), hp)
    return [float(learner.learn(next(stream))['train_loss']) for _ in range(STEPS[-1])]


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--corpus', type=Path, required=True, help='folder in the LJSpeech layout')
    ap.add_argument('--cache', type=Path, default=Path('data/cache'), help='features')
    a = ap.parse_args()
    hp = create_hparams('small')
    features = build_features(read_corpus(a.corpus, hp), hp, a.cache)
    hp = replace(hp, n_symbols=len(features.table), decoder_path='plain')
    plain, fast, control = losses(hp, features), losses(replace(hp, decoder_path='fast'), features), losses(hp, features, 1e-7)
    metrics: dict[str, float] = {}
    for step in STEPS:
        base = plain[step - 1]
        metrics |= {f'step {step}: fast path': abs(fast[step - 1] - base) / base, f'step {step}: control': abs(control[step - 1] - base) / base}
        print(f'step {step:3d}  loss {base:.4f}  fast path {metrics[f"step {step}: fast path"]:.0e}  control {metrics[f"step {step}: control"]:.0e}')
    results.save('drift', metrics)


if __name__ == '__main__': main()
