"Sound files and mel analysis on real recordings, and under a full disk"
import errno
import os
import subprocess
import sys

import numpy as np
import pytest

from tts_tuner.audio.griffin_lim import vocode
from tts_tuner.audio.mel import MelSpectrogram
from tts_tuner.audio.wav import load_wav, save_wav
from tts_tuner.config.errors import TTSTunerError
from tts_tuner.config.hparams import HParams


def test_round_trip_through_both_libraries(tmp_path):
    "librosa and soundfile read what save_wav wrote, and load_wav reads what soundfile wrote"
    import librosa
    import soundfile
    x = (0.3 * np.sin(np.arange(8000) * .1)).astype(np.float32)
    save_wav(tmp_path / 'a.wav', x, 22050)
    read, rate = librosa.load(tmp_path / 'a.wav', sr=None)
    assert rate == 22050 and np.abs(read - x).max() < 1e-4
    for name, subtype in (('b.flac', 'PCM_24'), ('c.wav', 'FLOAT'), ('d.ogg', None)):
        soundfile.write(tmp_path / name, x, 22050, subtype=subtype)
        y = load_wav(tmp_path / name, 22050)
        assert len(y) == len(x) and np.abs(y - x).max() < (.05 if name.endswith('ogg') else 1e-4)


def test_full_disk_keeps_the_old_sound(tmp_path, monkeypatch):
    path = tmp_path / 'sample.wav'
    save_wav(path, np.zeros(100), 22050)
    before = path.read_bytes()

    def full(_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(TTSTunerError, match='No space left to write sample.wav'): save_wav(path, np.ones(100), 22050)
    assert path.read_bytes() == before


def test_mel_equals_librosa_on_recorded_speech(shared_data):
    import librosa
    hp = HParams()
    bank = librosa.filters.mel(sr=hp.sample_rate, n_fft=hp.n_fft, n_mels=hp.n_mels, fmin=hp.mel_fmin, fmax=hp.mel_fmax)
    for path in sorted((shared_data / 'ljspeech-mini' / 'wavs').glob('*.flac')):
        x = load_wav(path, hp.sample_rate)
        S = np.abs(librosa.stft(x.astype(np.float64), n_fft=hp.n_fft, hop_length=hp.hop_length, pad_mode='reflect'))
        assert np.abs(MelSpectrogram(hp)(x) - np.log(np.maximum(bank @ S, hp.mel_floor)).T).max() < 1e-5, path.name


def test_copy_synthesis_is_good(shared_data):
    pesq = pytest.importorskip('pesq', reason="PESQ needs pip install 'tts_tuner[quality]'")
    from tts_tuner.audio.wav import resample
    hp = HParams()
    values = []
    for path in sorted((shared_data / 'ljspeech-mini' / 'wavs').glob('*.flac'), key=lambda p: p.stat().st_size)[:3]:
        x = load_wav(path, hp.sample_rate)
        y = vocode(MelSpectrogram(hp)(x), hp)
        values.append(pesq.pesq(16000, resample(x[:len(y)], 22050, 16000), resample(y, 22050, 16000), 'wb'))
        assert abs(20 * np.log10(y.std() / x.std())) < 1
    assert np.mean(values) >= 3.6


WITHOUT = '''
import sys
for name in ('librosa', 'soundfile', 'soxr', 'scipy', 'matplotlib'): sys.modules[name] = None
import numpy as np
from tts_tuner.audio.griffin_lim import vocode
from tts_tuner.audio.mel import MelSpectrogram
from tts_tuner.audio.wav import load_wav, save_wav
from tts_tuner.config.errors import UserError
from tts_tuner.config.hparams import HParams
hp = HParams()
save_wav(sys.argv[1], vocode(MelSpectrogram(hp)(np.sin(np.arange(9000) * .1)), hp, n_iter=2), 22050)
try: load_wav(sys.argv[1], 22050)
except UserError as e: print(e)
'''


def test_numpy_and_torch_suffice(tmp_path):
    "Analysis, vocoding and writing need no audio library; reading says which one it lacks"
    out = subprocess.run([sys.executable, '-c', WITHOUT, str(tmp_path / 'x.wav')], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.strip() == 'Reading sound needs the package soundfile: pip install soundfile.'
    assert (tmp_path / 'x.wav').stat().st_size > 9000
