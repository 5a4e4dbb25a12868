"The report: one file that opens anywhere, whatever state the study is in"
import base64, html.parser, io, json, re, wave

import numpy as np
import pytest

from tts_tuner.config.contracts import Decision, Evidence, to_json
from tts_tuner.config.hparams import create_hparams
from tts_tuner.config.settings import load_settings, save_settings
from tts_tuner.facts import closing_words, read_study, toy_study
from tts_tuner.report import content, importance, listening, make_report, read_samples, samples_at, tiles
from tts_tuner.verdicts import answers, gate_cards, health_card, phase_bands, remarks, standing, winner_metrics

HP = create_hparams('small')


class Page(html.parser.HTMLParser):
    "Collects tags, and whether they are closed in order"
    EMPTY = {'meta', 'link', 'img', 'br', 'line', 'rect', 'image', 'circle', 'polyline'}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.addresses = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.addresses += [v for k, v in attrs if k in ('src', 'href', 'action', 'data', 'poster')]
        if tag not in self.EMPTY: self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.addresses += [v for k, v in attrs if k in ('src', 'href')]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f'</{tag}> closes {self.open[-1:]}'
        self.open.pop()

    def all(self, tag, **attrs): return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attrs.items())]


def sample(folder, i, name, text, sharp=0.05, steps=30, **other):
    "A sentence as the trainer leaves it"
    rng = np.random.default_rng(i)
    t, n = np.linspace(0, 1, steps)[:, None], np.linspace(0, 1, len(text) + 1)[None]
    a = np.exp(-(t - n) ** 2 / (2 * sharp**2))
    a /= a.sum(1, keepdims=True)
    mel = (-6 + 2 * rng.normal(size=(steps * 4, 80))).astype('f4')
    folder.mkdir(parents=True, exist_ok=True)
    values = dict(teacher=a, free=a, true=a > 0.5, logmel=mel, reference=mel, tokens=np.array([*text, '<end>']), id=name, text=text, ok=True,
                  reasons=np.array([], dtype=str), seconds_per_step=0.0464, distance=4.25)
    np.savez_compressed(folder / f'{i:02d}.npz', **{**values, **other})


@pytest.fixture
def study(tmp_path, monkeypatch):
    "A study with samples and the corpus they come from"
    from tts_tuner.audio.wav import save_wav

    monkeypatch.chdir(tmp_path)
    names = ['d01', 'd02', 'd03']
    for i, name in enumerate(names): save_wav(tmp_path / f'data/demo/wavs/{name}.wav', 0.3 * np.sin(np.arange(30000) * (0.05 + 0.03 * i)), 22050)
    (tmp_path / 'data/demo/metadata.csv').write_text(''.join(f'{n}|Words.|Words.\n' for n in names))
    folder = toy_study(tmp_path / 'runs' / 'toy')
    for step in (40, 200, 600):
        for i, text in enumerate(('in the morning they drink tea', 'who <b>knows</b> & cares?')): sample(folder / f't000/g001/samples/step_{step:06d}', i, names[i], text)
    sample(folder / 't001/g001/samples/step_000040', 0, 'd01', 'in the morning they drink tea', sharp=5.0)
    return folder


def test_one_file_that_needs_nothing_else(study):
    text = make_report(study).read_text()
    page = Page(text)
    assert not page.open and len(text) < 6_000_000
    assert all(a.startswith(('data:', '#')) for a in page.addresses), [a[:40] for a in page.addresses if not a.startswith(('data:', '#'))]
    assert not re.search(r'@import|url\(|https?://(?!www\.w3\.org)|fetch\(|XMLHttp|<script src', text)
    targets = {a['id'] for _, a in page.tags if 'id' in a}
    assert {a[1:] for a in page.addresses if a.startswith('#')} <= targets


def test_players_beside_their_anchors(study):
    page = Page(make_report(study).read_text())
    sounds = page.all('audio')
    assert len(sounds) == 2 * 4  # voice, recording, copy synthesis, mean frame for two sentences
    for sound in sounds:
        with wave.open(io.BytesIO(base64.b64decode(sound['src'].split(',')[1]))) as w:
            assert w.getsampwidth() == 2 and w.getframerate() == 22050 and w.getnframes() > 20_000
    names = [b['aria-label'].removeprefix('play: ') for b in page.all('button')]
    assert names[:4] == ['this voice', 'recording', 'copy synthesis', 'mean frame']


def test_what_the_page_says(study):
    text = make_report(study).read_text()
    for words in ('t000 wins: score 0.57', 't001 is given up: diagonality 0.02', 'not aligning', 'learning_rate 0.004', 'copy synthesis', '11.80 dB', 'teacher-forced',
                  'free-running', 'true times', 'never learned to read', 'How it learned to', 'tts-tune run --corpus my_voice', 'Too few trials'):
        assert words in text, words
    assert 'who &lt;b&gt;knows' in text and '<b>knows' not in text


def test_corpus_without_recordings_at_hand(study, tmp_path):
    (tmp_path / 'data/demo/metadata.csv').unlink()
    shown = listening(samples_at(read_study(study).trials[0], 600), HP, None)
    assert [s['name'] for s in shown[0]['sounds']] == ['this voice', 'copy synthesis', 'mean frame']
    assert make_report(study).is_file()


def test_many_long_sentences_stay_within_bounds(study):
    for i in range(2, 12): sample(study / 't000/g001/samples/step_000600', i, 'd01', 'long ' * 12, steps=120)
    assert make_report(study).stat().st_size < 6_000_000


def test_unfinished_and_empty_studies(tmp_path):
    cut = toy_study(tmp_path / 'cut', finished=False)
    text = make_report(cut).read_text()
    assert 'not finished' in text and 'tts-tune run --study cut' in text
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new/config.yaml').write_text('study: new\n')
    page = Page(make_report(tmp_path / 'new').read_text())
    assert not page.open and not page.all('audio')


def test_torn_files_do_not_stop_the_report(study):
    folder = study / 't000/g001/samples/step_000600'
    (folder / '00.npz').write_bytes((folder / '00.npz').read_bytes()[:300])
    (study / 't000/g001/metrics.jsonl').open('a').write('{"step": 601, "sco')
    (study / 'decisions.jsonl').open('a').write('{"record": "Decision", "kind": "fi')
    (study / 'study.journal').write_text('{"op_code": 0, "torn')
    assert len(read_samples(folder)) == 1 and 'who &lt;b&gt;knows' in make_report(study).read_text()


def test_which_setting_mattered(tmp_path):
    "In a study whose outcome is the learning rate alone, the learning rate explains most"
    from tts_tuner.tuner.engines import open_engine

    folder = toy_study(tmp_path / 'runs' / 'toy')
    settings = load_settings(None, ['study=toy', f'runs={tmp_path}/runs', 'trials=14', 'recipe_first=false', 'failure_example=false', 'optimization.sampler=random'])
    save_settings(folder / 'config.yaml', settings)
    engine = open_engine(settings)
    engine.ask(14)
    for t in engine.trials(): engine.tell(t.number, 'complete', max(0.0, 1 - abs(np.log(t.params['learning_rate'] / 8e-3))))
    before = (folder / 'study.journal').read_bytes()
    shares, words = importance(read_study(folder))
    assert shares[0][0] == 'learning_rate' and shares[0][1] > 0.5 and 'With 14 trials this is a hint' in words
    assert 'learning_rate</code>' in make_report(folder).read_text() and (folder / 'study.journal').read_bytes() == before


def test_a_manifest_is_told(study):
    clips = [dict(id=f'd{i:02d}', text='Words.', seconds=1.5) for i in range(80)]
    (study / 'manifest.json').write_text(json.dumps(dict(digest='ab' * 32, clips=clips, rejected=[dict(id='d99', reason='it is silent')])))
    text = make_report(study).read_text()
    assert '80 usable clips, 2.0 minutes' in text and 'd99' in text and 'it is silent' in text and 'abababab' in text


def test_numbers_that_are_none_are_not_shown(study):
    "A trial that diverged leaves NaN; the page has a dot there, and curves leave it out"
    with (study / 't002/g001/metrics.jsonl').open('a') as f: f.write('{"step": 640, "time": 1700000000, "score": NaN, "alignment_score": NaN, "mcd": Infinity}\n')
    assert all(0 <= t['share'] <= 100 for t in content(read_study(study))['tiles'])
    words = re.sub(r'data:[^"]*', '', make_report(study).read_text())
    assert not re.search(r'\b(nan|inf|None)\b', words)


def test_the_exam_has_the_last_word(tmp_path):
    "Numbers of the exam stand before those that choices rested on"
    study = toy_study(tmp_path / 'runs' / 'toy')
    before = closing_words(read_study(study))
    exam = dict(model='0' * 64, sentences=36, metrics=dict(read_study(study).numbers, success=0.5, score=0.3))
    (study / 'exam').mkdir()
    (study / 'exam' / 'exam.json').write_text(json.dumps(exam))
    after = closing_words(read_study(study))
    assert 'never spoken before' not in before and '36 held-out sentences that were never spoken before' in after
    assert 'free-running success  50 %' in after and tiles(read_study(study).outcome)[0]['value'].startswith('50')
    assert '36 held-out sentences' in make_report(study).read_text()


# What the rulers say

@pytest.fixture
def toy(tmp_path):
    "A study without sounds"
    return toy_study(tmp_path / 'runs' / 'toy')


def test_the_page_has_the_verdicts(toy):
    text = make_report(toy).read_text()
    page = Page(text)
    assert not page.open
    for words in ('Where does it stand?', 'Will it speak?', 'Does its loss explode?', 'Does speech end by itself?', 'May it end here?'):
        assert text.count(words) >= 2 + 3, words  # the winner's card, the head of the table, a sentence for each of three trials
    for words in ('will speak', 'calm', 'pre alignment', 'Sanity gate', 'Monitor gate', 'Release gate', 'Asked of the winner, t000', 'not measured: PESQ, predicted opinion',
                  'PESQ and predicted opinion are not measured by default', 'Where attention stood', 'id="standing"', 'href="#standing"'): assert words in text, words
    for group, weight in dict(loss=30, audio=25, training=20, attention=15, system=10).items():
        assert re.search(rf'<td>{group}</td><td class="n">{weight} %</td>', text), group
    assert page.all('rect', **{'class': 'p0'}) and page.all('rect', **{'class': 'p3'})
    assert 'val_loss' not in re.sub(r'data:[^"]*', '', text) and 'pre_alignment' not in text


def test_bands_are_the_phases(toy):
    "They touch, cover the run from its beginning, and change where the steady reading does"
    from tts_tuner.quality.phases import follow_phases

    trial = read_study(toy).trials[2]
    bands, (steps, values) = phase_bands(trial), trial.curve('alignment_score')
    assert bands[0][0] == 0 and bands[-1][1] == steps[-1] and all(a[1] == b[0] and a[2] != b[2] for a, b in zip(bands, bands[1:]))
    assert [b[0] for b in bands[1:]] == [float(c.step) for c in follow_phases(values, steps).changes] and len(bands) >= 2


def test_gates_by_what_was_measured(toy):
    metrics = winner_metrics(read_study(toy))
    states = lambda m: [g['state'] for g in gate_cards(m)]
    heard = dict(pesq=2.4, pesq_copy_synthesis=3.9)
    assert states(metrics) == ['open', 'open', 'closed'] and states({**metrics, **heard}) == ['open'] * 3
    assert states({**metrics, **heard, 'pesq': 1.2})[2] == 'closed' and states({}) == ['closed'] * 3
    [unheard] = [c for c in gate_cards(metrics)[2]['checks'] if c['mark'] == '?']
    assert unheard['words'].startswith('PESQ and predicted opinion are not measured by default')
    reasons = [c['words'] for c in gate_cards({**metrics, 'alignment_score': 0.82})[2]['checks'] if c['mark'] == '✗']
    assert reasons == ['diagonality 0.82 is under 0.85']


def test_health_tells_what_it_lacks(toy):
    found = read_study(toy)
    card = health_card(winner_metrics(found))
    by_name = {g['name']: g for g in card['groups']}
    assert by_name['system']['value'] == '·' and by_name['system']['made'] == 'not measured' and 'would lie between' in card['words']
    assert 'gain of the last ten validations' in by_name['training']['made'] and 'skipped steps' in by_name['training']['missing']
    whole = winner_metrics(found) | dict(system_memory_percent=40.0, speed_ratio=1.0)
    assert 'would lie between' not in health_card(whole)['words'] and float(health_card({**whole, 'success': 0.1})['value']) < float(health_card(whole)['value'])


def test_the_winner_is_measured_over_the_last_steps(toy):
    "One odd step of training does not make or break the index, and nothing after the winning step counts"
    rows = [json.loads(line) for line in (toy / 't000/g001/metrics.jsonl').read_text().splitlines()]
    rows += [dict(step=s, time=1.7e9 + s, grad_norm=900.0 if s in (570, 620) else 0.5, mel_postnet_loss=0.5, frames_per_second=100.0 if s < 590 else 50.0) for s in range(1, 640)
             if s % 40]
    (toy / 't000/g001/metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    m = winner_metrics(read_study(toy))
    assert m['grad_norm'] == 0.5 and m['speed_ratio'] == 1.0 and m['generalisation_gap'] == pytest.approx(m['val_mel_loss'] / 0.5)


def test_alerts_and_early_stops_are_told(toy):
    lines = (toy / 'decisions.jsonl').read_text().splitlines()
    gone = Decision('alert', 't002', 240, 't002: The loss has gone up to 7.1.', (Evidence('divergence', 'diverging', 240, 0.95, 'The loss has gone up to 7.1.'),), 1.7e9 + 2)
    ended = Decision('stop', 't002', 480, 't002 ends here, nothing more is to be gained: it waited long.', (Evidence('patience', 'stop', None, 1.0, 'It waited long.'),), 1.7e9 + 3)
    lost = Decision('stop', 't002', 600, 't002 does not win: score 0.2.', (Evidence('alignment', 'not the best', 600, 1.0, ''),), 1.7e9 + 10)
    (toy / 'decisions.jsonl').write_text('\n'.join([*lines[:-1], to_json(gone), to_json(ended), lines[-1], to_json(lost)]) + '\n')
    said = remarks(read_study(toy))[1]
    assert [(r['kind'], r['step']) for r in said] == [('alert', '240'), ('stop', '480')]
    story = re.search(r'<h2 id="done">.*?<h2 id="trials">', make_report(toy).read_text(), re.S)[0]
    assert 'The loss has gone up to 7.1' in story and 't002 ends here' in story and 'does not win' not in story
    assert re.sub(r'\s+', ' ', story).index('alert</span>') < re.sub(r'\s+', ' ', story).index('stop</span>')


def test_studies_that_are_older_than_the_rulers(tmp_path):
    "Few metrics, none, strange ones, settings that nobody knows: a report all the same"
    old = toy_study(tmp_path / 'old')
    for path in old.glob('t*/g001/metrics.jsonl'):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(''.join(json.dumps({k: r[k] for k in ('step', 'time', 'alignment_score', 'score')}) + '\n' for r in rows))
        (path.parent / 'hparams.yaml').unlink()
    text = make_report(old).read_text()
    assert 'gate accuracy was not measured' in text and 'cannot say' in text and not Page(text).open
    (old / 'config.yaml').write_text('study: old\nearly_stopping:\n  mood: 3\n')
    (old / 't000/g001/metrics.jsonl').write_text('{"step": 600, "time": 1, "alignment_score": 40.0, "score": 0.3, "val_loss": -1e308, "stop_rate": 7}\n')
    assert 'Its numbers cannot be judged' in make_report(old).read_text()
    for path in old.glob('t*/g001/metrics.jsonl'): path.write_text('{"step": 10, "time": 1, "score": 0.1, "train_loss": 2.0}\n')
    text = make_report(old).read_text()
    assert 'id="standing"' not in text and 'Where attention stood' not in text


def test_an_unfinished_study_has_a_leader(tmp_path):
    cut = toy_study(tmp_path / 'cut', finished=False)
    assert 'Asked of the leader, t000' in make_report(cut).read_text() and len(standing(read_study(cut))['answers']) == 5
    assert all(len(answers(read_study(cut), t)) == 5 for t in read_study(cut).trials)


def test_a_training_of_one_generation_has_its_winner(tmp_path):
    study = toy_study(tmp_path / 'one')
    name = read_study(study).winner.name
    (study / name / 'g001' / 'generation.json').write_text('{"parent": "", "begun": 0}')
    record = study / 'decisions.jsonl'
    record.write_text(record.read_text().replace(f'"subject": "{name}"', f'"subject": "{name}/g001"'))
    assert closing_words(read_study(study)).startswith(f'{name}/g001 wins')
