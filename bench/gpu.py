"""Everything that needs a GPU, in one call of less than ten minutes, with nothing but torch, numpy and, for kernels, triton.

    python bench/gpu.py --reference tacotron2                   on a machine with a GPU: parity, then times; writes bench/results/gpu.json
    python bench/gpu.py --reference tacotron2 --device cpu --quick    the same calls on small things, to see that they are right; writes nothing
    TRITON_INTERPRET=1 python bench/gpu.py --device cpu --quick --parity     kernels too, in Triton's interpreter (minutes)

Parity comes first: kernels against their twins, then the whole model in each way (eager, graphs, kernels) against the plain
path. A way that is not the same is not timed. Steps are forward, loss, backward, clipping and Adam in bf16 autocast, the
reference's beside ours in the same process, turn by turn; figures are medians of wall time, with the GPU idle before and after.
What could not be run stands in the table as not measured, with the reason.
"""
import argparse
import contextlib
import dataclasses
import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the package beside this file, installed or not
import reference
import results
import torch
from torch import Tensor

from tts_tuner.config.hparams import HParams, create_hparams
from tts_tuner.model import graphs, kernels
from tts_tuner.model.losses import Tacotron2Loss
from tts_tuner.model.operations import Sizes, deviation, tolerance
from tts_tuner.model.tacotron2 import Tacotron2

TINY = dict(symbols_embedding_dim=32, encoder_embedding_dim=32, decoder_rnn_dim=48, attention_rnn_dim=48, attention_dim=16, prenet_dim=16,
            postnet_embedding_dim=16, n_symbols=30, attention_location_kernel_size=7)
STILL = dict(prenet_dropout=0.0, encoder_dropout=0.0, postnet_dropout=0.0, attention_dropout=0.0, dropout_decoder=0.0)
WAYS = ('eager', 'graphs', 'kernels')
OPEN_GATE = 0.99  # a threshold that weights never trained do not reach: speech runs to its limit


class Table:
    "Figures by name, and why others are missing"

    def __init__(self) -> None: self.metrics, self.missing = {}, {}

    def add(self, name: str, value: float) -> None:
        self.metrics[name] = value
        print(f'  {name:62s}{value:14,.4g}', flush=True)

    def miss(self, name: str, why: str) -> None:
        self.missing[name] = ' '.join(why.split())[:200]
        print(f'  {name:62s}  not measured: {self.missing[name]}', flush=True)

    @contextlib.contextmanager
    def row(self, name: str) -> Iterator[None]:
        "What fails inside is a figure that is missing; a mistake of this script is not"
        try: yield
        except (RuntimeError, OSError, MemoryError) as error: self.miss(name, f'{type(error).__name__}: {error}')
        finally: tidy()


def tidy() -> None:
    "Give back what a measurement held"
    graphs.release()
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    if device.type == 'cuda': torch.cuda.synchronize(device)


@contextlib.contextmanager
def going(way: str, device: torch.device) -> Iterator[None]:
    "Let the decoder take this way; on a CPU chunks run unrecorded. RuntimeError when it did not work here"
    kept, warned = graphs.chosen_way, os.environ.get('TTS_TUNER_GPU')
    os.environ['TTS_TUNER_GPU'] = way
    if device.type == 'cpu': graphs.chosen_way = lambda *_: way if way not in graphs._WITHDRAWN else 'eager'
    graphs._WITHDRAWN.clear()
    try:
        if way == 'kernels' and not kernels.available(): raise RuntimeError('triton is not installed')
        if way == 'kernels' and device.type == 'cpu' and not os.environ.get('TRITON_INTERPRET'): raise RuntimeError('kernels need a GPU')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)
            yield
        if graphs._WITHDRAWN: raise RuntimeError(next(iter(graphs._WITHDRAWN.values())))
    finally:
        graphs.chosen_way = kept
        os.environ.pop('TTS_TUNER_GPU')
        if warned is not None: os.environ['TTS_TUNER_GPU'] = warned


def spread(low: int, high: int, count: int) -> list[int]:
    "`count` lengths evenly from `high` down to `low`"
    return [round(high - (high - low) * i / max(1, count - 1)) for i in range(count)]


def make_batch(hp: HParams, mel_lengths: list[int], device: torch.device) -> SimpleNamespace:
    "Noise of these lengths, longest first, with a symbol for every 5.8 frames as LJSpeech has it"
    dice, n_lengths = torch.Generator().manual_seed(0), [max(4, round(m / 5.8)) for m in mel_lengths]
    m, n = torch.tensor(mel_lengths), torch.tensor(n_lengths)
    N, T, r = max(n_lengths), -(-max(mel_lengths) // hp.n_frames_per_step) * hp.n_frames_per_step, hp.n_frames_per_step
    text = torch.randint(2, hp.n_symbols, (len(n), N), generator=dice).masked_fill(torch.arange(N) >= n[:, None], 0)
    mel = torch.randn(len(n), hp.n_mels, T, generator=dice).masked_fill(torch.arange(T) >= m[:, None, None], 0)
    gate = (torch.arange(T // r) >= (-(-m // r) - 1)[:, None]).float()
    return SimpleNamespace(**{k: v.to(device) for k, v in dict(text=text, text_lengths=n, mel=mel, mel_lengths=m, gate=gate).items()}, frames=int(m.sum()))


# ---------------------------------------------------------------- parity

def kernel_parity(table: Table, device: torch.device, quick: bool) -> None:
    "Every kernel against its twin"
    small, full = Sizes(2, 37, 16, 24, 40, 7), Sizes(32, 150, 128, 512, 1024, 31)
    for low in (torch.float32, torch.bfloat16, torch.float16):
        name = f'kernels against twins, {str(low)[6:]}: of the tolerance'
        with table.row(name):
            if not kernels.available(): raise RuntimeError('triton is not installed')
            if device.type == 'cpu' and not os.environ.get('TRITON_INTERPRET'): raise RuntimeError('kernels need a GPU')
            worst = max(max(deviation(kernels.Fused(), device, low, small if quick else full, forward).values()) for forward in (False, True))
            table.add(name, worst / tolerance(low))


def trained(model: Tacotron2, loss: Tacotron2Loss, batch: SimpleNamespace, path: str) -> list[Tensor]:
    "Outputs and gradients of one step"
    model.zero_grad()
    model.decoder.path = path
    outputs = model(batch.text, batch.text_lengths, batch.mel, batch.mel_lengths)
    loss(outputs, batch).total.backward()
    return [*(o.detach() for o in outputs), torch.cat([p.grad.flatten() for p in model.parameters()])]


def model_parity(table: Table, device: torch.device, quick: bool) -> set[str]:
    "Whole model in each way against its plain path, dropout off, fp32 without TF32; the ways that agree"
    seen: dict[str, list[bool]] = {way: [] for way in WAYS}
    for attention in ('location', 'forward'):
        hp = create_hparams('paper', dict(TINY if quick else {}, attention=attention, gradient_checkpointing=False, mask_padding=True, **STILL))
        torch.manual_seed(0)
        model, loss = Tacotron2(hp).to(device).train(), Tacotron2Loss(hp)
        batch = make_batch(hp, spread(*((9, 35) if quick else (60, 140)), 2 if quick else 6), device)
        plain = trained(model, loss, batch, 'plain')
        for way in WAYS:
            name = f'{way} against the plain path, {attention} attention: gradient'
            with table.row(name):
                with going(way, device): ours = [trained(model, loss, batch, 'fast') for _ in range(2)][1]  # the second time recorded chunks are replayed
                output = max(float((a - b).abs().max()) for a, b in zip(ours[:4], plain))
                gradient = float((ours[4] - plain[4]).norm() / plain[4].norm())
                table.add(name, gradient)
                seen[way].append(output < 1e-3 and gradient < 1e-3)
                if not seen[way][-1]: print(f'  {way} does not compute the same (outputs {output:.1e}, gradient {gradient:.1e}) and is not timed.')
    return {way for way, same in seen.items() if len(same) == 2 and all(same)}


# ---------------------------------------------------------------- training

def our_step(hp: HParams, weights: dict[str, Tensor] | None, device: torch.device, precision: torch.dtype | None) -> Callable[[SimpleNamespace], None]:
    "Forward, loss, backward, clipping and Adam of our model"
    model = Tacotron2(hp).to(device).train()
    if weights: model.load_state_dict(weights)
    model.decoder.path, loss = 'fast', Tacotron2Loss(hp)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=hp.weight_decay)

    def step(batch: SimpleNamespace) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            outputs = model(batch.text, batch.text_lengths, batch.mel, batch.mel_lengths)
        total = loss(type(outputs)(*(o.float() for o in outputs)), batch).total
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hp.grad_clip_thresh)
        optimizer.step()
        total.item()
    return step


def their_step(ref: SimpleNamespace, model: Any, hp: HParams, device: torch.device, precision: torch.dtype | None) -> Callable[[SimpleNamespace], None]:
    "The same of the reference"
    loss, optimizer = ref.Tacotron2Loss(), torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=hp.weight_decay)

    def step(batch: SimpleNamespace) -> None:
        model.zero_grad()
        with torch.autocast(device.type, precision, enabled=precision is not None):
            outputs = model((batch.text, batch.text_lengths, batch.mel, int(batch.text_lengths.max()), batch.mel_lengths))
        total = loss([o.float() for o in outputs], (batch.mel, batch.gate))
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hp.grad_clip_thresh)
        optimizer.step()
        total.item()
    return step


def timed(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    "Median seconds"
    seconds = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def train_rows(table: Table, ref: SimpleNamespace | None, agreed: set[str], device: torch.device, quick: bool) -> None:
    "A training step at batch 32 in each way, beside the reference"
    settings = SimpleNamespace(**{**reference.PUBLISHED, **(TINY if quick else {})})
    hp, repeats = reference.same_settings(settings), 1 if quick else 5
    batch = make_batch(hp, spread(*((20, 40) if quick else (400, 800)), 3 if quick else 32), device)
    theirs, name = None, 'reference, bf16: seconds a step'
    weights = Tacotron2(hp).state_dict()
    with table.row(name):
        if ref is None: raise RuntimeError('no checkout of the reference was given')
        model = ref.Tacotron2(settings).to(device).train()
        weights = {k: v.cpu() for k, v in model.state_dict().items()}
        step = their_step(ref, model, hp, device, torch.bfloat16)
        step(batch)
        theirs = timed(lambda: step(batch), device, repeats)
        table.add(name, theirs)
    for way in WAYS:
        name = f'{way}, bf16: seconds a step'
        if way not in agreed:
            table.miss(name, 'not run, or not the same as the plain path')
            continue
        with table.row(name), going(way, device):
            if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
            ours = our_step(hp, weights, device, torch.bfloat16)
            for _ in range(2): ours(batch)
            table.add(name, seconds := timed(lambda ours=ours: ours(batch), device, repeats))
            if theirs: table.add(f'{way}, bf16: times as fast as the reference', theirs / seconds)
            if device.type == 'cuda': table.add(f'{way}, bf16: peak memory, GB', torch.cuda.max_memory_allocated() / 1e9)


def throughput_rows(table: Table, agreed: set[str], device: torch.device, quick: bool) -> None:
    "Real frames a second at growing batches of bucketed clips, mean 578 frames"
    hp = create_hparams('paper', dict(TINY if quick else {}, gradient_checkpointing=False))
    way = next((w for w in reversed(WAYS) if w in agreed), 'eager')
    best = 0.0
    for size in (2, 4) if quick else (128, 256, 512):
        name = f'{way}, bf16, batch {size}: mel frames a second'
        with table.row(name), going(way, device):
            if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
            step, batch = our_step(hp, None, device, torch.bfloat16), make_batch(hp, spread(*((20, 30) if quick else (556, 600)), size), device)
            for _ in range(2): step(batch)
            speed = batch.frames / timed(lambda step=step, batch=batch: step(batch), device, 1 if quick else 5)
            table.add(name, speed)
            best = max(best, speed)
            if device.type == 'cuda': table.add(f'{way}, bf16, batch {size}: peak memory, GB', torch.cuda.max_memory_allocated() / 1e9)
    if best: table.add('largest: mel frames a second', best)


# ---------------------------------------------------------------- speaking

def speaking_rows(table: Table, ref: SimpleNamespace | None, device: torch.device, quick: bool) -> None:
    "Speech of fixed length: milliseconds a decoder step"
    limit, n = (12, 6) if quick else (400, 70)
    settings = SimpleNamespace(**{**reference.PUBLISHED, **(TINY if quick else {}), 'max_decoder_steps': limit, 'gate_threshold': OPEN_GATE})
    hp = dataclasses.replace(reference.same_settings(settings), max_decoder_steps=limit)
    text, theirs = torch.randint(2, hp.n_symbols, (1, n), device=device), None
    model = Tacotron2(hp).to(device).eval()
    name = 'speaking, reference, batch 1: ms a step'
    with table.row(name), contextlib.redirect_stdout(None):
        if ref is None: raise RuntimeError('no checkout of the reference was given')
        other = ref.Tacotron2(settings).to(device).eval()
        with torch.no_grad():
            other.inference(text)
            theirs = timed(lambda: other.inference(text), device, 1 if quick else 3) / limit * 1000
    if theirs: table.add(name, theirs)
    for size in (1, 3) if quick else (1, 32):
        name = f'speaking, ours, batch {size}: ms a step'
        with table.row(name):
            rows, lengths = text.expand(size, -1), torch.full((size,), n, device=device)
            spoken = model.infer(rows, lengths, warn=False)
            table.add(name, ms := timed(lambda rows=rows, lengths=lengths: model.infer(rows, lengths, warn=False), device, 1 if quick else 3) / limit * 1000)
            if int(spoken.steps.min()) < limit: raise RuntimeError('the stop gate fired before the limit')
            if theirs: table.add(f'speaking, ours, batch {size}: times as fast, an utterance', theirs / ms * size)


def machine_says() -> str:
    "Name, driver and memory of the GPU as nvidia-smi gives them"
    try: done = subprocess.run(['nvidia-smi', '--query-gpu=name,driver_version,memory.total', '--format=csv,noheader'], capture_output=True, text=True)
    except OSError: return 'no nvidia-smi here'
    return done.stdout.strip() or done.stderr.strip()


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--reference', type=Path, help='checkout of https://github.com/NVIDIA/tacotron2; its rows are left out without')
    ap.add_argument('--device', default='cuda', help='cuda, or cpu to see that everything runs')
    ap.add_argument('--quick', action='store_true', help='small things, one turn, nothing is written')
    ap.add_argument('--parity', action='store_true', help='parity only')
    a = ap.parse_args()
    device = torch.device(a.device)
    if device.type == 'cuda' and not torch.cuda.is_available(): sys.exit('There is no GPU here that torch can use; --device cpu --quick runs everything small.')
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ref, table = reference.load(a.reference) if a.reference else None, Table()
    where = machine_says() if device.type == 'cuda' else 'a CPU, for correctness: times mean nothing'
    print(f'{where}\nparity')
    kernel_parity(table, device, a.quick)
    agreed = model_parity(table, device, a.quick)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def save() -> None:
        if device.type == 'cuda' and not a.quick: results.save('gpu', table.metrics, not_measured=table.missing, gpu=where)
    sections = {'training': lambda: train_rows(table, ref, agreed, device, a.quick), 'throughput': lambda: throughput_rows(table, agreed, device, a.quick),
                'speaking': lambda: speaking_rows(table, ref, device, a.quick)}
    for title, section in {} if a.parity else sections.items():
        print(title)
        section()
        save()
    if a.quick: sys.exit(quick_verdict(table, agreed, device))


def quick_verdict(table: Table, agreed: set[str], device: torch.device) -> str | None:
    "None when everything that can run here ran and agreed"
    expected = {'eager', 'graphs'} | ({'kernels'} if kernels.available() and (device.type == 'cuda' or os.environ.get('TRITON_INTERPRET')) else set())
    excused = ('kernels',) if 'kernels' not in expected else ()
    failed = [name for name in table.missing if not name.startswith(excused) and 'no checkout' not in table.missing[name]] if excused else list(table.missing)
    failed += sorted(expected - agreed)
    return f'failed: {", ".join(failed)}' if failed else None


if __name__ == '__main__': main()
