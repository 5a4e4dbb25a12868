"""Rulers of sound on real speech: where the audio gate falls, who is found to share a clock, and how well pitch is tracked.

    python bench/audio_rulers.py --data DIR [--clips N] [--parts gate clock pitch]
    python bench/audio_rulers.py --data CORPUS --parts voice --model best_model.pt

DIR is a folder with sound files, or a corpus with wavs/ in it; the first 6 s of each file are used. *gate*: PESQ and the
predicted opinion of recordings, of their copies through the vocoder, and of copies whose spectrum was smeared over more and
more frames, the last as shares of the copy's. *clock*: how often sounds that share the recording's clock are compared, and
how often others are refused. *pitch*: the tracker and librosa's on voices whose melody is known, and on the recordings. *voice*: the
held-out sentences of a corpus by a model trained on it, under teacher forcing and in free running, as shares of the copy's.
"""
import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import results
import torch
from copy_synthesis import sound_files

from tts_tuner.audio.griffin_lim import vocode
from tts_tuner.audio.mel import MelSpectrogram
from tts_tuner.audio.wav import load_wav, trim_silence
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.hparams import HParams, create_hparams
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import build_features
from tts_tuner.data.loader import TTSDataset, collate, split
from tts_tuner.quality.opinions import predict_opinion
from tts_tuner.quality.perceptual import clock_trouble, pesq_score
from tts_tuner.quality.pitch import PitchTrack, pitch_errors, track_pitch
from tts_tuner.serve.synthesizer import Synthesizer
from tts_tuner.signals.series import Abstention
from tts_tuner.training.evaluate import Evaluator

SMEARED = (5, 9, 15)  # frames


def smear(mel: np.ndarray, frames: int) -> np.ndarray:
    "Moving average over `frames`, an odd number"
    padded = np.pad(mel, ((frames // 2, frames // 2), (0, 0)), 'edge')
    return np.stack([np.convolve(band, np.ones(frames) / frames, 'valid') for band in padded.T], 1).astype(np.float32)


def quiet(x: np.ndarray) -> np.ndarray:
    "No louder than full scale"
    return x / max(1.0, float(np.abs(x).max()))


def gate(clips: list[np.ndarray], hp: HParams) -> dict[str, float]:
    "PESQ and predicted opinion, means over clips"
    analyse, rows = MelSpectrogram(hp), []
    for x in clips:
        mel = analyse(x)
        sounds = {'copy': vocode(mel, hp), **{f'smeared over {n} frames': vocode(smear(mel, n), hp) for n in SMEARED}}
        row = {'recording: predicted opinion': predict_opinion(quiet(x), hp.sample_rate).overall}
        for name, y in sounds.items():
            row[f'{name}: PESQ'] = pesq_score(x, y, hp.sample_rate, 'copy_synthesis')
            row[f'{name}: predicted opinion'] = predict_opinion(quiet(y), hp.sample_rate).overall
        if not any(isinstance(v, Abstention) for v in row.values()): rows.append(row)
    mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
    for ruler in ('PESQ', 'predicted opinion'):
        for n in SMEARED: mean[f'smeared over {n} frames: {ruler}, share of the copy'] = mean[f'smeared over {n} frames: {ruler}'] / mean[f'copy: {ruler}']
    return {'clips': len(rows), **{k: round(v, 3) for k, v in mean.items()}}


def clocks(clips: list[np.ndarray], hp: HParams) -> dict[str, float]:
    "Share of clips compared (same clock) and refused (another one)"
    rate, rng, analyse = hp.sample_rate, np.random.default_rng(0), MelSpectrogram(hp)
    at_pace = lambda x, factor: np.interp(np.arange(0, len(x) - 1, factor), np.arange(len(x)), x)[:len(x)]
    fitted = lambda x, n: np.resize(x, n)
    same: dict[str, Callable] = {
        'copy': lambda i, x: vocode(analyse(x), hp), 'smeared over 9 frames': lambda i, x: vocode(smear(analyse(x), 9), hp),
        'noise as loud as speech': lambda i, x: x + x.std() * rng.normal(size=len(x)), '15 ms late': lambda i, x: np.roll(x, int(0.015 * rate))}
    other: dict[str, Callable] = {
        '60 ms late': lambda i, x: np.roll(x, int(0.06 * rate)), '3 % slower': lambda i, x: fitted(at_pace(x, 1 / 1.03), len(x)),
        'a pause of 0.1 s in the middle': lambda i, x: np.concatenate([x[:len(x) // 2], np.zeros(rate // 10), x[len(x) // 2:-(rate // 10)]]),
        'another sentence': lambda i, x: fitted(clips[i - 1], len(x))}
    out: dict[str, float] = {'clips': len(clips)}
    for word, group in (('compared', same), ('refused', other)):
        for name, make in group.items():
            found = [clock_trouble(x, make(i, x), rate, 'copy_synthesis') is None for i, x in enumerate(clips)]
            out[f'{name}: {word}'] = float(np.mean(found)) if word == 'compared' else 1 - float(np.mean(found))
    return out


def voice(seed: int, rate: int, over_noise: float | None, seconds: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    "Pulses of a gliding pitch through three resonances, hisses and pauses between; and the pitch [samples], NaN without voice"
    from scipy.signal import lfilter
    rng, n = np.random.default_rng(seed), int(seconds * rate)
    t, knots = np.arange(n) / rate, np.arange(0, seconds + 0.4, 0.2)
    pitch = rng.choice([100, 140, 200]) * 2 ** np.interp(t, knots, rng.uniform(-0.5, 0.5, len(knots)))
    kind = np.repeat(rng.choice(3, len(knots), p=[0.6, 0.2, 0.2]), int(0.2 * rate) + 1)[:n]  # voice, hiss, pause
    kind[:rate // 5] = 0
    y = lfilter([1], [1, -0.97], np.diff(np.floor(np.cumsum(pitch) / rate), prepend=0) - pitch / rate) + 0.04 * rng.normal(size=n)
    for f, width in ((rng.uniform(300, 800), 80), (rng.uniform(900, 2200), 120), (rng.uniform(2300, 3200), 180)):
        r = np.exp(-np.pi * width / rate)
        y = lfilter([1 - r], [1, -2 * r * np.cos(2 * np.pi * f / rate), r * r], y)
    hiss = lfilter([1, -0.95], [1], rng.normal(size=n))
    smooth = lambda mask: np.convolve(mask, np.ones(220) / 220, 'same')
    x = smooth(kind == 0) * y / y[kind == 0].std() + 0.3 * smooth(kind == 1) * hiss / hiss.std()
    if over_noise is not None: x = x + x.std() * 10 ** (-over_noise / 20) * rng.normal(size=n)
    return 0.1 * x, np.where(kind == 0, pitch, np.nan)


def pitches(clips: list[np.ndarray], hp: HParams, voices: int = 12) -> dict[str, float]:
    "Frame errors of both trackers where the melody is known, their agreement on speech, and their times"
    import librosa
    rate, hop = hp.sample_rate, hp.hop_length

    def ours(x: np.ndarray) -> PitchTrack:
        found = track_pitch(x, rate, hop)
        assert isinstance(found, PitchTrack)
        return found

    def theirs(x: np.ndarray) -> PitchTrack:
        return PitchTrack(librosa.pyin(x, fmin=65, fmax=500, sr=rate, frame_length=2048, hop_length=hop)[0], hop / rate)

    theirs(voice(0, rate, None)[0])  # its first call compiles
    out, seconds = {}, {'own': 0.0, 'pyin': 0.0}
    for over_noise, said in ((None, 'clean'), (10.0, '10 dB over noise')):
        for name, tracker in (('own', ours), ('pyin', theirs)):
            errors = []
            for seed in range(100, 100 + voices):
                x, truth = voice(seed, rate, over_noise)
                start = time.process_time()
                found = tracker(x)
                seconds[name] += time.process_time() - start
                true = PitchTrack(truth[np.minimum(np.arange(len(found.f0)) * hop, len(x) - 1)], hop / rate)
                errors.append(pitch_errors(true, found))
            out[f'{said}, {name}: frame error'] = round(float(np.mean([e.frame for e in errors])), 4)
            out[f'{said}, {name}: RMSE (cents)'] = round(float(np.mean([e.rmse_cents for e in errors])), 1)
    both = [e for e in (pitch_errors(theirs(x), ours(x)) for x in clips[:6]) if not isinstance(e, Abstention)]
    out['speech, both voiced: share more than 20 % apart'] = round(float(np.mean([e.gross for e in both])), 4)
    out['speech: share of frames voiced by one alone'] = round(float(np.mean([e.voicing for e in both])), 3)
    out['processor time of pyin over own'] = round(seconds['pyin'] / seconds['own'], 1)
    return out


def voiced_by(path: Path, corpus: Path, cache: Path, n: int) -> dict[str, float]:
    "PESQ and predicted opinion of a model's held-out sentences, and their shares of what the copies get"
    voice = Synthesizer.load(path)
    model, hp = voice.model, voice.hp
    features = build_features(read_corpus(corpus, hp), hp, cache)
    held = list(split(features, hp)[1])[:n]
    speech = Evaluator(features, held, hp)
    log_mel, rate, rows = speech.natural_log, hp.sample_rate, []
    with torch.no_grad():
        model.eval()
        for i in held:
            batch, mel = collate([TTSDataset(features, [i], hp)[0]], hp), np.asarray(features.mel(i), np.float32)
            led = model(batch.text, batch.text_lengths, batch.mel, batch.mel_lengths).mel_postnet[0, :, :len(mel)]
            free = model.infer(batch.text, batch.text_lengths, max_steps=2 * len(mel) // hp.n_frames_per_step, warn=False)
            own = free.mel_postnet[0, :, :int(free.steps[0]) * hp.n_frames_per_step]
            sounds = {'copy': vocode(mel, hp), 'teacher forced': vocode(log_mel(led), hp), 'free running': vocode(log_mel(own), hp)}
            recording = trim_silence(load_wav(features_source(corpus, features.ids[i]), rate), hp.trim_db, rate)[0]
            row = {f'{name}: predicted opinion': predict_opinion(quiet(y), rate).overall for name, y in {'recording': recording, **sounds}.items()}
            for name in ('copy', 'teacher forced'): row[f'{name}: PESQ'] = pesq_score(recording, sounds[name], rate, 'teacher_forced')
            if not any(isinstance(v, Abstention) for v in row.values()): rows.append(row)
    mean = {k: float(np.mean([r[k] for r in rows])) for k in rows[0]}
    for name, ruler in (('teacher forced', 'PESQ'), ('teacher forced', 'predicted opinion'), ('free running', 'predicted opinion')):
        mean[f'{name}: {ruler}, share of the copy'] = mean[f'{name}: {ruler}'] / mean[f'copy: {ruler}']
    return {'sentences': len(rows), **{k: round(v, 3) for k, v in mean.items()}}


def features_source(corpus: Path, name: str) -> Path:
    "The sound file of a clip"
    found = sorted(p for p in (corpus / 'wavs').glob(f'{name}.*'))
    if not found: raise UserError(f'{corpus} has no sound of {name}; give the corpus that the model was trained on.')
    return found[0]


def show_and_save(name: str, metrics: dict[str, float]) -> None:
    "A line a figure, and the file"
    for k, v in metrics.items(): print(f'{k:60} {v:.3f}' if isinstance(v, float) else f'{k:60} {v}', flush=True)
    results.save(name, metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder with sound files, or a corpus')
    parser.add_argument('--clips', type=int, default=12, help='first N clips only; 0 takes all')
    parser.add_argument('--parts', nargs='+', default=['gate', 'clock', 'pitch'], choices=['gate', 'clock', 'pitch', 'voice'], help='what is measured')
    parser.add_argument('--model', type=Path, help='for the part voice: best_model.pt of a study on the corpus --data')
    parser.add_argument('--cache', type=Path, default=Path('data/cache'), help='features')
    args = parser.parse_args()
    torch.set_num_threads(1)
    hp = create_hparams('default')
    measures = dict(gate=('audio_gate', gate), clock=('shared_clock', clocks), pitch=('pitch', pitches))
    try:
        if 'voice' in args.parts:
            if not args.model: raise UserError('The part voice needs --model, the best_model.pt of a study.')
            show_and_save('audio_gate_voice', voiced_by(args.model, args.data, args.cache, args.clips or 60))
        clips = [load_wav(p, hp.sample_rate)[:6 * hp.sample_rate] for p in sound_files(args.data, args.clips)]
        for part in (p for p in args.parts if p != 'voice'):
            name, measure = measures[part]
            show_and_save(name, measure(clips, hp))
    except TTSTunerError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == '__main__': main()
