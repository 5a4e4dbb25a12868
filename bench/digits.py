"""Real speech: digit strings joined from recordings of single spoken digits, then `tts-tune run` on them.

    python bench/digits.py --data DIR          writes the corpus and prints the command
    python bench/digits.py --data DIR --run    ... and runs it

DIR holds {digit}_{speaker}_{take}.wav, 8 kHz, as the Free Spoken Digit Dataset names them (one speaker is taken). Strings of
two to five digits; takes 0 to 4 of each digit are heard in held-out strings only, and held_out.txt keeps those strings from
training. Word times are exact, since the strings are put together here.
"""
import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import results

from tts_tuner.audio.wav import load_wav, save_wav
from tts_tuner.config.files import write_atomic

WORDS = 'zero one two three four five six seven eight nine'.split()
RATE = 8000
HELD_OUT_TAKES = range(5)
HPARAMS = ('frontend=characters,sample_rate=8000,n_fft=512,hop_length=100,win_length=512,n_mels=40,mel_fmax=4000,trim_db=0')


def recordings(folder: Path, speaker: str) -> dict[tuple[int, int], np.ndarray]:
    "(digit, take) -> sound cut to the word and brought to one level"
    out = {}
    for path in sorted(folder.glob(f'[0-9]_{speaker}_*.wav')):
        digit, _, take = path.stem.split('_')
        sound = load_wav(path, RATE)
        loud = np.flatnonzero(np.abs(sound) > 0.03 * np.abs(sound).max())
        sound = sound[max(0, loud[0] - 160):loud[-1] + 320]
        out[int(digit), int(take)] = 0.6 * sound / np.abs(sound).max()
    for d in range(10):
        takes = {t for e, t in out if e == d}
        if not takes & set(HELD_OUT_TAKES) or not takes - set(HELD_OUT_TAKES):
            sys.exit(f'{folder} lacks recordings of {d} by "{speaker}": files like {d}_{speaker}_0.wav are expected, takes 0 to 4 and more.')
    return out


def make_corpus(data: Path, root: Path, speaker: str, n: int, held_out: int, seed: int) -> None:
    "Write metadata.csv, wavs/, timings.json and held_out.txt"
    sounds, rng = recordings(data, speaker), random.Random(seed)
    noise = np.random.default_rng(seed)
    rows, timings, apart = [], {}, []
    for i in range(n):
        held = i >= n - held_out
        digits, pieces, words, at, seconds = [rng.randrange(10) for _ in range(rng.randint(2, 5))], [], [], 0, 0.0
        for k, d in enumerate(digits):
            if k: pieces.append(rng.random() * 0.002 * noise.standard_normal(int(RATE * rng.uniform(0.02, 0.08))))
            seconds = sum(map(len, pieces)) / RATE
            words.append([at, len(WORDS[d]), round(seconds, 6)])
            pieces.append(sounds[d, rng.choice([t for e, t in sounds if e == d and (t in HELD_OUT_TAKES) == held])])
            at += len(WORDS[d]) + 1
        name, text = f'digits{i:04d}', ' '.join(WORDS[d] for d in digits)
        sound = np.concatenate(pieces).astype(np.float32)
        save_wav(root / 'wavs' / f'{name}.wav', sound, RATE)
        rows.append(f'{name}|{text}|{text}\n')
        timings[name] = dict(words=words, seconds=round(len(sound) / RATE, 6))
        if held: apart.append(name)
    write_atomic(root / 'timings.json', json.dumps(timings))
    write_atomic(root / 'held_out.txt', '\n'.join(apart) + '\n')
    write_atomic(root / 'metadata.csv', ''.join(rows))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--data', type=Path, required=True, help='folder with the recordings')
    ap.add_argument('--speaker', default='jackson')
    ap.add_argument('--corpus', type=Path, default=Path('data/digits'), help='folder to write')
    ap.add_argument('--clips', type=int, default=700)
    ap.add_argument('--held-out', type=int, default=60)
    ap.add_argument('--seed', type=int, default=3, help='of the strings and of the study')
    ap.add_argument('--study', default='bench-digits')
    ap.add_argument('--hparams', default=HPARAMS, help='what differs from the small preset')
    ap.add_argument('--run', action='store_true', help='run the study too, and leave its figures in bench/results/')
    ap.add_argument('words', nargs='*', metavar='KEY=VALUE', help='more settings for `tts-tune run`')
    a = ap.parse_args()
    make_corpus(a.data, a.corpus, a.speaker, a.clips, a.held_out, a.seed)
    print(f'{a.clips} strings, {a.held_out} of them held out with their recordings, in {a.corpus}')
    words = ['run', '--corpus', str(a.corpus), '--study', a.study, '--seed', str(a.seed), '--hparams', a.hparams, *a.words]
    print(shlex.join(['tts-tune', *words]), flush=True)
    if not a.run: return
    start = time.monotonic()
    subprocess.run([sys.executable, '-m', 'tts_tuner.cli', *words], check=True)
    metrics = {'seed': a.seed, 'seconds': round(time.monotonic() - start), **results.final_metrics(Path('runs') / a.study)}
    results.save('digits', metrics, file=f'digits-{a.seed}')
    print(json.dumps(metrics, indent=1))


if __name__ == '__main__': main()
