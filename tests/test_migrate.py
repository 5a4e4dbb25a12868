"Files of earlier layouts: every key of both drafts has an answer, what comes out is what was meant, and a second time nothing changes"
from pathlib import Path

import pytest
import yaml

from tts_tuner.command import asked
from tts_tuner.config.earlier import EARLIER
from tts_tuner.config.errors import UserError
from tts_tuner.config.migrate import migrate, migrate_file
from tts_tuner.config.run_settings import RunSettings
from tts_tuner.config.settings import check_same_study, load_settings, raw_values, read_yaml, save_settings
import tts_tuner.cli  # noqa: F401  registers the verbs

DRAFTS = {name: Path(__file__).parent / 'settings' / f'{name}.yaml' for name in ('merged', 'extended')}


def keys(tree, path=''):
    "Every leaf of a file, a dimension of the search space being one"
    for key, value in tree.items():
        here = f'{path}.{key}'.lstrip('.')
        if isinstance(value, dict) and path != 'search_space': yield from keys(value, here)
        else: yield here


def converted(tmp_path, name):
    found, text = migrate_file(DRAFTS[name])
    (tmp_path / 'new.yaml').write_text(text)
    return found, load_settings(tmp_path / 'new.yaml')


@pytest.mark.parametrize('name', DRAFTS)
def test_every_key_has_an_answer_and_nothing_is_passed_over(name):
    found, text = migrate_file(DRAFTS[name])
    old = list(keys(raw_values(read_yaml(DRAFTS[name]))))
    assert len(old) > 40
    for key in old:
        answers = [n for n in found.notes if n.old and (key == n.old or key.startswith(n.old + '.'))]
        assert len(answers) == 1, key
        [n] = answers
        assert n.kind in ('kept', 'renamed', 'replaced', 'dropped')
        assert n.words if n.kind in ('replaced', 'dropped') else n.new, f'{key} is {n.kind} without a word'
        if n.kind == 'dropped': assert f'#   {n}' in text
        elif n.old != n.new: assert f'was {n.old}' in text
    assert not [n for n in found.notes if n.kind == 'added' and not n.words]


@pytest.mark.parametrize('name', DRAFTS)
def test_migrating_twice_changes_nothing(tmp_path, name):
    found, text = migrate_file(DRAFTS[name])
    (tmp_path / 'new.yaml').write_text(text)
    again, same = migrate_file(tmp_path / 'new.yaml')
    assert same == text and not again.changed and again.values == found.values and all(n.kind == 'kept' for n in again.notes)


def test_the_merged_draft_means_this(tmp_path):
    s = converted(tmp_path, 'merged')[1]
    assert (s.core_engine.name, s.core_engine.primary_engine, s.trials, s.n_trials, s.preset, s.core_engine.resume_from_checkpoint) == (
        'SmartTunerV2', 'optuna', 100, 100, 'default', True)
    assert (s.sampler, s.pruner, s.n_startup_trials, s.optimization.tpe.consider_magic_clip) == ('tpe', 'hyperband', 15, True)
    assert s.optimization.hyperband.model_dump() == dict(min_resource=1, max_resource=80, reduction_factor=3)
    low = {k: (d.low, d.high) if d.choices is None else d.choices for k, d in s.space().items()}
    assert low == dict(learning_rate=(1e-5, 1e-2), weight_decay=(1e-8, 1e-3), encoder_embedding_dim=(256, 512), decoder_rnn_dim=(768, 1024),
                       dropout_decoder=(0, 0.5), batch_size=(24, 32, 48), grad_clip_thresh=(0.5, 1.5), mel_fmax=(7600, 8000, None))
    e = s.early_stopping
    assert (e.enabled, e.level, e.tuner_patience, e.tuner_min_delta, e.attention_monitoring, e.adaptive_patience, e.rule) == (True, 3, 5, 0.005, True, False, 'curriculum')
    assert tuple(e.ensemble_weights.model_dump().values()) == (0.3, 0.4, 0.3) and e.attention.model_dump() == dict(alignment_threshold=0.8, monotonic_penalty=0.1)
    stages = e.strategies.curriculum
    assert (stages.initial_patience, stages.max_patience) == (5, 15)
    assert [(t.name, t.epochs, t.multiplier) for t in stages.stages] == [('warmup', 20, 1.5), ('main', 100, 1.0), ('fine_tune', 50, 0.7)]
    p = s.monitoring.platforms
    assert (p.mlflow.tracking_uri, p.wandb.enabled, p.wandb.mode, p.wandb.project, p.wandb.entity) == (
        'http://localhost:5000', True, 'offline', 'tacotron2-optimization', 'your-team')
    assert s.monitoring.alerts.slack.webhook_url == '${SLACK_WEBHOOK}' and s.monitoring.alerts.email.recipients == ('ml-team@example.com',)
    h = s.base_hparams()
    assert (h.precision, h.gradient_checkpointing, h.checkpoint_every, h.keep_checkpoints, h.decoder_rnn_dim) == ('bf16', True, 1000, 3, 1024)


def test_the_extended_draft_means_this(tmp_path):
    s = converted(tmp_path, 'extended')[1]
    assert (s.core_engine.version, len(s.core_engine.components), s.preset, s.n_startup_trials, s.optimization.cma_es.sigma0) == ('2.0.0', 8, 'default', 15, 0.3)
    assert s.optimization.bohb.model_dump() == dict(min_budget=10, max_budget=100) and s.optimization.hyperband.max_resource == 80
    assert s.space() == load_settings(search_space='wide', preset='default').space()
    p = s.monitoring.platforms
    assert (p.mlflow.experiment_name, p.mlflow.auto_log, p.tensorboard.write_images, p.neptune.project) == ('tacotron2_autotuning', True, True, 'workspace/tacotron2')
    assert s.monitoring.metrics.primary == 'val_loss' and len(s.monitoring.metrics.secondary) == 5
    a = s.monitoring.alerts
    assert (a.slack.channels, a.discord.webhook_url, a.email.smtp_server) == (('#ml-alerts', '#tacotron-team'), '${DISCORD_WEBHOOK}', 'smtp.gmail.com')
    e = s.early_stopping
    assert (e.level, e.adaptive_patience, e.rule) == (1, False, 'patience_based')
    assert (e.strategies.patience_based.patience, e.strategies.patience_based.min_delta, e.strategies.improvement_threshold.evaluation_window) == (6, 0.001, 10)
    assert tuple(e.quality_gates.model_dump().values()) == (0.85, 2.0, 3.5) and tuple(e.sanity_gates.model_dump().values()) == (0.4, 0.6, 30.0)
    r = s.resources
    assert (r.gpu.max_gpus, r.distributed.world_size, r.distributed.backend, r.checkpointing.compression) == (4, 4, 'nccl', 'gzip')
    h = s.base_hparams()
    assert (h.gpu_memory_fraction, h.keep_checkpoints, h.async_checkpoints, h.compress_checkpoints, h.cpu_offload, h.deterministic, h.seed) == (0.9, 5, True, True, False, True, 42)
    assert (h.sample_rate, h.n_fft, h.hop_length, h.win_length, h.n_mels) == (22050, 1024, 256, 1024, 80) and not s.audio_processing.augmentation.enable
    x = s.experiment_tracking
    assert (x.model_registry, x.artifact_store, all(x.metadata.model_dump().values())) == ('mlflow', 's3://ml-artifacts', True)
    d = s.cicd.deployment
    assert (d.staging_threshold, d.production_threshold, d.rollback_trigger) == (0.95, 0.97, 0.9)
    assert (s.security.secrets_provider, s.security.anonymize_logs, s.security.audit_logging) == ('environment', True, True)


@pytest.mark.parametrize('name', DRAFTS)
def test_both_drafts_take_a_small_budget_on_the_line(tmp_path, name):
    converted(tmp_path, name)
    s = load_settings(tmp_path / 'new.yaml', ['resources.distributed.world_size=1', 'resources.checkpointing.save_frequency=20', 'tracking.enabled=false',
                                              'monitoring.platforms.wandb.enabled=false'], 'max_steps=60,eval_every=20', preset='small', trials=2, study='tiny')
    assert s.base_hparams().max_steps == 60 and s.base_hparams().checkpoint_every == 20 and s.rungs.steps[-1] < 60
    save_settings(tmp_path / 'config.yaml', s)
    assert load_settings(tmp_path / 'config.yaml') == s
    check_same_study(load_settings(tmp_path / 'config.yaml'), s)


def test_secrets_of_the_old_file_stay_references(tmp_path, monkeypatch):
    for name in ('SLACK_WEBHOOK', 'DISCORD_WEBHOOK', 'NEPTUNE_API_TOKEN'): monkeypatch.setenv(name, f'https://example.invalid/canary-{name}')
    for name in DRAFTS:
        found, text = migrate_file(DRAFTS[name])
        s = load_settings(tmp_path / 'new.yaml') if (tmp_path / 'new.yaml').write_text(text) else None
        save_settings(tmp_path / 'config.yaml', s)
        for out in (text, (tmp_path / 'config.yaml').read_text(), str(s), asked(f'config show --meanings --config {tmp_path}/new.yaml')[1]): assert 'canary' not in out


def test_a_study_of_the_flat_layout(tmp_path):
    flat = dict(study='old', corpus='my voice', preset='small', trials=4, seed=7, hparams=dict(max_steps=300), search_space=None, recipe_first=True,
                rungs=dict(steps=[12, 100], keep=[4, 2], cohort=8), optimization=dict(sampler='tpe', n_startup_trials=None, consider_magic_clip=True),
                tracking=dict(enabled=False, uri='sqlite:///mlflow.db', experiment='tacotron2_autotuning', model_name='tts_tuner'), auto_deploy_best=False)
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(flat))
    read = load_settings(tmp_path / 'config.yaml')
    assert (read.study, read.seed, read.trials, read.rungs.steps, read.tracking.enabled) == ('old', 7, 4, (12, 100), False)
    check_same_study(read, load_settings(study='old', corpus='my voice', trials=9, seed=7, hparams='max_steps=300'))
    found, text = migrate_file(tmp_path / 'config.yaml')
    (tmp_path / 'new.yaml').write_text(text)
    assert load_settings(tmp_path / 'new.yaml') == read and not found.of_kind('added') and not found.of_kind('dropped')
    assert {n.new for n in found.of_kind('renamed')} >= {'core_engine.study', 'monitoring.platforms.mlflow.tracking_uri', 'optimization.tpe.n_startup_trials'}


def test_every_answer_leads_somewhere():
    from tts_tuner.config.run_settings import _paths
    there = {*_paths(), 'search_space'}
    for key, answer in EARLIER.items(): assert answer.kind == 'dropped' or answer.path in there, key
    for path in RunSettings.SHORT.values(): assert any(p == path or p.startswith(path + '.') for p in there), path


@pytest.mark.parametrize('old, words', [
    (dict(core_engine=dict(n_trails=3)), ['core_engine.n_trails', '"n_trials"']),
    (dict(optimization=dict(algorithms=dict(tpe=dict(startup_trails=3)))), ['optimization.algorithms']),
    (dict(smart_early_stopping=dict(mood=1)), ['smart_early_stopping']),
    (dict(optimization=dict(algorithms=dict(hyperband=dict(max_iter=1)))), ['max_resource', 'smaller']),
    (dict(optimization=dict(algorithms=dict(cma_es=dict(sigma0=-1)))), ['sigma0']),
    (dict(optimization=dict(tpe=dict(consider_magic_clip=False))), ['consider_magic_clip', 'always clips']),
    (dict(resources=dict(mixed_precision=True, gpu=dict(mixed_precision=False))), ['one setting', 'mixed_precision']),
    (dict(monitoring=dict(alerts=dict(slack_webhook='https://hooks.example/T/hush'))), ['webhook_url', 'secret']),
    (dict(security=dict(secrets_management=dict(provider='keeper'))), ['secrets_provider', 'keeper']),
])
def test_what_cannot_be_migrated_is_said(old, words):
    with pytest.raises(UserError) as e: migrate(old, 'old.yaml: ')
    said = str(e.value)
    assert said.startswith('old.yaml: ') and '\n' not in said and all(w in said for w in words) and 'hush' not in said, said


def test_references_elsewhere_are_kept_too(tmp_path):
    (tmp_path / 'old.yaml').write_text('core_engine: {n_trials: "${oc.env:N_OF_THIS_TEST}", corpus: "${oc.env:HERE}/voice", language: python}\n')
    text = migrate_file(tmp_path / 'old.yaml')[1]
    assert '${oc.env:N_OF_THIS_TEST}' in text and '${oc.env:HERE}/voice' in text


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = asked(f'config migrate {DRAFTS["extended"]} -o new.yaml')
    assert code == 0 and not err and 'the service closed' in out and 'tts-tune run --config new.yaml' in out
    code, out, err = asked(f'config migrate {DRAFTS["merged"]} -o new.yaml')
    assert code == 2 and 'exists already' in err and 'extended' not in err and 'algorithms' in (tmp_path / 'new.yaml').read_text()
    assert asked('config show --plain --config new.yaml')[0] == 0
    code, _, err = asked(f'config show --config {DRAFTS["merged"]}')
    assert code == 2 and 'config migrate' in err and err.count('\n') == 1
    assert asked('config migrate nowhere.yaml')[0] == 2


@pytest.mark.parametrize('name', DRAFTS)
def test_both_drafts_run(tmp_path, name):
    "A study of the migrated file, with small budgets given on the line and a trainer that only pretends"
    import sys

    from tts_tuner.tuner.loop import Data, run_study
    from tts_tuner.tuner.trials import PlainView
    converted(tmp_path, name)
    s = load_settings(tmp_path / 'new.yaml', ['resources.distributed.world_size=1', 'resources.checkpointing.save_frequency=10', 'tracking.enabled=false'],
                      'max_steps=200,device=cpu', preset='small', trials=3, workers=2, study='s', runs=str(tmp_path / 'runs'))
    fake = (sys.executable, str(Path(__file__).with_name('fake_trainer.py')))
    result = run_study(s, PlainView(), trainer=fake, prepare=lambda s, say: Data('corpus', 'abc'), poll=0.02)
    assert result.winner and result.best_model.is_file() and load_settings(s.folder / 'config.yaml') == s
