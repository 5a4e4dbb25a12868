"A corpus of tones: each letter is a pitch of its own, so that a tiny model has something to learn"
import random
import wave
from pathlib import Path

import numpy as np

LETTERS = 'abcdefghij'
RATE = 8000

TINY = dict(sample_rate=RATE, n_fft=256, hop_length=128, win_length=256, n_mels=20, mel_fmax=None, frontend='characters', symbols_embedding_dim=16,
            encoder_embedding_dim=16, encoder_n_convolutions=1, attention_rnn_dim=24, attention_dim=8, attention_location_n_filters=4,
            attention_location_kernel_size=5, decoder_rnn_dim=24, prenet_dim=16, postnet_embedding_dim=8, postnet_n_convolutions=2, batch_size=4,
            bucket_batches=2, max_steps=12, eval_every=6, checkpoint_every=3, n_validation=4, n_free_running=3, lr_warmup_steps=2, max_decoder_steps=60,
            device='cpu')


def make_tiny_corpus(root: Path, n: int = 20, seed: int = 3) -> Path:
    "Write `n` clips of 5 to 9 letters, 80 ms each, in the LJSpeech layout"
    draw = random.Random(seed)
    (root / 'wavs').mkdir(parents=True)
    rows = []
    for i in range(n):
        word = ''.join(draw.choice(LETTERS) for _ in range(draw.randint(5, 9)))
        t = np.arange(int(0.08 * RATE)) / RATE
        sound = np.concatenate([0.4 * np.sin(2 * np.pi * (300 + 250 * LETTERS.index(c)) * t) * np.hanning(len(t)) for c in word])
        with wave.open(str(root / 'wavs' / f'clip{i:02d}.wav'), 'wb') as f:
            f.setnchannels(1)
            f.setsampwidth(2)
            f.setframerate(RATE)
            f.writeframes((sound * 32767).astype('<i2').tobytes())
        rows.append(f'clip{i:02d}|{word}|{word}')
    (root / 'metadata.csv').write_text('\n'.join(rows) + '\n')
    return root
