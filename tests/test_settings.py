"Settings of a study: files, words, environment, mistakes, and the specification's own blocks"
import pytest

from tts_tuner.config.errors import UserError
from tts_tuner.config.provenance import settings_with_origins
from tts_tuner.config.run_settings import block_hparams, reference_paths
from tts_tuner.config.settings import (
    RunSettings, Tracking, by_short_name, check_same_study, check_settings, default_space, flat_values, load_settings, parse_duration, plain_values, save_settings,
    trace_settings)

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
    ('optimization: {sampler: cmaes}', ['optimization.sampler', "'gp'", '"cma_es"']),
    ('optimization: {pruner: asha}', ['optimization.pruner', 'successive_halving']),
    ('optimization: {hyperband: {min_resource: 80, max_resource: 80}}', ['optimization.hyperband', 'min_resource 80 must be smaller']),
    ('optimization: {bohb: {min_budget: 0}}', ['optimization.bohb.min_budget', 'greater than 0']),
    ('optimization: {cma_es: {sigma0: 3}}', ['optimization.cma_es.sigma0', 'less than or equal to 1']),
    ('search_space: wider', ['search_space', '"wide"', 'full']),
    ('search_space: {learning_rate: {type: normal, low: 1, high: 2}}', ['search_space.learning_rate.type', 'loguniform']),
    ('search_space: {learning_rate: {type: loguniform, low: 1e-3, high: 1e-2, step: 1e-3}}', ['takes no step']),
    ('search_space: {batch_size: {type: int, low: 4, high: 8, step: 5}}', ['step 5', 'fit between']),
    ('search_space: {learning_rate: {type: uniform, low: 0.1, high: .inf}}', ['finite']),
    ('search_space: {batch_size: {type: int, low: 4, high: 8, when: {attentoin: [location]}}}', ['search_space.batch_size.when', 'attentoin']),
    ('search_space: {attention: {type: choice, choices: [forward, dynamic]}, batch_size: {type: int, low: 4, high: 8, when: {attention: [location]}}}',
     ['search_space.batch_size.when', "never takes the value 'location'"]),
    ('optimization: {known_good: [{learning_rte: 1e-3}]}', ['known_good.0.learning_rte', '"learning_rate"']),
    ('optimization: {known_good: [{learning_rate: 9}]}', ['known_good.0.learning_rate', '9 is not among']),
    ('resources: {checkpointing: {save_frequency: 50}}\nhparams: {checkpoint_every: 20}', ['save_frequency', 'checkpoint_every=20', 'one of the two']),
    ('audio_processing: {preprocessing: {mel_fmax: 8000}}\nsearch_space: {mel_fmax: {type: choice, choices: [7600, 8000]}}', ['search_space.mel_fmax', 'audio_processing']),
    ('audio_processing: {preprocessing: {win_length: 4096}}', ['win_length=4096', 'n_fft']),
    ('audio_processing: {augmentation: {enable: true}}', ['augmentation.enable', 'not offered']),
    ('resources: {memory_optimization: {gradient_checkpointing: true, activation_checkpointing: false}}', ['one switch']),
    ('monitoring: {alerts: {slack: {webhook_url: "https://hooks.example/T/hush"}}}', ['webhook_url', '${MY_SECRET}']),
    ('monitoring: {alerts: {email: {password: hush}}}', ['password', '${MY_SECRET}']),
    ('security: {secrets_provider: vault}', ['secrets_provider', 'vault', 'environment']),
    ('cicd: {deployment: {rollback_trigger: 0.99}}', ['must rise in this order']),
    ('core_engine: {components: [log_watcher]}', ['core_engine.components', 'metrics_store cannot be left out']),
    ('core_engine: {primary_engine: optunna}', ['core_engine.primary_engine', '"optuna"']),
    ('trials: 3\ncore_engine: {n_trials: 4}', ['trials and core_engine.n_trials are the same']),
    ('core_engine: 3', ['core_engine']),
    ('core_engine: 3\ntrials: 4', ['core_engine', 'keys of its own']),
    ('webhok_url: x', ['webhok_url', 'monitoring.alerts']),
    ('early_stopping: {attention: {monotonic_penalty: 0.3}}', ['monotonic_penalty', 'always 0.1']),
    ('workers: 2.5', ['workers: at least one', 'whole number, or auto']),
    ('rungs: 3', ['rungs', 'keys of its own', 'cohort']),
    ('search_space: {learning_rate: 3}', ['search_space.learning_rate', 'keys of its own', 'type']),
    ('tracking: false', ['tracking', 'keys of its own', 'enabled']),
    ('- a list', ['key: value']),
    ('a: [1', ['not YAML', 'line']),
    ('trials: 3\ntrials: 4', ['not YAML', 'trials']),
])
def test_mistakes_name_the_key_and_the_remedy(tmp_path, text, words):
    with pytest.raises(UserError) as e: load_settings(write(tmp_path, text))
    said = str(e.value)
    assert '\n' not in said and 'hush' not in said and all(w in said for w in words), said
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


# ---------------------------------------------------------------- ten blocks and short names

def test_ten_blocks_and_their_short_names():
    s = RunSettings()
    assert list(RunSettings.model_fields) == ['core_engine', 'optimization', 'search_space', 'monitoring', 'early_stopping', 'resources', 'audio_processing',
                                              'experiment_tracking', 'cicd', 'security']
    assert (s.core_engine.name, s.core_engine.version, len(s.core_engine.components)) == ('SmartTunerV2', '2.0.0', 8)
    for short, path in RunSettings.SHORT.items():
        if '.' in short or short in ('n_trials', 'n_startup_trials', 'hparams', 'storage', 'primary_engine', 'trainer'): continue
        value = s
        for part in path.split('.'): value = getattr(value, part)
        assert getattr(s, short) == value, short


@pytest.mark.parametrize('short, long', [
    (dict(study='a', trials=3, timeout='2h'), dict(core_engine=dict(study='a', n_trials=3, timeout='2h'))),
    (dict(n_trials=3), dict(trials=3)),
    (dict(tracking=dict(uri='sqlite:///x.db', experiment='e')), dict(monitoring=dict(platforms=dict(mlflow=dict(tracking_uri='sqlite:///x.db', experiment_name='e'))))),
    (dict(optimization=dict(n_startup_trials=3)), dict(optimization=dict(tpe=dict(n_startup_trials=3)))),
    (dict(n_startup_trials=3), dict(optimization=dict(tpe=dict(n_startup_trials=3)))),
    (dict(rungs=dict(steps=[4, 9]), seed=1), dict(optimization=dict(rungs=dict(steps=[4, 9])), experiment_tracking=dict(reproducibility=dict(seed=1)))),
    (dict(auto_deploy_best=True, recipe_first=False), dict(cicd=dict(deployment=dict(auto_deploy_best=True)), optimization=dict(recipe_first=False))),
    (dict(hparams=dict(max_steps=90)), dict(core_engine=dict(hparams=dict(max_steps=90))))])
def test_short_names_are_the_same_everywhere(tmp_path, short, long):
    import yaml
    a, b = check_settings(short), check_settings(long)
    assert a == b != RunSettings() and load_settings(**short) == a and RunSettings(**short) == a and RunSettings().model_copy(update=short) == a
    assert load_settings(write(tmp_path, yaml.safe_dump(short))) == a == load_settings(write(tmp_path, yaml.safe_dump(long)))
    assert check_settings(plain_values(a)) == a
    if isinstance(next(iter(short.values())), (int, str)): assert load_settings(None, [f'{k}={v}' for k, v in short.items()]) == a


def test_a_copy_is_checked():
    s = RunSettings(trials=4)
    assert s.model_copy(update=dict(seed=3)).seed == 3 and s.model_copy(update=dict(seed=3)).trials == 4 and s.seed == 42
    with pytest.raises(Exception, match='trials|greater'): s.model_copy(update=dict(trials=0))
    assert s.model_copy(update=dict(tracking=Tracking(enabled=False))).tracking.enabled is False


def test_blocks_give_hyperparameters(tmp_path):
    s = load_settings(write(tmp_path, """
resources:
  gpu: {memory_fraction: 0.5, mixed_precision: false}
  checkpointing: {save_frequency: 50, keep_n_checkpoints: 2, async_save: false, compression: gzip}
  memory_optimization: {activation_checkpointing: true, cpu_offload: false}
audio_processing: {preprocessing: {n_mels: 40, mel_fmin: 20}}
experiment_tracking: {reproducibility: {deterministic: false}}
"""))
    h = s.base_hparams()
    assert (h.gpu_memory_fraction, h.precision, h.checkpoint_every, h.keep_checkpoints, h.async_checkpoints, h.compress_checkpoints) == (0.5, 'fp32', 50, 2, False, True)
    assert (h.gradient_checkpointing, h.cpu_offload, h.n_mels, h.mel_fmin, h.deterministic) == (True, False, 40, 20.0, False)
    assert block_hparams(RunSettings()) == {} and 'n_mels' in s.hparams and 'n_mels' not in s.core_engine.hparams
    assert check_settings(dict(resources=dict(checkpointing=dict(save_frequency=50)), hparams=dict(checkpoint_every=50))).base_hparams().checkpoint_every == 50


# ---------------------------------------------------------------- words

def test_words_set_add_and_take_away(tmp_path):
    path = write(tmp_path, 'trials: 3\nhparams: {batch_size: 4}\nsearch_space: {learning_rate: {type: loguniform, low: 1e-4, high: 1e-2}}')
    assert load_settings(path, ['~hparams.batch_size']).hparams == {}
    assert load_settings(path, ['+hparams.weight_decay=0']).hparams == dict(batch_size=4, weight_decay=0)
    assert load_settings(path, ['~trials']).trials == 6 and load_settings(path, ['~search_space']).search_space is None
    assert list(load_settings(path, ['+search_space.adam_eps={type: loguniform, low: 1e-9, high: 1e-6}']).space()) == ['learning_rate', 'adam_eps']
    s = load_settings(path, ['search_space.learning_rate={type: choice, choices: [1e-3, 2e-3]}'])
    assert s.space()['learning_rate'].choices == (1e-3, 2e-3), 'a whole dimension replaces the other'
    assert load_settings(path, ['search_space.learning_rate.high=2e-2']).space()['learning_rate'].high == 2e-2
    assert load_settings(path, ['++trials=5', 'optimization.pruner=median']).pruner == 'median'
    assert list(load_settings(None, ['~search_space.attention'], hparams='prenet_dropout=0.3').space()) == [
        'learning_rate', 'guided_attention_weight', 'guided_attention_decay_steps']
    assert 'mel_fmin' in load_settings(None, ['search_space=wide', '~search_space.batch_size', 'preset=paper']).space()


@pytest.mark.parametrize('words, said', [
    (['~workers'], 'nothing to take away'), (['~search_space.atention'], '"search_space.attention"'), (['+trials=4'], 'there already'),
    (['+hparams.batch_size=5'], 'write hparams.batch_size=5'), (['~'], 'not key=value'), (['=3'], 'not key=value'), (['+trials'], 'not key=value'),
    (['trials=${nothing_here}'], '${...} names no setting'), (['hparams.batch_size={'], 'cannot be read'), (['search_space=narrow'], 'no space "narrow"'),
    (['+nothing.here=3'], 'no setting "nothing"')])
def test_bad_words(tmp_path, words, said):
    path = write(tmp_path, 'trials: 3\nhparams: {batch_size: 4}')
    with pytest.raises(UserError) as e: load_settings(path, words)
    assert said in str(e.value) and '\n' not in str(e.value)


# ---------------------------------------------------------------- origins

def test_each_value_says_where_it_came_from(tmp_path, monkeypatch):
    monkeypatch.setenv('MY_CORPUS', '/voices/anna')
    path = write(tmp_path, 'corpus: ${oc.env:MY_CORPUS}\ntrials: 3\nworkers: 2\nseed: 1\nhparams: {batch_size: 4}')
    traced = trace_settings(path, ['rungs.cohort=4', 'seed=2', '+hparams.adam_eps=1e-9'], hparams='max_steps=90', trials=5, timeout=None)
    lines = {line.split('#')[0].split(':')[0].strip(): line.partition('  # ')[2] for line in settings_with_origins(traced).splitlines() if '  # ' in line}
    assert lines['corpus'] == f'{path}, $MY_CORPUS' and lines['n_trials'] == '--trials' and lines['workers'] == str(path) and lines['batch_size'] == str(path)
    assert lines['seed'] == 'word seed' and lines['cohort'] == 'word rungs.cohort' and lines['adam_eps'] == 'word +hparams.adam_eps' and lines['max_steps'] == '--hparams'
    assert lines['timeout'] == 'default' and lines['steps'] == 'default' and 'preset small: 4' in lines['n_startup_trials']
    text = settings_with_origins(traced)
    assert 'steps: [4, 30]' in text and 'a third of max_steps=90' in text and '# attention_rnn_dim: 192  <- preset small' in text


@pytest.mark.parametrize('settings', [RunSettings(), RunSettings(preset='paper', trials=200), RunSettings(search_space='wide', preset='default'),
                                      RunSettings(corpus='it is: a #strange "folder"', hparams=dict(mel_fmax=None, adam_eps=1e-9), trainer=['python', '-m', 'x'])])
@pytest.mark.parametrize('meanings', [False, True])
def test_the_printout_is_read_back(tmp_path, settings, meanings):
    from tts_tuner.config.settings import Traced
    assert load_settings(write(tmp_path, settings_with_origins(Traced(settings, {}), meanings))) == settings


def test_every_setting_is_explained():
    from tts_tuner.config.settings import Traced
    for line in settings_with_origins(Traced(RunSettings(), {}), meanings=True).splitlines():
        if line.strip() and not line.lstrip().startswith('#') and line.strip() not in ('search_space: null', 'hparams: {}'):
            assert '  # ' in line and len(line.partition('  # ')[2]) > 6, line


# ---------------------------------------------------------------- references, folders, going on

def test_secrets_stay_references(tmp_path, monkeypatch):
    monkeypatch.setenv('SLACK_WEBHOOK', 'https://hooks.example/canary')
    monkeypatch.setenv('DB', 'postgresql://me:canary@host/db')
    path = write(tmp_path, 'monitoring: {alerts: {slack: {webhook_url: "${SLACK_WEBHOOK}"}, email: {password: "${oc.env:NOT_SET_AT_ALL}"}}}\n'
                           'storage: ${oc.env:DB}\ntracking: {uri: "http://${HOST_NOT_SET}:5000"}')
    s = load_settings(path)
    assert s.monitoring.alerts.slack.webhook_url == '${SLACK_WEBHOOK}' and s.storage == 'postgresql://me:canary@host/db'
    for text in (save_settings(tmp_path / 'config.yaml', s).read_text(), str(s), repr(s), str(flat_values(s)), settings_with_origins(trace_settings(path))):
        assert 'canary' not in text
    with pytest.raises(UserError, match='HOST_NOT_SET is not set'): _ = s.tracking.uri
    assert not reference_paths() & set(flat_values(s)) and 'monitoring.alerts.slack.webhook_url' in reference_paths()


def test_a_folder_is_read_by_short_names():
    flat, blocks = dict(study='a', trials=3, rungs=dict(keep=[4])), plain_values(RunSettings(study='a', trials=3))
    assert by_short_name(flat)['rungs'] == dict(keep=[4]) and by_short_name(flat)['study'] == 'a' == by_short_name(blocks)['study']
    assert by_short_name(blocks)['preset'] == 'small' and by_short_name({}) == {} and by_short_name(dict(mood=3)) == dict(mood=3)


@pytest.mark.parametrize('update, same', [
    (dict(trials=20), True), (dict(timeout='1h'), True), (dict(workers=1), True), (dict(tracking=dict(enabled=False)), True), (dict(auto_deploy_best=True), True),
    (dict(monitoring=dict(alerts=dict(email=dict(recipients=['me@example.com'])))), True), (dict(security=dict(anonymize_logs=True)), True),
    (dict(early_stopping=dict(tuner_patience=9)), True), (dict(search_space=default_space('small')), True),
    (dict(seed=7), False), (dict(preset='paper'), False), (dict(hparams=dict(batch_size=4)), False), (dict(rungs=dict(keep=[2, 2])), False),
    (dict(sampler='random'), False), (dict(early_stopping=dict(level=3)), False), (dict(resources=dict(checkpointing=dict(save_frequency=20))), False),
    (dict(mode='generations'), False), (dict(search_space={}), False)])
def test_what_makes_another_study(update, same):
    old = RunSettings()
    if same: return check_same_study(old, old.model_copy(update=update))
    with pytest.raises(UserError, match='begun with another'): check_same_study(old, old.model_copy(update=update))


# ---------------------------------------------------------------- settings that decide when a run ends

def ends(rules, scores, budget=600, alignment=None):
    from tts_tuner.tuner.early_stop import end_verdict
    seen = [(10 * (i + 1), dict(score=s, **({} if alignment is None else dict(alignment_score=alignment[i])))) for i, s in enumerate(scores)]
    return next((n for n in range(1, len(seen) + 1) if end_verdict(seen[:n], budget, rules).stop), None)


def test_rules_of_patience_follow_their_settings():
    from tts_tuner.config.settings import EarlyStopping
    rises = [0.02 * min(i + 1, 20) for i in range(60)]
    rule = lambda name, **strategies: EarlyStopping(adaptive_patience=False, rule=name, strategies=strategies)
    assert ends(rule('patience_based'), rises) == 26 and ends(rule('patience_based', patience_based=dict(patience=10)), rises) == 30
    assert ends(rule('patience_based', patience_based=dict(min_delta=0.05)), rises) < 26, 'gains of 0.02 are none then'
    assert ends(rule('improvement_threshold'), rises) == 30 and ends(rule('improvement_threshold', improvement_threshold=dict(evaluation_window=5)), rises) == 25
    assert ends(rule('curriculum'), rises) == 25 and ends(rule('curriculum', curriculum=dict(initial_patience=8, max_patience=9)), rises) == 28
    assert ends(rule('curriculum', curriculum=dict(stages=[dict(name='long', epochs=9, multiplier=3)])), rises) == 35, 'never more than max_patience'
    assert ends(rule('progress'), rises) == 35


def test_weights_and_threshold_reach_the_vote():
    from tts_tuner.config.settings import EarlyStopping
    from tts_tuner.tuner.early_stop import end_verdict
    rises = [0.02 * min(i + 1, 20) for i in range(60)]
    still = [(10 * (i + 1), dict(score=s, alignment_score=0.7)) for i, s in enumerate(rises)]
    votes = lambda **rules: {v.voter: v.says for v in end_verdict(still, 6000, EarlyStopping(level=3, **rules)).votes}
    assert votes()['attention'] == 'continue' and votes(attention=dict(alignment_threshold=0.6))['attention'] == 'stop'
    alone = dict(statistical_consensus=0, bayesian_prediction=0, attention_analysis=1)
    assert list(votes(ensemble_weights=alone)) == ['attention']
    assert end_verdict(still, 6000, EarlyStopping(level=3, ensemble_weights=alone, attention=dict(alignment_threshold=0.6))).stop
    usual, doubled = (end_verdict(still, 6000, EarlyStopping(level=3, ensemble_weights=dict(statistical_consensus=0.3 * k, bayesian_prediction=0.4 * k,
                                                                                           attention_analysis=0.3 * k))) for k in (1, 2))
    assert usual == doubled and usual.quorum == 6, 'only the shares of the weights count'


def test_settings_of_another_model(tmp_path):
    from tts_tuner.tuner.space import recipe, trial_overrides
    text = ('trainer: [python, mine.py]\nhparams: {own: {voices: 2}, max_steps: 90}\n'
            'search_space: {learning_rate: {type: loguniform, low: 1e-4, high: 1e-2}, own.pitch: {type: uniform, low: 80, high: 300, default: 120}}')
    s = load_settings(write(tmp_path, text), ['hparams.own.mood=glad'])
    assert s.hparams == {'own.voices': 2, 'own.mood': 'glad', 'max_steps': 90} and s.base_hparams().max_steps == 90 and s.core_engine.trainer == ('python', 'mine.py')
    assert load_settings(save_settings(tmp_path / 'config.yaml', s)) == s == load_settings(write(tmp_path, settings_with_origins(trace_settings(tmp_path / 'config.yaml'))))
    assert load_settings(write(tmp_path, text), hparams='own.voices=3').hparams['own.voices'] == 3
    assert recipe(s)['own.pitch'] == 120
    over = trial_overrides(s, {'learning_rate': 1e-3, 'own.pitch': 99.5})
    assert over['own.pitch'] == 99.5 and over['own.voices'] == 2 and over['learning_rate'] == 1e-3
    with pytest.raises(UserError, match='core_engine.trainer'): load_settings(hparams='own.voices=2')
    with pytest.raises(UserError, match='own.pitch: give it a default'):
        check_settings(dict(trainer=['x'], search_space={'own.pitch': dict(type='uniform', low=1, high=2)}))


@pytest.mark.parametrize('path', ['monitoring.platforms.mlflow.auto_log', 'monitoring.platforms.tensorboard.enabled', 'monitoring.platforms.tensorboard.write_images',
                                  'experiment_tracking.metadata.track_dependencies', 'early_stopping.strategies.patience_based.restore_best_weights'])
def test_what_is_always_done_cannot_be_switched_off(path):
    assert load_settings(None, [f'{path}=true']) == RunSettings()
    with pytest.raises(UserError, match='it is always done'): load_settings(None, [f'{path}=false'])


def test_a_block_without_a_key_is_no_block(tmp_path):
    assert load_settings(write(tmp_path, 'core_engine:\nmonitoring:\n  alerts:\nrungs:\nhparams: {max_steps: 90}')) == load_settings(hparams='max_steps=90')


def test_a_tracking_address_that_cannot_be_resolved_is_told_without_its_password(tmp_path, monkeypatch):
    from tts_tuner.tuner.tracker import Tracker
    said = []
    tracker = Tracker(Tracking(uri='${URI_NOT_SET_HERE}'), tmp_path, said.append)
    tracker.start('s', {}, {})
    tracker._pool.shutdown(wait=True)
    assert len(said) == 1 and '${URI_NOT_SET_HERE}' in said[0] and 'is not set' in said[0] and 'the study goes on' in said[0]
