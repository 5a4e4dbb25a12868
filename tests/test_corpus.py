"Corpus, demo corpus, features and loader on real files, across processes and under faults"
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from helpers import make_tiny_corpus, tiny_hparams

from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.hparams import create_hparams
from tts_tuner.config.settings import RunSettings
from tts_tuner.data import features as features_module
from tts_tuner.data.corpus import make_data_folders, read_corpus
from tts_tuner.data.demo import make_demo_corpus
from tts_tuner.data.features import build_features
from tts_tuner.data.loader import BatchStream, TTSDataset, split
from tts_tuner.text.frontend import tokenize
from tts_tuner.tuner.loop import prepare_data

RATE = 22050


def voice(seconds, level=0.3, rate=RATE):
    t = np.arange(int(seconds * rate)) / rate
    return level * np.sin(2 * np.pi * 150 * t) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))


def spoiled(path, how):
    "A good wav file, spoiled"
    sf.write(path, voice(1.5), RATE)
    raw = path.read_bytes()
    path.write_bytes({'text': b'this is no sound at all', 'empty file': b'', 'cut in the header': raw[:20], 'header alone': raw[:44]}[how])


BAD = {  # name: (text, sound or how to spoil a file, what the reason must say)
    'empty text': ('', voice(1.5), 'text is empty'),
    'blank text': ('   ', voice(1.5), 'text is empty'),
    'marks only': ('?!', voice(1.5), 'no letters'),
    'greek letter': ('about λ today', voice(1.5), 'symbols outside'),
    'chinese': ('你好吗', voice(1.5), 'symbols outside'),
    'digital silence': ('nothing to hear', np.zeros(30000), 'silent'),
    'nearly silent': ('nothing to hear', voice(1.5, 0.004), 'silent'),
    'one click': ('nothing to hear', np.eye(1, 30000, 5000)[0] * 0.1, 'silent'),
    'clipped': ('much too loud', np.clip(voice(1.5, 9.0), -1, 1), 'clipped'),
    'too short': ('a', voice(0.2), 'less than 0.3 s'),
    'too long': ('word ' * 90, voice(21.0), 'more than 20 s'),
    'rushed': ('seventy letters cannot possibly be spoken within so little time as this', voice(0.9), 'too short for'),
    'dragged': ('yes', voice(8.0), 'too long for'),
    'not a sound': ('some text here', 'text', 'not a sound file'),
    'empty file': ('some text here', 'empty file', 'not a sound file'),
    'torn header': ('some text here', 'cut in the header', 'not a sound file'),
    'no samples': ('some text here', 'header alone', 'no samples'),
    'not a number': ('some text here', np.where(np.arange(30000) == 9, np.nan, voice(30000 / RATE)), 'not numbers'),
    'missing file': ('some text here', None, 'missing'),
    'a/b': ('some text here', None, 'not a file name'),
    'stereo out of phase': ('some text here', np.stack([voice(1.5), -voice(1.5)], 1), 'silent'),
}


@pytest.fixture(scope='module')
def bad_corpus(tmp_path_factory):
    root = make_tiny_corpus(tmp_path_factory.mktemp('bad') / 'corpus', n=4)
    with open(root / 'metadata.csv', 'a', encoding='utf-8') as f:
        for name, (text, sound, _) in BAD.items():
            f.write(f'{name}|{text}|{text}\n')
            path = root / 'wavs' / f'{name}.wav'
            if isinstance(sound, str): spoiled(path, sound)
            elif sound is not None: sf.write(path, sound, RATE, subtype='FLOAT' if name == 'not a number' else None)
        f.write('tone001|once more|once more\n')
    (root / 'wavs' / 'copy.wav').write_bytes((root / 'wavs' / 'tone002.wav').read_bytes())
    with open(root / 'metadata.csv', 'a', encoding='utf-8') as f: f.write('copy|another text|another text\n')
    return read_corpus(root, tiny_hparams())


@pytest.mark.parametrize('name', BAD)
def test_each_bad_clip_is_set_aside_with_its_reason(bad_corpus, name):
    reasons = {r.id: r.reason for r in bad_corpus.rejected}
    assert BAD[name][2] in reasons[name]


def test_good_clips_stay_and_every_line_is_accounted_for(bad_corpus):
    assert [c.id for c in bad_corpus.clips] == [f'tone00{i}' for i in range(4)]
    assert len(bad_corpus.rejected) == len(BAD) + 2
    assert {'tone001', 'copy'} <= {r.id for r in bad_corpus.rejected}


@pytest.mark.parametrize('content, says', [
    (None, 'no metadata.csv'), (b'', 'is empty'), (b'\n \n', 'is empty'), (b'a,some text\n', 'Line 1'), (b'tone000|x|x\nb|1|2|3|4\n', 'Line 2'),
    ('a|Größe'.encode('latin-1'), 'UTF-8'), (b'gone|some text|some text\n', 'None of the 1 clips'),
])
def test_metadata_that_cannot_be_used_is_one_sentence(tmp_path, content, says):
    root = make_tiny_corpus(tmp_path / 'c', n=2)
    if content is None: (root / 'metadata.csv').unlink()
    else: (root / 'metadata.csv').write_bytes(content)
    with pytest.raises(UserError, match=says) as e: read_corpus(root, tiny_hparams())
    assert '\n' not in str(e.value) and e.value.exit_code == 2


def test_digest_names_the_data_and_nothing_else(tmp_path):
    root, hp = make_tiny_corpus(tmp_path / 'c', n=5), tiny_hparams()
    digest = read_corpus(root, hp).digest
    other = shutil.copytree(root, tmp_path / 'elsewhere')
    (other / 'metadata.csv').write_text('\n'.join(reversed((root / 'metadata.csv').read_text().splitlines())))
    assert read_corpus(other, hp).digest == read_corpus(root, hp).digest == digest
    samples, rate = sf.read(other / 'wavs' / 'tone003.wav', dtype='int16')
    samples[1234] ^= 1
    sf.write(other / 'wavs' / 'tone003.wav', samples, rate)
    assert read_corpus(other, hp).digest != digest


def test_timings_and_held_out_files_that_are_wrong(tmp_path):
    root, hp = make_tiny_corpus(tmp_path / 'c', n=8), tiny_hparams()
    table = json.loads((root / 'timings.json').read_text())
    table['tone002']['words'][0][2] = 99.0
    (root / 'timings.json').write_text(json.dumps(table))
    corpus = read_corpus(root, hp)
    assert 'tone002' not in corpus.timings and len(corpus.timings) == 7 and 'tone002' in corpus.notes[0]
    (root / 'timings.json').write_text('{')
    with pytest.raises(UserError, match='not JSON'): read_corpus(root, hp)
    (root / 'timings.json').unlink()
    (root / 'held_out.txt').write_text('tone001\ntone005\n')
    features = build_features(read_corpus(root, hp), hp, tmp_path / 'cache')
    train, valid = split(features, hp)
    assert {features.ids[i] for i in valid} == {'tone001', 'tone005'} and len(train) == 6 and features.times(0) is None
    (root / 'held_out.txt').write_text('tone05\n')
    with pytest.raises(UserError, match='Did you mean "tone005"'): read_corpus(root, hp)


def test_speakers_and_flac(tmp_path):
    root, hp = make_tiny_corpus(tmp_path / 'c', n=6, speakers=('ann', 'bob')), tiny_hparams()
    for path in (root / 'wavs').glob('*.wav'):
        sf.write(path.with_suffix('.flac'), *sf.read(path, dtype='int16'))
        path.unlink()
    corpus = read_corpus(root, hp)
    assert corpus.speakers == ('ann', 'bob') and len(read_corpus(root, hp, speaker='ann')) == 3
    assert build_features(corpus, hp, tmp_path / 'cache').speakers == ['ann', 'bob'] * 3


def test_one_clip_is_too_few_to_train_on(tmp_path):
    hp = tiny_hparams()
    one = build_features(read_corpus(make_tiny_corpus(tmp_path / 'c', n=1), hp), hp, tmp_path / 'cache')
    with pytest.raises(UserError, match='at least 2 usable clips'): split(one, hp)
    two = build_features(read_corpus(make_tiny_corpus(tmp_path / 'd', n=2), hp), hp, tmp_path / 'cache')
    train, valid = split(two, hp)
    assert len(train) == len(valid) == 1 and len(next(BatchStream(TTSDataset(two, train, hp), hp))) == 1


def test_first_start_makes_folders_and_touches_nothing(tmp_path):
    make_data_folders(tmp_path / 'data')
    (tmp_path / 'data' / 'corpus' / 'metadata.csv').write_text('mine')
    folders = make_data_folders(tmp_path / 'data')
    assert all(f.is_dir() for f in folders.values()) and (folders['corpus'] / 'metadata.csv').read_text() == 'mine'
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot be made'): make_data_folders(tmp_path / 'file')


def test_a_study_makes_its_folders_and_says_what_was_set_aside(tmp_path, bad_corpus):
    said: list[str] = []
    settings = RunSettings(corpus=str(bad_corpus.root), data=str(tmp_path / 'data'), runs=str(tmp_path / 'runs'), hparams=dict(frontend='characters', n_mels=20))
    data = prepare_data(settings, said.append)
    assert {p.name for p in (tmp_path / 'data').iterdir()} == {'README.txt', 'corpus', 'demo', 'cache'} and data.cache == str(tmp_path / 'data' / 'cache')
    assert said[0].startswith('4 clips of ') and said[0].endswith(f'{len(bad_corpus.rejected)} set aside.')
    assert said[1:11] == [f'{r.id} is set aside: {r.reason}.' for r in bad_corpus.rejected[:10]] and said[11].endswith('manifest.json names them all.')
    kept = json.loads((settings.folder / 'manifest.json').read_text())
    assert [r['id'] for r in kept['rejected']] == [r.id for r in bad_corpus.rejected]


def test_44_khz_is_read_at_22_khz(tmp_path):
    root, hp = tmp_path / 'c', tiny_hparams()
    (root / 'wavs').mkdir(parents=True)
    for i in range(3): sf.write(root / 'wavs' / f'a{i}.wav', np.stack([voice(1.0 + i / 10, rate=44100)] * 2, 1), 44100)
    (root / 'metadata.csv').write_text(''.join(f'a{i}|some words here|some words here\n' for i in range(3)))
    features = build_features(read_corpus(root, hp), hp, tmp_path / 'cache')
    assert abs(int(features.n_frames[0]) - RATE // hp.hop_length) <= 1 and len(features.audio(0)) <= RATE


# ---- features

def test_a_full_disk_leaves_no_half_cache(tmp_path, tiny_corpus, monkeypatch):
    hp, corpus = tiny_hparams(), read_corpus(tiny_corpus, tiny_hparams())

    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(features_module.os, 'fsync', full)
    with pytest.raises(TTSTunerError, match='No space left') as e: build_features(corpus, hp, tmp_path)
    assert e.value.exit_code == 1 and not [p for p in tmp_path.rglob('*') if p.is_file()]
    monkeypatch.undo()
    assert len(build_features(corpus, hp, tmp_path)) == 24


BUILD = """
import sys; sys.path.insert(0, sys.argv[3])
from helpers import tiny_hparams
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import build_features
hp = tiny_hparams()
f = build_features(read_corpus(sys.argv[1], hp), hp, sys.argv[2])
print(f.key, round(f.mel_mean, 9), sum(float(f.mel(i).sum()) for i in range(len(f))))
"""


def test_two_processes_may_build_the_same_features_at_once(tmp_path, tiny_corpus):
    command = [sys.executable, '-c', BUILD, str(tiny_corpus), str(tmp_path), str(Path(__file__).parent)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in both]
    assert said[0] == said[1] != '' and all(p.returncode == 0 for p in both)
    assert sorted(p.name for p in tmp_path.rglob('*') if p.is_file()) == ['index.json', 'mels.npy']


def test_resume_in_another_process_gives_the_same_batches(tmp_path, tiny_corpus):
    hp = tiny_hparams()
    features = build_features(read_corpus(tiny_corpus, hp), hp, tmp_path)
    train, _ = split(features, hp)
    stream = BatchStream(TTSDataset(features, train, hp), hp)
    for _ in range(7): next(stream)
    state = json.dumps(stream.state_dict())
    expected = [next(stream) for _ in range(12)]
    program = BUILD + """
import json, torch
from tts_tuner.data.loader import BatchStream, TTSDataset, split
stream = BatchStream(TTSDataset(f, split(f, hp)[0], hp), hp)
stream.load_state_dict(json.loads(sys.argv[4]))
torch.save([(b.ids, b.mel, b.gate) for b in (next(stream) for _ in range(12))], sys.argv[5])
"""
    args = [str(tiny_corpus), str(tmp_path), str(Path(__file__).parent), state, str(tmp_path / 'batches.pt')]
    subprocess.run([sys.executable, '-c', program, *args], check=True, timeout=120, capture_output=True)
    for batch, (ids, mel, gate) in zip(expected, torch.load(tmp_path / 'batches.pt'), strict=True):
        assert batch.ids == ids and torch.equal(batch.mel, mel) and torch.equal(batch.gate, gate)


def test_real_speech(shared_data, tmp_path):
    hp = create_hparams('default')
    corpus = read_corpus(shared_data / 'ljspeech-mini', hp)
    assert len(corpus) == 24 and not corpus.rejected
    features = build_features(corpus, hp, tmp_path)
    train, valid = split(features, hp)
    batch = next(BatchStream(TTSDataset(features, train, hp), hp))
    assert len(valid) == 6 and batch.mel.shape[1] == 80 and len(batch) == 18 and features.times(0) is None


# ---- demo corpus

def test_full_demo_corpus(tmp_path):
    hp, start = create_hparams('small'), time.process_time()
    corpus = read_corpus(make_demo_corpus(tmp_path / 'demo'), hp)
    made = time.process_time()
    features = build_features(corpus, hp, tmp_path / 'cache')
    assert made - start < 15 and time.process_time() - made < 20
    assert len(corpus) == len(features) == 700 and not corpus.rejected and not corpus.notes
    assert len({c.text for c in corpus.clips}) == 700
    assert len({w for c in corpus.clips for w in c.text.lower().strip('.?').split()}) >= 800
    assert all(0.9 <= c.seconds <= 3.2 for c in corpus.clips)
    for i in range(0, 700, 7):
        times = features.times(i)
        assert features.tokens[i] == tokenize(features.texts[i], 'phonemes', 'en')
        assert (np.diff(times) >= 0).all() and times[0] < 0.2 and times[-1] <= features.n_frames[i] * hp.hop_length / hp.sample_rate + 1e-6
    characters = build_features(corpus, create_hparams('small', 'frontend=characters'), tmp_path / 'cache')
    assert sum(characters.times(i) is not None for i in range(700)) >= 690


def test_a_killed_start_is_made_again_to_the_same_data(tmp_path):
    root = tmp_path / 'demo'
    program = f'from tts_tuner.data.demo import make_demo_corpus; make_demo_corpus({str(root)!r}, n=300)'
    process = subprocess.Popen([sys.executable, '-c', program])
    while not (root / 'wavs').is_dir() or len(list((root / 'wavs').iterdir())) < 20: time.sleep(0.01); assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (root / 'metadata.csv').exists()
    hp = create_hparams('small')
    again = read_corpus(make_demo_corpus(root, n=60), hp).digest
    assert again == read_corpus(make_demo_corpus(tmp_path / 'fresh', n=60), hp).digest
