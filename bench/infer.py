"""Speaking beside the public reference: same weights, same text, same dropout of the prenet, one process, turn by turn.

    python bench/infer.py --reference tacotron2            full size, 110 symbols, batches of 1, 4 and 8, one thread (about 4 minutes)
    python bench/infer.py --reference tacotron2 --quick    a small model and few frames, to see that it runs

Figures are milliseconds of processor time of this process for a decoder frame of one utterance, the best of the repeats. The
reference speaks one utterance at a time, so every batch is compared with that. Before anything is timed the fp32 decoder must
say what the reference says. Large weights come from memory at every frame: other programs that use the same memory slow both
down, and eight bits most, which would fit the processor's cache; measure on a quiet machine.
"""
import argparse
import contextlib
import io
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import reference
import results
import torch
import torch.nn.functional as F
from torch import Tensor

from tts_tuner.config.hparams import HParams
from tts_tuner.model.speaking import PRECISIONS, StepwiseDecoder, Steps
from tts_tuner.model.tacotron2 import Tacotron2

TINY = dict(symbols_embedding_dim=64, encoder_embedding_dim=64, decoder_rnn_dim=96, attention_rnn_dim=96, prenet_dim=32, postnet_embedding_dim=64)
SYMBOLS = 110


@contextlib.contextmanager
def drawn_from(ref: SimpleNamespace, generator: torch.Generator):
    "Dropout of the reference drawn from `generator`, as our prenet draws it"
    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(1 - p, generator=generator).div_(1 - p) if training and p > 0 else x
    ref.module.F = SimpleNamespace(**{**vars(F), 'dropout': dropout})
    try: yield
    finally: ref.module.F = F


def reference_speech(theirs: Any, memory: Tensor, frames: int) -> list[Tensor]:
    "The reference's decoder for so many frames"
    theirs.decoder.gate_threshold, theirs.decoder.max_decoder_steps = 2.0, frames  # no probability is 2, so the limit ends it
    with contextlib.redirect_stdout(io.StringIO()): return theirs.decoder.inference(memory)


def best_times(work: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    "Processor seconds of each, best of the repeats, turn by turn"
    best = dict.fromkeys(work, float('inf'))
    for run in work.values(): run()
    for _ in range(repeats):
        for name, run in work.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best


def compare(ref: SimpleNamespace, theirs: Any, memory: Tensor, speak: dict[str, Callable[..., Steps]], frames: int) -> dict[str, float]:
    "Largest differences from the reference with the same dropout; stops when fp32 says something else"
    with drawn_from(ref, torch.Generator().manual_seed(1)): mel, _, alignments = reference_speech(theirs, memory, frames)
    metrics: dict[str, float] = {}
    print(f'parity over {len(alignments[0])} frames (deviation of the mel {mel.std():.3f}):')
    for precision, run in speak.items():
        said = run(frames, torch.Generator().manual_seed(1))
        difference, attention = float((said.frames[:, 0] - mel[0].T).abs().max()), float((said.alignments - alignments).abs().max())
        print(f'  {precision}: largest difference of frames {difference:.1e}, of alignments {attention:.1e}')
        metrics[f'{precision}: largest difference'] = difference
    if not metrics['fp32: largest difference'] < 1e-4: raise SystemExit('The two decoders do not say the same, so nothing is timed.')
    return metrics


def whole(theirs: Any, ours: Tacotron2, text: Tensor, frames: int, repeats: int) -> dict[str, float]:
    "Encoder and postnet, which work on whole sentences"
    mel, n = torch.randn(1, 80, frames), torch.tensor([text.shape[1]])
    work: dict[str, Callable[[], object]] = {
        'reference encoder': lambda: theirs.encoder.inference(theirs.embedding(text).transpose(1, 2)),
        'our encoder': lambda: ours.encoder(ours.embedding(text).transpose(1, 2), n),
        f'reference postnet, {frames} frames': lambda: theirs.postnet(mel), f'our postnet, {frames} frames': lambda: ours.postnet(mel)}
    found = best_times(work, repeats)
    for name, seconds in found.items(): print(f'{name:32s}{1e3 * seconds:10.1f} ms')
    return {f'{name}: ms': 1e3 * seconds for name, seconds in found.items()}


def decoders(ours: Tacotron2, hp: HParams, memory: Tensor, rows: int) -> dict[str, Callable[..., Steps]]:
    "By precision: speak `rows` copies; those this machine has no use for are left out and said"
    values, mask = memory.expand(rows, -1, -1).contiguous(), torch.ones(rows, memory.shape[1], dtype=torch.bool)
    out: dict[str, Callable[..., Steps]] = {}
    for precision in PRECISIONS:
        decoder = StepwiseDecoder(ours.decoder, hp, precision)
        decoder.weights(rows)
        if decoder.note: print(f'batch {rows}: {decoder.note}')
        else: out[precision] = lambda frames, generator=None, d=decoder: d(values, mask, frames, generator, warn=False)
    return out


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference.add_argument(ap)
    ap.add_argument('--frames', type=int, default=600, help='decoder frames of each run; 110 symbols take about 600')
    ap.add_argument('--batches', type=int, nargs='+', default=[1, 4, 8])
    ap.add_argument('--repeats', type=int, default=5)
    ap.add_argument('--quick', action='store_true', help='a small model, few frames; nothing is written')
    ap.add_argument('--dry', action='store_true', help='write nothing')
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    ref = reference.load(a.reference)
    settings = ref.hparams(**TINY) if a.quick else ref.hparams()
    frames, repeats = (20, 2) if a.quick else (a.frames, a.repeats)
    hp = reference.same_settings(settings, gate_threshold=0.99)
    theirs, ours = ref.Tacotron2(settings).eval(), Tacotron2(hp).eval()
    ours.load_state_dict(theirs.state_dict())
    text = torch.randint(1, hp.n_symbols, (1, SYMBOLS))
    memory = theirs.encoder.inference(theirs.embedding(text).transpose(1, 2))

    metrics = compare(ref, theirs, memory, decoders(ours, hp, memory, 1), frames)
    base, hop = 0.0, hp.hop_length / hp.sample_rate
    print(f'\n{"decoder":24s}{"ms a frame":>12s}{"times as fast":>16s}{"real-time factor":>18s}')
    for rows in a.batches:
        work: dict[str, Callable[[], object]] = {'reference': lambda: reference_speech(theirs, memory, frames)} if rows == 1 or not base else {}
        for precision, run in decoders(ours, hp, memory, rows).items():
            work[precision if rows == 1 else f'{precision}, batch {rows}'] = lambda run=run: run(frames)
        found = best_times(work, repeats)
        for name, seconds in found.items():
            each = seconds / frames / (1 if name == 'reference' else rows)
            if name == 'reference': base = each
            metrics.update({f'{name}: ms a frame': 1e3 * each, f'{name}: times as fast': base / each, f'{name}: real-time factor': each / hop})
            print(f'{name:24s}{1e3 * each:12.3f}{base / each:16.2f}{each / hop:18.3f}', flush=True)
    print()
    metrics.update(whole(theirs, ours, text, frames, repeats))
    if not (a.quick or a.dry): results.save('infer', {k: float(f'{v:.4g}') for k, v in metrics.items()})


if __name__ == '__main__': main()
