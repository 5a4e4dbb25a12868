"Settings of a study: files, words, environment, mistakes, and the specification's own blocks"
import pytest

from tts_tuner.config.errors import UserError
from tts_tuner.config.settings import RunSettings, check_settings, default_space, load_settings, parse_duration, save_settings

SPACE_003 = '''
search_space:
  learning_rate: {type: "loguniform", low: 1e-5, high: 1e-2, default: 1e-3}
  weight_decay:
    type: "loguniform"
    low: 1e-8
    high: 1e-2
    default: 1e-6
  encoder_embedding_dim: {type: "choice", choices: [256, 512, 768], default: 512}
  dropout_decoder: {type: "uniform", low: 0.0, high: 0.6, default: 0.1}
  batch_size: {type: "choice", choices: [16, 24, 32, 48], default: 32}
  mel_fmax: {type: "choice", choices: [7600, 8000, null]}
'''


def write(tmp_path, text):
    path = tmp_path / 'study.yaml'
    path.write_text(text)
    return path


def test_numbers_without_a_dot_are_numbers(tmp_path):
    space = load_settings(write(tmp_path, 'preset: paper\n' + SPACE_003)).space()
    assert (space['learning_rate'].low, space['learning_rate'].high, space['learning_rate'].default) == (1e-5, 1e-2, 1e-3)
    assert space['weight_decay'].low == 1e-8 and isinstance(space['weight_decay'].default, float)
    assert space['mel_fmax'].choices == (7600, 8000, None) and space['encoder_embedding_dim'].default == 512
    quoted = load_settings(write(tmp_path, 'hparams: {learning_rate: "1e-3"}\nsearch_space: {}'))
    assert quoted.base_hparams().learning_rate == 1e-3
    assert load_settings(None, ['hparams.weight_decay=1e-5']).base_hparams().weight_decay == 1e-5


@pytest.mark.parametrize('text, words', [
    ('trails: 3', ['study.yaml', 'trails', '"trials"']),
    ('rungs: {step: [40, 120]}', ['rungs.step', '"steps"']),
    ('optimization: {n_startup_trails: 3}', ['optimization.n_startup_trails', '"n_startup_trials"']),
    ('tracking: {url: x}', ['tracking.url', '"uri"']),
    ('search_space: {learning_rate: {typ: uniform, low: 1, high: 2}}', ['search_space.learning_rate', 'type']),
    ('search_space: {learning_rate: {type: uniform, low: 2, high: 1}}', ['search_space.learning_rate', 'smaller']),
    ('search_space: {learning_rte: {type: uniform, low: 1, high: 2}}', ['search_space.learning_rte', '"learning_rate"']),
    ('search_space: {learning_rate: {type: loguniform, low: 0, high: 1}}', ['above 0']),
    ('search_space: {attention: {type: choice}}', ['needs choices']),
    ('search_space: {attention: {type: choice, choices: [forward, forwards]}}', ['search_space.attention', 'forwards']),
    ('search_space: {batch_size: {type: int, low: 1.5, high: 4}}', ['whole numbers']),
    ('hparams: {learning_rate: 1e-3}\nsearch_space: {learning_rate: {type: uniform, low: 0.1, high: 1}}', ['fixed in hparams']),
    ('hparams: {batchsize: 3}', ['hparams.batchsize', '"batch_size"']),
    ('hparams: {batch_size: 0}', ['hparams', 'batch_size=0']),
    ('preset: smal', ['preset', 'smal']),
    ('timeout: tomorrow', ['timeout', '24h']),
    ('trials: 0', ['trials']),
    ('workers: 0', ['workers']),
    ('rungs: {steps: [120, 40]}', ['must rise']),
    ('rungs: {steps: [40], keep: [3, 2]}', ['same number']),
    ('rungs: {steps: [], keep: []}', ['at least one']),
    ('study: ../up', ['study']),
    ('corpus: ${oc.env:SURELY_NOT_SET}', ['corpus', 'SURELY_NOT_SET', 'is not set']),
    ('corpus: ${SURELY_NOT_SET}', ['corpus', 'oc.env']),
    ('- a list', ['key: value']),
    ('a: [1', ['not YAML', 'line']),
    ('trials: 3\ntrials: 4', ['not YAML', 'trials']),
])
def test_mistakes_name_the_key_and_the_remedy(tmp_path, text, words):
    with pytest.raises(UserError) as e: load_settings(write(tmp_path, text))
    said = str(e.value)
    assert '\n' not in said and all(w in said for w in words), said
    assert e.value.exit_code == 2


def test_missing_file_and_bad_words(tmp_path):
    with pytest.raises(UserError, match='no settings file'): load_settings(tmp_path / 'none.yaml')
    with pytest.raises(UserError, match='is a folder'): load_settings(tmp_path)
    with pytest.raises(UserError, match='not key=value'): load_settings(None, ['trials'])
    with pytest.raises(UserError, match='cannot be read'): load_settings(None, ['rungs.steps=[1'])
    (tmp_path / 'bytes.yaml').write_bytes(b'\xff\xfe\x00a')
    with pytest.raises(UserError, match='not YAML'): load_settings(tmp_path / 'bytes.yaml')


def test_environment_and_precedence(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_CORPUS', '/voices/anna')
    path = write(tmp_path, 'corpus: ${oc.env:MY_CORPUS}\ntrials: 3\nhparams: {max_steps: 500, batch_size: 4}\ntimeout: 1h')
    s = load_settings(path, ['trials=5', 'hparams.batch_size=6'], hparams='batch_size=2', trials=None, timeout='30m')
    assert (s.corpus, s.trials, s.timeout_seconds) == ('/voices/anna', 5, 1800)
    assert (s.base_hparams().max_steps, s.base_hparams().batch_size) == (500, 2)


def test_fixing_a_searched_setting_takes_it_out_of_the_space():
    assert 'attention' not in load_settings(hparams='attention=forward').space()


@pytest.mark.parametrize('settings', [RunSettings(), RunSettings(preset='paper', trials=200, max_trials=150),
                                      RunSettings(search_space=default_space('small'), hparams=dict(mel_fmax=None, adam_eps=1e-9))])
def test_round_trip(tmp_path, settings):
    assert load_settings(save_settings(tmp_path / 'config.yaml', settings)) == settings


def test_defaults_of_the_specification():
    s = RunSettings(preset='paper')
    assert (s.max_trials, s.timeout, s.n_startup_trials, s.optimization.sampler, s.tracking.experiment) == (100, '24h', 15, 'tpe', 'tacotron2_autotuning')
    assert RunSettings(trials=500).n_trials == 100 and check_settings({}).seed == 42 and parse_duration('24h') == 86400
