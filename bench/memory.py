"""Memory of a training step beside the public reference's: what is kept for the backward pass, and the peak of the process.

    python bench/memory.py --reference tacotron2
    python bench/memory.py --reference tacotron2 --quick      a small model and short clips, writes nothing

Kept: bytes of all tensors that wait for the backward pass when the forward pass is done, weights and the batch itself left
out, each storage counted once, over the frames of the batch. Peak: the largest resident size of a process of its own that does
two steps and nothing else; libraries, weights, gradients and the moments of Adam are in it, on both sides.
"""
import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import reference
import results
import torch
from train_step import TINY, ReferenceStep, make_batch, our_step, spread

from tts_tuner.config.hparams import HParams
from tts_tuner.data.loader import Batch
from tts_tuner.model.losses import Tacotron2Loss
from tts_tuner.model.tacotron2 import Tacotron2
from tts_tuner.training.memory import peak_memory_mb

WAYS: dict[str, dict[str, object]] = {
    'reference': {}, 'plain': dict(decoder_path='plain'), 'fast': dict(decoder_path='fast'), 'lean': dict(decoder_path='lean'),
    'lean, postnet recomputed': dict(decoder_path='lean', gradient_checkpointing=True)}


def kept_bytes(model: torch.nn.Module, forward: Callable[[], torch.Tensor], batch: Batch) -> int:
    "Bytes that wait for the backward pass after `forward`"
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), batch.text, batch.mel, batch.gate)}
    storages: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # an address must not be given away twice while we count

    def pack(t: torch.Tensor) -> torch.Tensor:
        alive.append(t)
        storage = t.untyped_storage()
        if storage.data_ptr() not in ours: storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): loss = forward()
    loss.backward()
    return sum(storages.values())


def forward_of(way: str, ref: SimpleNamespace, settings: SimpleNamespace, hp: HParams, batch: Batch) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    "Model and loss of one way of computing"
    if way == 'reference':
        step = ReferenceStep(ref, settings, hp, ref.Tacotron2(settings).state_dict())
        return step.model.train(), lambda: step.outputs(batch)[1]
    hp = dataclasses.replace(hp, **WAYS[way])
    model, loss = Tacotron2(hp).train(), Tacotron2Loss(hp)
    return model, lambda: loss(model(batch.text, batch.text_lengths, batch.mel, batch.mel_lengths), batch).total


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference.add_argument(ap)
    ap.add_argument('--batch', type=int, default=8, help='clips')
    ap.add_argument('--frames', type=int, nargs=2, default=(400, 800), metavar=('LOW', 'HIGH'))
    ap.add_argument('--quick', action='store_true', help='tiny, writes nothing')
    ap.add_argument('--peak-of', choices=list(WAYS), help='two steps of one way, then print the peak of this process in MB')
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ref = reference.load(a.reference)
    settings = ref.hparams(**(TINY if a.quick else {}))
    hp = reference.same_settings(settings)
    low, high = (20, 40) if a.quick else a.frames
    batch = make_batch(hp, spread(low // 5, round(high / 5.3), a.batch), spread(low, high, a.batch))
    if a.peak_of:
        weights = ref.Tacotron2(settings).state_dict()
        step = ReferenceStep(ref, settings, hp, weights) if a.peak_of == 'reference' else our_step(dataclasses.replace(hp, **WAYS[a.peak_of]), weights)
        for _ in range(2): step(batch)
        print(peak_memory_mb())
        return
    frames, kept, peak = a.batch * batch.mel.shape[2], {}, {}
    for way in WAYS:
        kept[way] = kept_bytes(*forward_of(way, ref, settings, hp, batch), batch) / 1024 / frames
        print(f'{way:32s}{kept[way]:8.1f} KB a frame kept for backward', flush=True)
    again = [sys.executable, __file__, *sys.argv[1:], '--peak-of']
    for way in WAYS:
        peak[way] = float(subprocess.run([*again, way], capture_output=True, text=True, check=True).stdout.split()[-1])
        print(f'{way:32s}{peak[way]:8.0f} MB at its peak', flush=True)
    print(f'\n{"":32s}{"KB a frame":>12s}{"times less":>12s}{"peak MB":>10s}')
    for way in WAYS: print(f'{way:32s}{kept[way]:12.1f}{kept["reference"] / kept[way]:12.1f}{peak[way]:10.0f}')
    if a.quick: return
    results.save('memory', {'batch': a.batch, 'frames from': low, 'frames to': high, **{f'{w}: KB a frame': round(v, 1) for w, v in kept.items()},
                            **{f'{w}: times less': round(kept['reference'] / kept[w], 2) for w in WAYS if w != 'reference'},
                            **{f'{w}: peak MB': round(v) for w, v in peak.items()}})


if __name__ == '__main__': main()
