"""What it costs to bring data to the model, beside the public reference: mels, batches, padding.

    python bench/loader.py --reference tacotron2 --data ljspeech-mini        a corpus in the LJSpeech layout (about 2 minutes)
    python bench/loader.py --reference tacotron2                             without recordings: noise and beeps
    python bench/loader.py --reference tacotron2 --quick                     to see that it runs; writes nothing

Times are processor seconds of this process on one thread, the best of the repeats, the things compared taking turns. Batches a
second with worker processes are wall time and say something on a quiet machine only. Padding and decoder steps of an epoch are
counted, not timed: from the 12 500 training texts of LJSpeech in the reference's file list, with 15.2 characters a second and
10 % of noise inside the corpus' published shortest and longest clip (1.11 and 10.10 s), five epochs each.
"""
import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import reference
import results
import torch

from librosa.filters import mel as mel_bank
from librosa.util import normalize, pad_center, tiny

from tts_tuner.audio.mel import MelSpectrogram
from tts_tuner.audio.wav import load_wav
from tts_tuner.config.hparams import HParams, create_hparams
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.demo import make_tone_corpus
from tts_tuner.data.features import FeatureSet, build_features
from tts_tuner.data.loader import Batch, EpochCost, TTSDataset, collate, epoch_cost, make_batch, plan_epoch, plan_frames
from tts_tuner.data.workers import open_stream

RATE, HOP = 22050, 256
POOLS = (8, 32, 100)


def reference_mel(folder: Path) -> Any:
    "The reference's mel analysis; librosa has made the arguments it is called with keyword-only since"
    util = reference._stub('librosa.util', pad_center=lambda x, size: pad_center(x, size=size), tiny=tiny, normalize=normalize)
    filters = reference._stub('librosa.filters', mel=lambda sr, n_fft, *rest: mel_bank(sr=sr, n_fft=n_fft, **dict(zip(('n_mels', 'fmin', 'fmax'), rest))))
    stubs = {'librosa': reference._stub('librosa', util=util, filters=filters), 'librosa.util': util, 'librosa.filters': filters}
    with reference._on_path(folder.resolve(), stubs):
        import layers  # type: ignore[import-not-found]
        return layers.TacotronSTFT(1024, HOP, 1024, 80, RATE, 0.0, 8000.0)


def librosa_mel(x: np.ndarray, bank: np.ndarray) -> np.ndarray:
    spectrum = np.abs(librosa.stft(x, n_fft=1024, hop_length=HOP, win_length=1024, pad_mode='reflect'))
    return np.log(np.maximum(bank @ spectrum, 1e-5)).T


def in_turn(jobs: dict[str, Callable[[], object]], repeats: int, at_once: int = 5) -> dict[str, float]:
    "Milliseconds of processor time of each job, the best of the repeats; the jobs take turns"
    best = dict.fromkeys(jobs, float('inf'))
    for job in jobs.values(): job()
    for _ in range(repeats):
        for name, job in jobs.items():
            began = time.process_time()
            for _ in range(at_once): job()
            best[name] = min(best[name], (time.process_time() - began) / at_once * 1000)
    return best


def mels(a: argparse.Namespace, x: np.ndarray) -> dict[str, float]:
    "The mel of five seconds of sound, three ways"
    theirs, ours, bank = reference_mel(a.reference), MelSpectrogram(HParams()), mel_bank(sr=RATE, n_fft=1024, n_mels=80, fmin=0, fmax=8000)
    sound = torch.from_numpy(x)[None]
    found = {'reference': theirs.mel_spectrogram(sound)[0].T.numpy(), 'librosa': librosa_mel(x, bank)}
    mel = ours(x)
    far = {f'largest difference of a log-mel from ours, {k}': float(np.abs(m - mel).max()) for k, m in found.items()}
    ms = in_turn({'reference': lambda: theirs.mel_spectrogram(sound), 'ours': lambda: ours(x), 'librosa': lambda: librosa_mel(x, bank)}, a.repeats)
    faster = {'mel of 5 s, times faster than the reference': round(ms['reference'] / ms['ours'], 2)}
    return {f'mel of 5 s, {k}: ms': round(v, 2) for k, v in ms.items()} | faster | far


def corpus(a: argparse.Namespace, folder: Path) -> Path:
    return a.data if a.data else make_tone_corpus(folder / 'tones', n=24)


def parts(a: argparse.Namespace, kept: FeatureSet, lean: FeatureSet) -> dict[str, float]:
    "Bringing one clip, and putting a batch together"
    hp = kept.hp
    i = int(np.argmax(kept.n_frames))
    data = TTSDataset(kept, range(len(kept)), hp)
    clip = dict(id='x', text=torch.ones(75, dtype=torch.long), mel=torch.zeros(430, hp.n_mels), pad_value=0.0)
    ms = in_turn({'read the sound': lambda: load_wav(kept.paths[i], RATE), 'mel from disk': lambda: kept.mel(i), 'mel from sound': lambda: lean.mel(i),
                  'item': lambda: data[i], 'collate 32 clips of 430 frames': lambda: collate([clip] * 32, hp)}, a.repeats)
    return {f'clip of {kept.n_frames[i] * HOP / RATE:.1f} s, {k}: ms' if 'clips' not in k else f'{k}: ms': round(v, 3) for k, v in ms.items()}


def streams(a: argparse.Namespace, kept: FeatureSet, lean: FeatureSet) -> dict[str, float]:
    "Batches of 8 a second, wall time, when nothing else happens"
    out = {}
    for where, features in (('disk', kept), ('sound', lean)):
        for workers in a.workers:
            hp = dataclasses.replace(features.hp, batch_size=8, loader_workers=workers)
            stream = open_stream(TTSDataset(features, range(len(features)), hp), hp)
            for _ in range(6): next(stream)  # so that starting up is not counted
            began, n = time.monotonic(), 0
            while time.monotonic() - began < a.seconds: next(stream); n += 1
            out[f'batches of 8 a second, mels from {where}, {workers} workers'] = round(n / (time.monotonic() - began), 1)
            stream.close()
    return out


def share(a: argparse.Namespace, kept: FeatureSet) -> dict[str, float]:
    "Making a batch of 8 from disk beside the training step it is for, full size, on one thread"
    from tts_tuner.training.learner import Learner
    hp = create_hparams('small' if a.quick else 'paper', dict(frontend='characters', batch_size=8, n_symbols=len(kept.table), device='cpu', n_mels=80))
    data = TTSDataset(kept, range(len(kept)), hp)
    clips = sorted(range(len(kept)), key=lambda i: kept.n_frames[i])[:8]
    learner = Learner(hp, torch.device('cpu'))
    batch: Batch = make_batch(data, clips, hp)
    step = in_turn({'step': lambda: learner.learn(batch)}, 1, 1)['step']
    made = in_turn({'made': lambda: make_batch(data, clips, hp)}, a.repeats)['made']
    return {'frames of the batch': batch.mel.shape[0] * batch.mel.shape[2], 'batch of 8 from disk: ms': round(made, 2),
            'training step on it: ms': round(step), 'share of the step: %': round(100 * made / step, 3)}


def mean_cost(plans: list[list[list[int]]], lengths: list[int]) -> EpochCost:
    "Cost of all `plans` together"
    costs = [epoch_cost(p, lengths) for p in plans]
    return EpochCost(*(sum(getattr(c, f.name) for c in costs) for f in dataclasses.fields(EpochCost)[:-1]), max(c.largest for c in costs))


def padding(a: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    "Padding and decoder steps of an epoch at LJSpeech's lengths: factors, and a table"
    lengths = reference.ljspeech_lengths(a.reference)[1]
    epochs = range(1 if a.quick else 5)
    metrics: dict[str, float] = {'clips': len(lengths), 'frames of a clip, mean': round(statistics.mean(lengths), 1), 'frames of a clip, largest': max(lengths)}
    rows: list[dict[str, Any]] = []
    for size in (8, 32, 64):
        random_order = [plan_epoch(lengths, size, 1, 0, e) for e in epochs]
        plans = {'reference: random, last batch dropped': [[b for b in p if len(b) == size] for p in random_order]}
        plans |= {f'pools of {pool}': [plan_epoch(lengths, size, pool, 0, e) for e in epochs] for pool in POOLS}
        same_mean = size * round(statistics.mean(lengths))
        for name, budget in (('mean', same_mean), ('longest', size * max(lengths))):
            plans[f'{budget} frames ({size} clips of {name} length), pools of 32'] = [plan_frames(lengths, budget, 32, 0, e) for e in epochs]
        costs = {name: mean_cost(p, lengths) for name, p in plans.items()}
        base = next(iter(costs.values()))
        for name, c in costs.items():
            factor = round((c.steps / c.clips) / (base.steps / base.clips), 3)
            rows.append(dict(batch=size, order=name, batches=round(c.batches / len(epochs)), padding=round(c.waste, 4), steps=factor, largest=c.largest))
        ours = rows[-4]  # pools of 32
        metrics |= {f'padding of the reference, batch {size}: %': round(100 * base.waste, 1), f'padding, batch {size}: %': round(100 * ours['padding'], 1),
                    f'decoder steps of an epoch beside the reference, batch {size}': ours['steps'],
                    f'epoch by bucketing alone, batch {size}: times faster': round(1 / ours['steps'], 2)}
    return metrics, rows


def show(metrics: dict[str, float], rows: list[dict[str, Any]]) -> None:
    for name, value in metrics.items(): print(f'{name:75} {value:>10g}')
    print(f'\n{"batch":>5}  {"order":58} {"batches":>7} {"padding":>8} {"steps":>6} {"largest":>8}')
    for r in rows: print(f'{r["batch"]:5}  {r["order"]:58} {r["batches"]:7} {r["padding"]:8.1%} {r["steps"]:6.3f} {r["largest"]:8}')


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference.add_argument(ap)
    ap.add_argument('--data', type=Path, help='a corpus in the LJSpeech layout at 22 050 Hz, such as the first clips of LJSpeech')
    ap.add_argument('--workers', type=int, nargs='+', default=[0, 1, 2])
    ap.add_argument('--seconds', type=float, default=4.0, help='of each count of batches')
    ap.add_argument('--repeats', type=int, default=20)
    ap.add_argument('--quick', action='store_true', help='short, writes nothing')
    a = ap.parse_args()
    if a.quick: a.repeats, a.seconds = 2, 0.3
    torch.set_num_threads(1)
    hp = create_hparams('default', 'frontend=characters')
    with tempfile.TemporaryDirectory() as folder:
        source = read_corpus(corpus(a, Path(folder)), hp)
        kept = build_features(source, hp, Path(folder) / 'cache')
        lean = build_features(source, dataclasses.replace(hp, cache_mels=False), Path(folder) / 'cache')
        sound = np.concatenate([kept.audio(i) for i in range(8)])[:5 * RATE]
        metrics = mels(a, sound) | parts(a, kept, lean) | streams(a, kept, lean) | share(a, kept)
    factors, rows = padding(a)
    show(metrics | factors, rows)
    if not a.quick: results.save('loader', metrics | factors, padding=rows, sound='recordings' if a.data else 'beeps')


if __name__ == '__main__': main()
