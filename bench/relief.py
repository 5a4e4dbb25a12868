"""Does easing the learning rate help when gradients jump, beside clipping alone?

    python bench/relief.py --corpus DIR [--steps 250] [--seeds 3]

The small preset on a corpus, four times for each seed: undisturbed; with every third gradient of steps 100 to 160 replaced by a random one thirty times
as long ("kicks"); with the spectrograms of those batches ten times too large ("bad clips"); and with ten times the learning rate ("hot"). Each with clipping
alone and with relief beside it; where relief never moved, the two are one run. Prints the loss of frames after the postnet on held-out clips, teacher forced,
lower is better, and what relief did.
"""
import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import results
import torch

from tts_tuner.config.hparams import create_hparams
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import FeatureSet, build_features
from tts_tuner.data.loader import BatchStream, TTSDataset, split
from tts_tuner.training.evaluate import fixed_randomness, speaking
from tts_tuner.training.guard import NonFinite
from tts_tuner.training.learner import Learner, prepare_machine

TROUBLE = range(100, 160, 3)  # steps at which it happens
TIMES = 30  # length of a kick over the true gradient's
CASES = ('undisturbed', 'kicks', 'bad clips', 'hot')


class Kicked(Learner):
    "A learner some of whose gradients are replaced"
    kicks: range | tuple[int, ...] = ()

    def clip(self):
        if self.step in self.kicks:
            draw = torch.Generator().manual_seed(self.step)
            grads = [w.grad for w in self.model.parameters() if w.grad is not None]
            noise = [torch.randn(g.shape, generator=draw) for g in grads]
            length = lambda many: torch.stack([x.norm() for x in many]).norm()
            scale = TIMES * length(grads) / length(noise)
            for g, n in zip(grads, noise): g.copy_(n * scale)
        return super().clip()


def run(features: FeatureSet, case: str, seed: int, steps: int, relief: bool) -> tuple[float, int, float]:
    "Loss on held-out clips, easings, lowest share of the learning rate"
    rate = 1e-1 if case == 'hot' else 1e-2
    hp = create_hparams('small', dict(seed=seed, max_steps=steps, learning_rate=rate, lr_relief=relief, device='cpu', threads=1, n_validation=24))
    hp = dataclasses.replace(hp, n_symbols=len(features.table))
    prepare_machine(hp)
    learner = Kicked(hp)
    if case == 'kicks': learner.kicks = TROUBLE
    train, held = split(features, hp)
    stream, eased, least = BatchStream(TTSDataset(features, train, hp), hp), 0, 1.0
    try:
        for _ in range(steps):
            batch = next(stream)
            if case == 'bad clips' and learner.step in TROUBLE: batch = dataclasses.replace(batch, mel=batch.mel * 10)
            learner.learn(batch)
            least = min(least, learner.relief.share)
    except NonFinite: return float('inf'), 0, least
    eased = sum(c.new < c.old for c in learner.changes)
    losses = []
    with fixed_randomness(0), speaking(learner.model):
        valid = BatchStream(TTSDataset(features, held, hp), dataclasses.replace(hp, bucket_batches=1))
        for _ in range(len(valid)): losses.append(float(learner.loss_of(next(valid)).mel_postnet))
    return statistics.mean(losses), eased, least


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--corpus', type=Path, required=True, help='folder in the LJSpeech layout')
    ap.add_argument('--steps', type=int, default=250)
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--cases', nargs='*', default=CASES, choices=CASES)
    a = ap.parse_args()
    hp = create_hparams('small', 'device=cpu,threads=1,n_validation=24')
    table: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        features = build_features(read_corpus(a.corpus, hp), hp, Path(folder))
        for case in a.cases:
            for seed in range(a.seeds):
                loss, eased, least = run(features, case, seed, a.steps, relief=True)
                alone = run(features, case, seed, a.steps, relief=False)[0] if eased else loss
                table.setdefault(case, []).append(dict(clipping=alone, relief=loss, eased=eased, least=least))
                print(f'{case:12s} seed {seed}: clipping alone {alone:.4f}, with relief {loss:.4f}, eased {eased} times, down to {least:g}', flush=True)
    metrics: dict[str, float] = {}
    for case, rows in table.items():
        clipping, eased = (statistics.median(r[k] for r in rows) for k in ('clipping', 'relief'))
        print(f'{case:12s} median: clipping alone {clipping:.4f}, with relief {eased:.4f}')
        name = case.replace(' ', '_')
        metrics |= {f'{name}_clipping': round(clipping, 4), f'{name}_relief': round(eased, 4), f'{name}_easings': sum(r['eased'] for r in rows)}
    results.save('relief', dict(steps=a.steps, seeds=a.seeds, **metrics))


if __name__ == '__main__': main()
