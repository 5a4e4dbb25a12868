"""A training step beside the public reference's: same weights, same batch, one process, turn by turn.

    python bench/train_step.py --reference tacotron2                full size, batch 8, 400 to 800 frames, one thread (about 10 minutes)
    python bench/train_step.py --reference tacotron2 --epoch 6      an epoch at LJSpeech's lengths: random batches there, bucketed ones here
    python bench/train_step.py --reference tacotron2 --small        the demo's model: our paths against our plain one
    python bench/train_step.py --reference tacotron2 --quick        a small model and short clips, to see that it runs

A step is forward, loss, backward, clipping and Adam. Figures are seconds of processor time of this process, the best of the
repeats, since other work on a machine shows in wall time; read the ratios. Before anything is timed both models must give the
same outputs and gradients with every dropout switched off.
"""
import argparse
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import reference
import results
import torch

from tts_tuner.config.hparams import HParams, create_hparams
from tts_tuner.data.loader import Batch, plan_epoch
from tts_tuner.model.losses import Tacotron2Loss
from tts_tuner.model.products import has_bf16
from tts_tuner.model.tacotron2 import Tacotron2
from tts_tuner.training.learner import Learner

TINY = dict(symbols_embedding_dim=64, encoder_embedding_dim=64, decoder_rnn_dim=96, attention_rnn_dim=96, prenet_dim=32, postnet_embedding_dim=64)
STILL = dict(prenet_dropout=0.0, encoder_dropout=0.0, postnet_dropout=0.0, attention_dropout=0.0, dropout_decoder=0.0)


def make_batch(hp: HParams, text_lengths: list[int], mel_lengths: list[int], seed: int = 0) -> Batch:
    "Noise of these lengths, texts from long to short as the reference wants them"
    g, r = torch.Generator().manual_seed(seed), hp.n_frames_per_step
    pairs = sorted(zip(text_lengths, mel_lengths), reverse=True)
    n, m = (torch.tensor(x) for x in zip(*pairs))
    N, T = int(n.max()), -(-int(m.max()) // r) * r
    text = torch.randint(2, hp.n_symbols, (len(n), N), generator=g).masked_fill(torch.arange(N) >= n[:, None], 0)
    mel = torch.randn(len(n), hp.n_mels, T, generator=g).masked_fill(torch.arange(T) >= m[:, None, None], 0)
    gate = (torch.arange(T // r) >= (-(-m // r) - 1)[:, None]).float()
    return Batch(text, n, mel, m, gate, [str(i) for i in range(len(n))])


def spread(low: int, high: int, count: int) -> list[int]:
    "`count` lengths evenly from `low` to `high`"
    return [round(low + (high - low) * i / max(1, count - 1)) for i in range(count)]


class ReferenceStep:
    "The reference's training step, as its train.py makes it without Apex"

    def __init__(self, ref: SimpleNamespace, settings: SimpleNamespace, hp: HParams, weights: dict[str, torch.Tensor]):
        self.model, self.loss, self.clip = ref.Tacotron2(settings), ref.Tacotron2Loss(), hp.grad_clip_thresh
        self.model.load_state_dict(weights)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=hp.learning_rate, weight_decay=hp.weight_decay)

    def outputs(self, batch: Batch) -> tuple[list[torch.Tensor], torch.Tensor]:
        out = self.model((batch.text, batch.text_lengths, batch.mel, int(batch.text_lengths.max()), batch.mel_lengths))
        return out, self.loss(out, (batch.mel, batch.gate))

    def __call__(self, batch: Batch) -> None:
        self.model.train().zero_grad()
        loss = self.outputs(batch)[1]
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()


def our_step(hp: HParams, weights: dict[str, torch.Tensor] | None) -> Callable[[Batch], object]:
    "A learner's step with these settings"
    learner = Learner(hp)
    if weights: learner.model.load_state_dict(weights)
    return learner.learn


def check_parity(ref: SimpleNamespace, settings: SimpleNamespace, hp: HParams, batch: Batch) -> dict[str, float]:
    "Outputs and gradients of both models with dropout off; stops when they are not the same"
    theirs = ReferenceStep(ref, settings, hp, ref.Tacotron2(settings).state_dict())
    with reference.no_dropout(ref):
        outputs, loss = theirs.outputs(batch)
        loss.backward()
    ours = Tacotron2(dataclasses.replace(hp, **STILL))
    ours.load_state_dict(theirs.model.state_dict())
    for module in ours.modules():  # both saw the batch once
        if isinstance(module, torch.nn.BatchNorm1d): module.reset_running_stats()
    found = ours(batch.text, batch.text_lengths, batch.mel, batch.mel_lengths)
    Tacotron2Loss(hp)(found, batch).total.backward()
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(found, outputs))
    pairs = [(p.grad, q.grad) for p, q in zip(ours.parameters(), theirs.model.parameters())]
    gradient = (sum(float(((a - b) ** 2).sum()) for a, b in pairs) / sum(float((b**2).sum()) for _, b in pairs)) ** 0.5
    print(f'parity, dropout off, batch norm in training: largest difference of outputs {difference:.1e}, of gradients {gradient:.1e} relative')
    if not (difference < 1e-3 and gradient < 1e-4): raise SystemExit('The two models do not compute the same, so nothing is timed.')
    return dict(output_difference=difference, gradient_difference=gradient)


def measure(steps: dict[str, Callable[[Batch], object]], batches: dict[str, list[Batch]], repeats: int) -> dict[str, float]:
    "Processor seconds of each step over its batches, best of the repeats, turn by turn; the first turn is a short warm-up"
    best = dict.fromkeys(steps, float('inf'))
    for turn in range(repeats):
        for name, step in steps.items():
            gc.collect()
            start = time.process_time()
            for batch in batches[name]: step(batch)
            seconds = time.process_time() - start
            best[name] = min(best[name], seconds)
            print(f'  turn {turn + 1}/{repeats}  {name:28s} {seconds:8.2f} s', flush=True)
    return best


def show(best: dict[str, float], base: str) -> dict[str, float]:
    "The table, and ratios by name"
    print(f'\n{"":30s}{"seconds":>10s}{"times as fast":>16s}')
    for name, seconds in best.items(): print(f'{name:30s}{seconds:10.2f}{best[base] / seconds:16.2f}')
    return {f'{name}: times as fast': round(best[base] / seconds, 2) for name, seconds in best.items() if name != base}


def full_size(a: argparse.Namespace, ref: SimpleNamespace) -> None:
    "Full size against the reference on one batch"
    settings = ref.hparams(**(TINY if a.quick else {}))
    hp = reference.same_settings(settings)
    low, high = (20, 40) if a.quick else a.frames
    batch = make_batch(hp, spread(low // 5, round(high / 5.3), a.batch), spread(low, high, a.batch))
    parity = check_parity(ref, settings, hp, make_batch(hp, spread(20, 30, 3), spread(40, 60, 3)))
    weights = ref.Tacotron2(settings).state_dict()
    steps: dict[str, Callable[[Batch], object]] = {'reference': ReferenceStep(ref, settings, hp, weights)}
    for path in a.paths: steps[f'{path} fp32'] = our_step(dataclasses.replace(hp, decoder_path=path), weights)
    if 'lean' in a.paths:
        steps['lean fp32, postnet recomputed'] = our_step(dataclasses.replace(hp, decoder_path='lean', gradient_checkpointing=True), weights)
    if a.bf16:
        for path in ('fast', 'lean'): steps[f'{path} bf16'] = our_step(dataclasses.replace(hp, decoder_path=path, precision='bf16'), weights)
    warm = make_batch(hp, [12] * a.batch, [16] * a.batch)
    for step in steps.values(): step(warm)
    best = measure(steps, dict.fromkeys(steps, [batch]), a.repeats)
    ratios = show(best, 'reference')
    if a.quick: return
    results.save('train_step', {'batch': a.batch, 'frames from': low, 'frames to': high, **parity, **{f'{k}: seconds': round(v, 2) for k, v in best.items()},
                                **ratios}, file=f'train_step-{a.batch}')


def typical(plan: list[list[int]], frames: list[int], count: int) -> list[list[int]]:
    "Batches evenly through `plan` by length: their mean length is the plan's to a few per cent"
    ordered = sorted(plan, key=lambda b: max(frames[i] for i in b))
    return [ordered[int((k + 0.5) * len(ordered) / count)] for k in range(count)]


def epoch(a: argparse.Namespace, ref: SimpleNamespace) -> None:
    "Batches as each side makes them at LJSpeech's lengths: random there, sorted in pools here"
    settings = ref.hparams()
    hp = reference.same_settings(settings)
    characters, frames = reference.ljspeech_lengths(a.reference)
    plans = {'reference': plan_epoch(frames, a.batch, 1, 0, 0), 'ours': plan_epoch(frames, a.batch, a.pool, 0, 0)}
    decoder_steps = {k: sum(max(frames[i] for i in b) for b in plan) for k, plan in plans.items()}
    chosen, scale = {}, {}
    for name, plan in plans.items():
        part = typical(plan, frames, a.epoch)
        chosen[name] = [make_batch(hp, [characters[i] for i in b], [frames[i] for i in b], k) for k, b in enumerate(part)]
        scale[name] = decoder_steps[name] / sum(max(frames[i] for i in b) for b in part)
    weights = ref.Tacotron2(settings).state_dict()
    path = dataclasses.replace(hp, decoder_path='fast')
    steps: dict[str, Callable[[Batch], object]] = {'reference': ReferenceStep(ref, settings, hp, weights), 'fast fp32': our_step(path, weights)}
    if a.bf16: steps['fast bf16'] = our_step(dataclasses.replace(path, precision='bf16'), weights)
    warm = make_batch(hp, [12] * a.batch, [16] * a.batch)
    for step in steps.values(): step(warm)
    best = measure(steps, {name: chosen['reference' if name == 'reference' else 'ours'] for name in steps}, a.repeats)
    hours = {name: seconds * scale['reference' if name == 'reference' else 'ours'] / 3600 for name, seconds in best.items()}
    print('\nhours of an epoch on one core, from the batches measured, scaled by decoder steps:')
    ratios = show(hours, 'reference')
    results.save('train_epoch', {'batch': a.batch, 'batches measured': a.epoch, 'pool, batches': a.pool,
                                 'decoder steps, of the reference': round(decoder_steps['ours'] / decoder_steps['reference'], 3),
                                 **{f'{k}: hours': round(v, 2) for k, v in hours.items()}, **ratios})


def small(a: argparse.Namespace) -> None:
    "The demo's model: whole training step of each path against the plain one"
    hp = create_hparams('small', 'n_symbols=60')
    lengths = [(spread(12, 45, 8), spread(90, 260, 8)), (spread(20, 40, 8), spread(150, 200, 8)), (spread(30, 60, 8), spread(200, 320, 8))]
    batches = [make_batch(hp, n, m, k) for k, (n, m) in enumerate(lengths)] * (1 if a.quick else 6)
    torch.manual_seed(0)
    weights = Tacotron2(hp).state_dict()
    steps = {path: our_step(dataclasses.replace(hp, decoder_path=path), weights) for path in ('plain', 'auto', 'fast', 'lean')}
    for step in steps.values(): step(batches[0])
    best = measure(steps, dict.fromkeys(steps, batches), a.repeats)
    ratios = show(best, 'plain')
    mean_steps = statistics.mean(b.mel.shape[2] // hp.n_frames_per_step for b in batches)
    if a.quick: return
    results.save('train_step_small', {'steps timed': len(batches), 'decoder steps': round(mean_steps, 1),
                                      **{f'{k}: seconds a step': round(v / len(batches), 4) for k, v in best.items()}, **ratios})


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference.add_argument(ap)
    ap.add_argument('--batch', type=int, default=8, help='clips')
    ap.add_argument('--frames', type=int, nargs=2, default=(400, 800), metavar=('LOW', 'HIGH'), help='lengths of the clips, evenly between')
    ap.add_argument('--paths', nargs='+', default=['fast', 'lean'], choices=['plain', 'fast', 'lean'], help='which of ours')
    ap.add_argument('--no-bf16', dest='bf16', action='store_false', help='leave bf16 out')
    ap.add_argument('--repeats', type=int, default=2)
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--epoch', type=int, default=0, metavar='N', help='measure N batches of an epoch at LJSpeech lengths')
    ap.add_argument('--pool', type=int, default=32, help='batches sorted together in --epoch')
    ap.add_argument('--small', action='store_true', help="the demo's model")
    ap.add_argument('--quick', action='store_true', help='tiny, writes nothing')
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    if a.bf16 and not has_bf16('cpu'):
        print('bf16 is left out: this processor has no instructions for it, and precision=bf16 computes in fp32 here.')
        a.bf16 = False
    if a.small: small(a)
    elif a.epoch: epoch(a, reference.load(a.reference))
    else: full_size(a, reference.load(a.reference))


if __name__ == '__main__': main()
