"A model that is no Tacotron 2, trained and tuned by the same tuner"
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hum import Hum

from tts_tuner.config.contracts import read_decisions
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.settings import load_settings
from tts_tuner.facts import closing_words, read_study
from tts_tuner.report import make_report
from tts_tuner.status import study_status
from tts_tuner.training.model_suite import check_model
from tts_tuner.training.tts_model import completed, train_model
from tts_tuner.tuner.generation_loop import run_generations
from tts_tuner.tuner.loop import Data, run_study
from tts_tuner.tuner.trials import PlainView, read_status

PROGRAM = (sys.executable, str(Path(__file__).with_name('hum.py')))
SPACE = {'learning_rate': dict(type='loguniform', low=1e-3, high=3e-2), 'own.aim': dict(type='uniform', low=0.1, high=1.0, default=0.5)}


class Silent(PlainView):
    def say(self, text): pass


def make(tmp_path, **flags):
    given = dict(study='hum', runs=str(tmp_path / 'runs'), hparams={'max_steps': 120, 'device': 'cpu', 'eval_every': 10, 'checkpoint_every': 10, 'own.pitch': 180.0},
                 search_space=SPACE, trainer=PROGRAM, trials=3, workers=2, failure_example=False, tracking=dict(enabled=False), early_stopping=dict(enabled=False))
    return load_settings(**(given | flags))


def tune(settings, how=run_study): return how(settings, Silent(), prepare=lambda s, say: Data('corpus', 'abc'), poll=0.02)


def test_it_keeps_its_word(): check_model(Hum, own=dict(pitch=180.0))


def test_trials_of_another_model(tmp_path):
    "A whole study: the trainer of the settings, settings of its own searched and passed on, a winner, a model, a report"
    settings = make(tmp_path)
    result = tune(settings)
    words = (settings.folder / 't001' / 'g001' / 'train.log').read_text()
    assert 'hum.py' in words and 'own.pitch=180.0' in words and 'own.aim=' in words
    assert result.metrics['score'] > 0.3 and result.metrics['alignment_score'] == result.metrics['success'] and result.best_model.is_file()
    for p in settings.folder.glob('t*/g001/metrics.jsonl'):
        steps = [json.loads(line)['step'] for line in p.read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)), p
    assert make_report(settings.folder).is_file() and study_status(settings.folder).state == 'finished'
    assert 'tts-tune synth' not in closing_words(read_study(settings.folder)), 'which speaks with our own model only'
    before = (settings.folder / 'decisions.jsonl').read_text()
    assert tune(settings).winner == result.winner and (settings.folder / 'decisions.jsonl').read_text() == before


def test_generations_of_another_model(tmp_path):
    settings = make(tmp_path, mode='generations', **{'optimization': dict(generations=dict(steps=20))})
    result = tune(settings, run_generations)
    assert result.winner.startswith('t000/g') and len(list((settings.folder / 't000').glob('g*'))) >= 2 and result.metrics['score'] > 0.3
    assert [d for d in read_decisions(settings.folder / 'decisions.jsonl') if d.kind == 'final']


def test_stopped_and_resumed_bit_for_bit(tmp_path):
    words = ['--preset', 'small', '--hparams', 'max_steps=3000,eval_every=100,checkpoint_every=100']
    process = subprocess.Popen([*PROGRAM, '--run-dir', str(tmp_path / 'b'), *words], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 20
    while read_status(tmp_path / 'b').get('step', 0) < 200 and time.monotonic() < end: time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and read_status(tmp_path / 'b')['state'] == 'stopped'
    for name, more in (('b', ['--resume']), ('a', [])): assert train_model(Hum, ['--run-dir', str(tmp_path / name), *words, *more]) == 0
    losses = lambda name: [json.loads(line)['train_loss'] for line in (tmp_path / name / 'metrics.jsonl').read_text().splitlines()]
    assert losses('a') == losses('b') and len(losses('a')) == 3000


def test_going_on_from_the_checkpoint_of_another_run(tmp_path):
    words = ['--preset', 'small', '--hparams', 'max_steps=40,eval_every=20,checkpoint_every=20']
    assert train_model(Hum, ['--run-dir', str(tmp_path / 'a'), *words, '--until', '20']) == 0
    assert train_model(Hum, ['--run-dir', str(tmp_path / 'b'), *words, '--checkpoint-path', str(tmp_path / 'a' / 'checkpoints' / 'last.pt')]) == 0
    assert [json.loads(line)['step'] for line in (tmp_path / 'b' / 'metrics.jsonl').read_text().splitlines()] == list(range(21, 41))


def test_what_it_does_wrong_is_said(tmp_path):
    class Lost(Hum):
        def learn(self, step): return dict(train_loss=float('nan') if step == 5 else 1.0)
    assert train_model(Lost, ['--run-dir', str(tmp_path / 'a'), '--hparams', 'max_steps=20']) == 1
    assert 'step 5 is not finite' in read_status(tmp_path / 'a')['reason'] and (tmp_path / 'a' / 'checkpoints' / 'before_failure.pt').is_file()
    with pytest.raises(TTSTunerError, match='no score'): completed(dict(success=1.0))
    with pytest.raises(UserError, match='settings? of another model'): load_settings(hparams={'own.pitch': 180.0})
