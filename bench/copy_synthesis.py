"""Quality and speed of mel inversion and Griffin-Lim: sound -> log-mel -> sound, compared with the original.

    python bench/copy_synthesis.py --data DIR [--clips N] [--iterations 60] [--power 1.2]

DIR is a folder with sound files, or a corpus with wavs/ in it. One thread; the real-time factor is process time of
the way back (mel inversion and phases) over the length of the sound. PESQ (wide band), STOI and ESTOI are those of quality.perceptual.
"""
import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np
import results
import torch

from tts_tuner.audio.griffin_lim import vocode
from tts_tuner.audio.mel import MelSpectrogram
from tts_tuner.audio.wav import load_wav
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.hparams import HParams, create_hparams
from tts_tuner.quality.perceptual import perceptual_scores
from tts_tuner.signals.series import Abstention


def sound_files(folder: Path, n: int) -> list[Path]:
    "The first `n` sound files of a folder or a corpus"
    folder = folder / 'wavs' if (folder / 'wavs').is_dir() else folder
    files = sorted(p for p in folder.glob('*') if p.suffix.lower() in ('.wav', '.flac', '.ogg'))
    if not files: raise UserError(f'There are no sound files in {folder}; give --data a folder that has some.')
    return files[:n] if n else files


def measure(path: Path, hp: HParams, iterations: int, power: float) -> dict[str, float]:
    "Scores, level, peak and real-time factor of one clip"
    reference = load_wav(path, hp.sample_rate)
    mel = MelSpectrogram(hp)(reference)
    start = time.process_time()
    heard = vocode(mel, hp, n_iter=iterations, power=power)
    seconds = time.process_time() - start
    found = perceptual_scores(reference, heard, hp.sample_rate, 'copy_synthesis')
    if isinstance(found, Abstention): raise UserError(f'{path.name} cannot be judged: {found.reason}.')
    scores = {k: v if isinstance(v, float) else float('nan') for k, v in vars(found).items()}
    level = 20 * np.log10(heard.std() / reference.std())
    return dict(**scores, rtf=seconds / (len(reference) / hp.sample_rate), level=level, peak=float(np.abs(heard).max()),
                original_peak=float(np.abs(reference).max()), seconds=len(reference) / hp.sample_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', type=Path, required=True, help='folder with sound files, or a corpus')
    parser.add_argument('--clips', type=int, default=0, help='first N clips only; 0 takes all')
    parser.add_argument('--iterations', type=int, default=60, help='rounds of Griffin-Lim')
    parser.add_argument('--power', type=float, default=1.2, help='sharpening of the magnitudes')
    parser.add_argument('--hparams', default='', help='settings of the analysis, "key=value,..."')
    parser.add_argument('--save', action='store_true', help='leave the figures in bench/results/')
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        hp, files = create_hparams('default', args.hparams), sound_files(args.data, args.clips)
        vocode(np.zeros((20, hp.n_mels), np.float32), hp, n_iter=2)  # so that the first clip does not pay for starting up
        rows = []
        print(f'{"clip":24s} {"s":>5s} {"PESQ":>5s} {"STOI":>6s} {"ESTOI":>6s} {"RTF":>6s} {"level":>8s} {"peak (was)":>13s}')
        for path in files:
            r = measure(path, hp, args.iterations, args.power)
            rows.append(r)
            print(f'{path.stem:24s} {r["seconds"]:5.1f} {r["pesq"]:5.2f} {r["stoi"]:6.3f} {r["estoi"]:6.3f} {r["rtf"]:6.3f} {r["level"]:+6.2f}dB '
                  f'{r["peak"]:6.2f} ({r["original_peak"]:.2f})', flush=True)
    except TTSTunerError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
    mean = {k: float(np.mean([r[k] for r in rows])) for k in ('pesq', 'stoi', 'estoi', 'level')}
    length = sum(r['seconds'] for r in rows)
    rtf = sum(r['rtf'] * r['seconds'] for r in rows) / length
    worst = min(r['pesq'] for r in rows)
    print(f'mean of {len(rows)} clips, {length:.0f} s: PESQ-wb {mean["pesq"]:.2f} (worst {worst:.2f}), STOI {mean["stoi"]:.3f}, ESTOI {mean["estoi"]:.3f}, '
          f'real-time factor {rtf:.3f} on one thread, level {mean["level"]:+.2f} dB')
    if args.save: results.save('copy_synthesis', dict(clips=len(rows), seconds=round(length, 1), pesq=round(mean['pesq'], 3), pesq_worst=round(worst, 3),
                                                      stoi=round(mean['stoi'], 4),
                                                      estoi=round(mean['estoi'], 4), real_time_factor=round(rtf, 4)))


if __name__ == '__main__': main()
