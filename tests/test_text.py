"The synthesiser in processes, threads, odd places, and where it is missing"
import subprocess
import sys
import threading

import numpy as np
import pytest

from tts_tuner.config.errors import UserError

espeakng_loader = pytest.importorskip('espeakng_loader', reason="espeak-ng needs pip install 'tts_tuner[demo]'")

from tts_tuner.text import phonemes
from tts_tuner.text.phonemes import Speaker, phonemize

DIGEST = '''
import hashlib
from tts_tuner.text.phonemes import Speaker
s = Speaker()
h = hashlib.sha256()
for text in ('The old captain.', 'Is she here?', 'Nobody knows.'):
    x = s.speak(text)
    h.update(x.audio.tobytes() + repr((x.phones, x.words)).encode())
print(h.hexdigest())
'''


def test_same_sound_in_every_process():
    one, two = (subprocess.run([sys.executable, '-c', DIGEST], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert one == two and len(one.strip()) == 64


def test_threads_do_not_mix():
    texts = [f'Sentence {w}.' for w in ('alpha', 'beta', 'gamma', 'delta', 'epsilon', 'zeta')]
    want, got = {t: phonemize(t) for t in texts}, {}

    def work(t):
        for _ in range(5): got.setdefault(t, []).append(phonemize(t))

    threads = [threading.Thread(target=work, args=(t,)) for t in texts]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(r == want[t] for t in texts for r in got[t])


def test_two_languages_side_by_side():
    english = phonemize('hello')
    russian = phonemize('привет', 'ru')
    assert phonemize('hello') == english and phonemize('привет', 'ru') == russian and english != russian


def test_voices_under_a_long_path(tmp_path, monkeypatch):
    deep = tmp_path / ('d' * 100) / ('e' * 100)
    deep.mkdir(parents=True)
    link = deep / 'espeak-ng-data'
    link.symlink_to(espeakng_loader.get_data_path(), target_is_directory=True)
    monkeypatch.setattr(espeakng_loader, 'get_data_path', lambda: str(link))
    assert [s for s, _ in Speaker().speak('hello').phones] == phonemize('hello')


def test_no_voices(tmp_path, monkeypatch):
    monkeypatch.setattr(espeakng_loader, 'get_data_path', lambda: str(tmp_path))
    with pytest.raises(UserError, match='espeak-ng finds no voices in'): Speaker()


def test_no_library(tmp_path, monkeypatch):
    (tmp_path / 'libespeak-ng.so').write_text('not a library')
    monkeypatch.setattr(espeakng_loader, 'get_library_path', lambda: str(tmp_path / 'libespeak-ng.so'))
    with pytest.raises(UserError, match='espeak-ng cannot be loaded'): Speaker()
    monkeypatch.setattr(espeakng_loader, 'get_library_path', lambda: str(tmp_path / 'absent.so'))
    with pytest.raises(UserError, match='espeak-ng cannot be loaded'): Speaker()


def test_a_temporary_folder_that_forbids_programs(monkeypatch):
    monkeypatch.setattr(phonemes.shutil, 'copy', lambda a, b: (_ for _ in ()).throw(OSError('read-only')))
    assert [s for s, _ in Speaker().speak('hello').phones] == phonemize('hello')


def test_times_are_where_the_sound_is():
    "Silence in the pause after the comma, sound in the words on both sides of it"
    spoken = Speaker().speak('One, two.')
    pause = next(i for i, (s, _) in enumerate(spoken.phones) if s == ' ')
    a, b = spoken.phones[pause][1], spoken.phones[pause + 1][1]
    level = lambda t0, t1: np.sqrt(np.mean(spoken.audio[int(t0 * spoken.sample_rate):int(t1 * spoken.sample_rate)] ** 2))
    assert b - a > .1 and level(a + .04, b - .04) < .02 * level(spoken.phones[0][1], a)


def test_missing_number_words():
    code = "import sys; sys.modules['num2words'] = None\nfrom tts_tuner.text.cleaners import clean\nprint(clean('no digits'))\nclean('5')"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout == 'no digits\n' and 'Spelling numbers needs the package num2words: pip install num2words.' in out.stderr
