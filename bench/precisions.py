"""Speech of a trained voice in fp32, bf16 and int8 on held-out sentences that were never spoken before.

    python bench/precisions.py --model runs/demo/best_model.pt --corpus data/demo
    python bench/precisions.py --model runs/demo/best_model.pt --corpus data/demo --sentences 6 --seeds 1    to see that it runs

Every precision speaks every sentence by itself with the same dropout of the prenet. Dropout alone makes two readings differ,
so each is spoken with several seeds, and what rounding does has to be read beside what another seed does.
"""
import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import results
import torch

from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import build_features
from tts_tuner.model.speaking import PRECISIONS, StepwiseDecoder
from tts_tuner.training.evaluate import Evaluation, Evaluator, anchors, fixed_randomness
from tts_tuner.training.trainer import load, split

SHOWN = ('success', 'stop_rate', 'distance_ratio', 'score', 'duration_ratio')


class Reader:
    "One evaluator for all precisions and seeds, a sentence at a time"

    def __init__(self, model_file: Path, corpus: Path, cache: Path, sentences: int):
        self.model, hp, _, voice = load(model_file)
        features = build_features(read_corpus(corpus, hp), hp, cache)
        train, held = split(features, hp)
        fresh = list(held)[:-hp.n_free_running][:sentences]
        self.hp, self.step = replace(hp, n_free_running=len(fresh)), int(voice['step'])
        self.evaluator = Evaluator(features, fresh, self.hp, anchor=anchors(features, train, fresh, self.hp, cache, n_copies=0))
        self.evaluator.free = [([clip], batch) for clip in fresh for _, batch in self.evaluator._batches([clip])]
        self.evaluator.teacher = self.evaluator.teacher[:1]
        self.speak, self.sentences = self.model.infer, len(fresh)

    def read(self, precision: str, seed: int) -> tuple[Evaluation, str]:
        "Numbers of one precision and seed, and a sentence where another precision had to be used"
        decoder = StepwiseDecoder(self.model.decoder, self.hp, precision)
        self.model.infer = lambda *args, **kw: self.speak(*args, decoder=decoder, **kw)  # type: ignore[method-assign]
        self.evaluator.hp = replace(self.hp, seed=seed)
        return self.evaluator.run(self.model, self.step), decoder.note

    def first_frames(self, precision: str, steps: int = 20) -> torch.Tensor:
        "Frames of the first steps of all sentences, before differences have fed on themselves"
        decoder = StepwiseDecoder(self.model.decoder, self.hp, precision)
        with fixed_randomness(0), torch.no_grad():
            said = [self.speak(b.text, b.text_lengths, steps, decoder=decoder, warn=False).mel_postnet for _, b in self.evaluator.free]
        return torch.cat([s.flatten() for s in said])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--model', type=Path, required=True, help='best_model.pt of a study')
    ap.add_argument('--corpus', type=Path, required=True, help='the corpus it was trained on')
    ap.add_argument('--cache', type=Path, default=Path('data/cache'), help='feature cache')
    ap.add_argument('--sentences', type=int, default=36)
    ap.add_argument('--seeds', type=int, default=3)
    ap.add_argument('--dry', action='store_true', help='write nothing')
    a = ap.parse_args()
    torch.set_num_threads(1)
    reader = Reader(a.model, a.corpus, a.cache, a.sentences)
    full, metrics = reader.first_frames('fp32'), {'sentences': float(reader.sentences), 'seeds': float(a.seeds)}
    print(f'{reader.sentences} sentences\n{"precision":12s}{"seed":>6s}' + ''.join(f'{k:>16s}' for k in SHOWN))
    for precision in PRECISIONS:
        found = []
        for seed in range(1, a.seeds + 1):
            spoken, note = reader.read(precision, seed)
            if note: raise SystemExit(note)
            found.append(spoken.metrics)
            print(f'{precision:12s}{seed:6d}' + ''.join(f'{spoken.metrics[k]:16.4f}' for k in SHOWN), flush=True)
        for k in SHOWN: metrics[f'{precision}: {k}'] = float(np.mean([f[k] for f in found]))
        for k, worst in (('success', min), ('distance_ratio', max)): metrics[f'{precision}: worst {k}'] = float(worst(f[k] for f in found))
        metrics[f'{precision}: frame difference'] = float((reader.first_frames(precision) - full).abs().mean() / full.std())
        print(f'{precision:12s}  mean' + ''.join(f'{metrics[f"{precision}: {k}"]:16.4f}' for k in SHOWN)
              + f'   first frames differ by {metrics[f"{precision}: frame difference"]:.4f} of a deviation')
    if not a.dry: results.save('precisions', {k: float(f'{v:.4g}') for k, v in metrics.items()})


if __name__ == '__main__': main()
