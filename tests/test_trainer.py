"The trainer as a program: it can be stopped, killed, poisoned and misused, and says what happened"
import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_corpus import TINY, make_tiny_corpus

from tts_tuner.config.contracts import Change, read_records
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.hparams import create_hparams, format_overrides
from tts_tuner.serve.synthesizer import Synthesizer
from tts_tuner.training import resumable
from tts_tuner.training import trainer as module
from tts_tuner.training.checkpoint import CheckpointFolder, load_checkpoint
from tts_tuner.training.evaluate import Evaluation
from tts_tuner.training.guard import NonFinite
from tts_tuner.training.sinks import JsonlSink, read_metrics
from tts_tuner.training.trainer import export_model, load, run_training, validate

HERE = Path(__file__).parent
quiet = lambda line: None


def hparams(**more): return create_hparams('small', {**TINY, **more})


@pytest.fixture(scope='session')
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp('tiny')
    return make_tiny_corpus(root / 'corpus'), root / 'cache'


def go(tiny, run_dir, hp=None, **options):
    options = dict(console=quiet, tensorboard=False, n_samples=0, cache_dir=tiny[1]) | options
    return run_training(tiny[0], run_dir, hp or hparams(), **options)


@pytest.fixture(scope='session')
def unbroken(tiny, tmp_path_factory):
    "A run of 12 steps in one go"
    run_dir = tmp_path_factory.mktemp('runs') / 'unbroken'
    return run_dir, go(tiny, run_dir, n_samples=1)


def same(a, b, where='state'):
    "Assert that two states agree to the last bit"
    if isinstance(a, torch.Tensor): assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a: same(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f'{where}[{i}]')
    else: assert a == b, where


CLOCK = ('time', 'frames_per_second')


def numbers(run_dir):
    "The stream without what depends on the clock"
    return [{k: v for k, v in m.items() if k not in CLOCK and not k.startswith('system_')} for m in read_metrics(run_dir / 'metrics.jsonl')]


# A child process: the program the tuner starts, with a pause in each step so that it can be hit in the middle.
CHILD = '''
import json, sys, time
sys.path.insert(0, {here!r})
from tts_tuner.config.hparams import create_hparams
from tts_tuner.data.loader import BatchStream
from tts_tuner.training.trainer import run_training
slow = BatchStream.__next__
def wait(self):
    open({marker!r}, 'w').close()
    time.sleep({pause})
    return slow(self)
BatchStream.__next__ = wait
print(json.dumps(run_training({corpus!r}, {run!r}, create_hparams('small', {hp!r}), cache_dir={cache!r}, tensorboard=False, n_samples=0,
                              console=lambda line: None, **{options!r})['state']))
'''


def child(tiny, run_dir, pause=0.05, options=(), **more):
    code = CHILD.format(here=str(HERE), corpus=str(tiny[0]), run=str(run_dir), cache=str(tiny[1]), pause=pause, marker=str(run_dir.parent / 'stepping'), options=dict(options),
                        hp=format_overrides({**TINY, **more}))
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, 'nothing happened'
        time.sleep(0.02)


def last_step(run_dir):
    found = read_metrics(run_dir / 'metrics.jsonl')
    return found[-1]['step'] if found else 0


def test_whole_run(unbroken):
    run_dir, result = unbroken
    assert (result['state'], result['step']) == ('finished', 12)
    status = json.loads((run_dir / 'status.json').read_text())
    assert (status['state'], status['step']) == ('finished', 12)
    stream = read_metrics(run_dir / 'metrics.jsonl')
    assert [m['step'] for m in stream] == list(range(1, 13))
    step_names = {'train_loss', 'mel_loss', 'mel_postnet_loss', 'gate_loss', 'guided_loss', 'guided_weight', 'grad_norm', 'learning_rate',
                  'frames_per_second', 'epoch'}
    validation_names = {'val_loss', 'val_mel_loss', 'val_gate_loss', 'alignment_score', 'attention_focus', 'attention_coverage', 'attention_monotonicity',
                        'attention_entropy', 'gate_accuracy', 'free_alignment_score', 'free_focus', 'free_coverage', 'success', 'stop_rate',
                        'duration_ratio', 'mcd', 'mcd_mean_frame', 'mcd_copy_synthesis', 'distance_ratio', 'score'}
    assert all(step_names <= m.keys() for m in stream)
    assert [m['step'] for m in stream if validation_names <= m.keys()] == [6, 12]
    kept = CheckpointFolder(run_dir / 'checkpoints')
    assert list(kept.steps()) == [6, 9, 12] and load_checkpoint(kept.last)['step'] == 12 and kept.best.exists()
    assert {p.name for p in (run_dir / 'samples' / 'step_000012').iterdir()} == {'00.npz', '00.wav', 'alignments.png'}
    facts = json.loads((run_dir / 'metadata.json').read_text())
    assert facts['data_digest'] and facts['libraries']['torch'] and facts['code']['version'] and facts['hardware']['cores']


def test_what_is_set_aside_is_said(tiny, tmp_path):
    root = tmp_path / 'corpus'
    shutil.copytree(tiny[0], root)
    rows = (root / 'metadata.csv').read_text().splitlines()
    rows = [f'{row}|{"ann" if i % 2 else "bob"}' for i, row in enumerate(rows)]
    rows += [f'gone{i:02d}|where is it|where is it' for i in range(12)] + ['empty||']
    (root / 'metadata.csv').write_text('\n'.join(rows) + '\n')
    said: list[str] = []
    go((root, tiny[1]), tmp_path / 'run', until=1, console=said.append)
    assert said[0].startswith('20 clips, 13 set aside') and 'There are 2 speakers' in said[1]
    assert 'gone00 is set aside: its sound is missing' in said[2] and '3 more are set aside' in said[12]
    log = (tmp_path / 'run' / 'train.log').read_text()
    assert all(f'gone{i:02d} is set aside' in log for i in range(12)) and 'empty is set aside: its text is empty' in log
    ann = go((root, tiny[1]), tmp_path / 'ann', hparams(speaker='ann'), until=1, console=said.append)
    assert ann['state'] == 'paused' and '10 clips, 0 set aside' in (tmp_path / 'ann' / 'train.log').read_text()


def test_russian_letters_from_corpus_to_speech(tiny, tmp_path):
    root = tmp_path / 'corpus'
    shutil.copytree(tiny[0], root)
    words = ['Ёлка', 'Объём', 'Щука', 'з+амок', 'Чай?', 'Снег', 'Юла', 'Мышь', 'Где мы', 'Хлеб']
    (root / 'metadata.csv').write_text(''.join(f'clip{i:02d}|{w}|{w}\n' for i, w in enumerate(words)), encoding='utf-8')
    ended = go((root, tiny[1]), tmp_path / 'run', hparams(language='ru', max_steps=2, eval_every=2))
    assert ended['state'] == 'finished' and ended['step'] == 2
    _, hp, table, _ = load(tmp_path / 'run' / 'checkpoints' / 'last.pt')
    assert hp.language == 'ru' and {'ё', 'щ', 'ъ'} <= set(table.symbols)
    assert Synthesizer.load(tmp_path / 'run' / 'checkpoints' / 'last.pt').say('Привет, ёжик').seconds > 0


def test_pause_and_resume_is_bit_for_bit(tiny, unbroken, tmp_path):
    paused = go(tiny, tmp_path / 'run', until=5)
    assert (paused['state'], paused['step']) == ('paused', 5) and 'score' in paused['metrics']
    assert go(tiny, tmp_path / 'run', until=5, resume=True)['state'] == 'paused'
    resumed = go(tiny, tmp_path / 'run', resume=True)
    assert (resumed['state'], resumed['step']) == ('finished', 12)
    whole, parts = (load_checkpoint(r / 'checkpoints' / 'last.pt') for r in (unbroken[0], tmp_path / 'run'))
    same({k: v for k, v in whole.items() if k != 'best_score'}, {k: v for k, v in parts.items() if k != 'best_score'})
    for a, b in zip(numbers(unbroken[0]), numbers(tmp_path / 'run')): assert a == {k: b[k] for k in a}


def test_validation_leaves_no_trace(tiny, unbroken, tmp_path):
    go(tiny, tmp_path / 'run', hparams(eval_every=2))
    a, b = (load_checkpoint(r / 'checkpoints' / 'last.pt') for r in (unbroken[0], tmp_path / 'run'))
    for part in ('model', 'optimizer', 'rng', 'sampler'): same(a[part], b[part], part)


def test_kill_and_resume_is_bit_for_bit(tiny, unbroken, tmp_path):
    run_dir = tmp_path / 'run'
    process = child(tiny, run_dir)
    wait_for(process, lambda: (run_dir / 'checkpoints' / 'step_00000006.pt').exists() and last_step(run_dir) >= 6)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((run_dir / 'status.json').read_text())['state'] == 'running'
    go(tiny, run_dir, resume=True)
    same(*({k: v for k, v in load_checkpoint(r / 'checkpoints' / 'last.pt').items()} for r in (unbroken[0], run_dir)))
    assert numbers(unbroken[0]) == numbers(run_dir), 'each step is counted once'


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_cleanly(tiny, tmp_path, number):
    run_dir = tmp_path / 'run'
    process = child(tiny, run_dir, max_steps=500, checkpoint_every=400, eval_every=400)
    wait_for(process, lambda: last_step(run_dir) >= 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out) == 'stopped'
    status = json.loads((run_dir / 'status.json').read_text())
    assert status['state'] == 'stopped' and number.name in status['reason']
    assert load_checkpoint(run_dir / 'checkpoints' / 'last.pt')['step'] == status['step'] == last_step(run_dir) >= 2


def test_second_signal_ends_at_once(tiny, tmp_path):
    run_dir = tmp_path / 'run'
    process = child(tiny, run_dir, pause=8.0, max_steps=500)
    wait_for(process, (tmp_path / 'stepping').exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert process.poll() is None, 'the first signal waits for the step'
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=3) == -signal.SIGTERM


def poison(monkeypatch, clip, from_step=0):
    "NaN in the mel of one clip"
    load_item = resumable.TTSDataset.__getitem__

    def item(self, i):
        found = load_item(self, i)
        if found['id'] == clip: found['mel'] = found['mel'] * float('nan')
        return found
    monkeypatch.setattr(resumable.TTSDataset, '__getitem__', item)


def test_nan_is_blamed_on_its_clip(tiny, tmp_path, monkeypatch):
    go(tiny, tmp_path / 'run', until=3)
    features = module.build_features(module.read_corpus(tiny[0], hparams()), hparams(), tiny[1])
    guilty = features.ids[module.split(features, hparams())[0][0]]
    poison(monkeypatch, guilty)
    with pytest.raises(NonFinite, match=guilty) as e: go(tiny, tmp_path / 'run', resume=True)
    assert e.value.exit_code == 1 and e.value.report.blamed == (guilty,) and e.value.report.step < 12
    status = json.loads((tmp_path / 'run' / 'status.json').read_text())
    assert status['state'] == 'failed' and guilty in status['reason']
    assert json.loads((tmp_path / 'run' / 'failure.json').read_text())['blamed'] == [guilty]
    kept = CheckpointFolder(tmp_path / 'run' / 'checkpoints')
    for path in (kept.last, kept.best, kept.path / 'before_failure.pt', *kept.steps().values()):
        assert all(bool(torch.isfinite(v).all()) for v in load_checkpoint(path)['model'].values()), path.name
    monkeypatch.undo()
    assert go(tiny, tmp_path / 'run', resume=True)['state'] == 'finished', 'mended, it goes on'


@pytest.mark.parametrize('every', [1, 10])
def test_poisoned_weight_is_caught_within_ten_steps(tiny, tmp_path, monkeypatch, every):
    learn = resumable.Learner.learn

    def poisoned(self, batch):
        self.watch.every = every  # 10: as on a GPU, where each look costs a wait
        if self.step == 4:
            with torch.no_grad(): self.model.decoder.attention_rnn.weight_hh[0, 0] = float('nan')
        return learn(self, batch)
    monkeypatch.setattr(resumable.Learner, 'learn', poisoned)
    with pytest.raises(NonFinite) as e: go(tiny, tmp_path / 'run', hparams(max_steps=40, eval_every=40, checkpoint_every=40))
    found = e.value.report
    assert found.step == 4 and not found.blamed
    if every == 1: assert 'attention_rnn' in found.weights[0]
    else: assert not found.weights, 'the copy from the last look is sound'
    assert len(read_metrics(tmp_path / 'run' / 'metrics.jsonl')) <= 4 + every
    assert not (tmp_path / 'run' / 'checkpoints' / 'last.pt').exists(), 'no poisoned checkpoint'


def test_what_the_learner_alters_is_told_and_taken_back_with_its_steps(tiny, tmp_path, monkeypatch):
    learn = resumable.Learner.learn

    def easing(self, batch):
        out = learn(self, batch)
        if self.step in (2, 5): self.changes.append(Change('lr_relief', 1.0, 0.5, f'eased at {self.step}', self.step))
        return out
    monkeypatch.setattr(resumable.Learner, 'learn', easing)
    said: list[str] = []
    go(tiny, tmp_path / 'run', hparams(checkpoint_every=4, eval_every=4), until=5, console=said.append)
    assert said.count('eased at 2') == said.count('eased at 5') == 1
    for path in (tmp_path / 'run' / 'checkpoints').glob('*'):  # as if it had been killed before the checkpoint of step 5
        if path.name in ('last.pt', 'step_00000005.pt'): path.unlink()
    go(tiny, tmp_path / 'run', hparams(checkpoint_every=4, eval_every=4), resume=True)
    assert [r.when for r in read_records(tmp_path / 'run' / 'changes.jsonl')] == [2, 5]


def test_several_batches_a_step_and_nothing_left_in_memory(tiny, tmp_path):
    ended = go(tiny, tmp_path / 'run', hparams(batch_size=2, accumulate_batches=3, max_steps=4, eval_every=4))
    assert ended['step'] == 4
    state = load_checkpoint(tmp_path / 'run' / 'checkpoints' / 'last.pt')
    assert state['sampler']['epoch'] * 8 + state['sampler']['position'] == 12, 'twelve batches of the eight an epoch has'
    assert not [o for o in gc.get_objects() if type(o).__name__ == 'Tacotron2']


def test_best_is_by_score_never_by_loss(tiny, tmp_path, monkeypatch):
    scripted = {2: (5.0, 0.2, 0.0), 4: (4.0, 0.6, 0.0), 6: (9.0, 0.5, 0.3), 8: (1.0, 0.9, 0.2), 10: (0.5, 0.95, 0.3), 12: (0.1, 0.5, 0.1)}

    def run(self, model, step):
        loss, aligned, score = scripted[step]
        rest = dict.fromkeys(('attention_coverage', 'success', 'stop_rate', 'mcd', 'mcd_mean_frame'), 1.0)
        return Evaluation(step, dict(rest, val_loss=loss, alignment_score=aligned, score=score), ())
    monkeypatch.setattr(resumable.Evaluator, 'run', run)
    monkeypatch.setattr(module, 'write_samples', lambda *args, **more: [])
    seen = []
    save = CheckpointFolder.save
    monkeypatch.setattr(CheckpointFolder, 'save', lambda self, state, best=False: (seen.append((state['step'], best)), save(self, state, best))[1])
    go(tiny, tmp_path / 'run', hparams(eval_every=2, checkpoint_every=12, keep_checkpoints=1))
    assert [s for s, best in seen if best] == [2, 4, 6, 10]
    kept = CheckpointFolder(tmp_path / 'run' / 'checkpoints')
    assert load_checkpoint(kept.best)['step'] == 10 and load_checkpoint(kept.best)['best_score'] == [0.3, 0.95] and list(kept.steps()) == [12]


def test_full_disk(tiny, tmp_path, monkeypatch):
    go(tiny, tmp_path / 'run', until=3)
    write = module.CheckpointFolder.save

    def full(self, state, best=False):
        def refuse(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with monkeypatch.context() as m:
            m.setattr('tts_tuner.config.files.os.fsync', refuse)
            return write(self, state, best)
    monkeypatch.setattr(module.CheckpointFolder, 'save', full)
    with pytest.raises(TTSTunerError, match='No space left') as e: go(tiny, tmp_path / 'run', resume=True)
    assert e.value.exit_code == 1
    assert load_checkpoint(tmp_path / 'run' / 'checkpoints' / 'last.pt')['step'] == 3
    status = json.loads((tmp_path / 'run' / 'status.json').read_text())
    assert status['state'] == 'failed' and 'No space left' in status['reason']


def test_another_architecture_is_refused(tiny, unbroken, tmp_path):
    with pytest.raises(UserError, match='decoder_rnn_dim is 24 there and 32 here.*'): go(tiny, unbroken[0], hparams(decoder_rnn_dim=32), resume=True)
    assert load_checkpoint(unbroken[0] / 'checkpoints' / 'last.pt')['step'] == 12
    (unbroken[0] / 'status.json').write_text(json.dumps(dict(state='finished', step=12, reason='', pid=0, time=0)))
    last = unbroken[0] / 'checkpoints' / 'last.pt'
    with pytest.raises(UserError, match='decoder_rnn_dim'): go(tiny, tmp_path / 'a', hparams(decoder_rnn_dim=32), warm_start=last)
    said = []
    fresh = go(tiny, tmp_path / 'b', hparams(decoder_rnn_dim=32), warm_start=last, fresh_if_different=True, until=1, console=said.append)
    assert fresh['step'] == 1 and any('decoder_rnn_dim' in line and 'from the beginning' in line for line in said)


def test_warm_start_takes_the_weights(tiny, unbroken, tmp_path):
    said = []
    go(tiny, tmp_path / 'run', hparams(learning_rate=0.0, weight_decay=0.0), warm_start=unbroken[0] / 'checkpoints' / 'last.pt', until=1, console=said.append)
    a, b = (load_checkpoint(r / 'checkpoints' / 'last.pt')['model'] for r in (unbroken[0], tmp_path / 'run'))
    same({k: v for k, v in a.items() if 'running' not in k and 'num_batches' not in k}, {k: b[k] for k in a if 'running' not in k and 'num_batches' not in k})
    assert any('weights taken' in line for line in said)


def test_resume_with_other_settings(tiny, tmp_path):
    go(tiny, tmp_path / 'run', until=3)
    go(tiny, tmp_path / 'run', hparams(learning_rate=1e-3, lr_schedule='constant', adam_beta2=0.9), resume=True, until=5)
    assert [m['learning_rate'] for m in read_metrics(tmp_path / 'run' / 'metrics.jsonl')][3:] == [1e-3, 1e-3]
    state = load_checkpoint(tmp_path / 'run' / 'checkpoints' / 'last.pt')
    assert state['hparams']['adam_beta2'] == 0.9 and float(state['optimizer']['count']) == 5
    log = (tmp_path / 'run' / 'train.log').read_text()
    assert 'Settings that change from here on' in log and f'learning_rate from {hparams().learning_rate} to 0.001' in log


def test_a_refused_resume_leaves_the_folder_as_it_was(tiny, tmp_path):
    go(tiny, tmp_path / 'run', until=1)
    before = (tmp_path / 'run' / 'hparams.yaml').read_bytes()
    with pytest.raises(UserError, match='another architecture'): go(tiny, tmp_path / 'run', hparams(decoder_rnn_dim=32), resume=True)
    assert (tmp_path / 'run' / 'hparams.yaml').read_bytes() == before


def test_other_held_out_clips_are_another_corpus(tiny, tmp_path):
    "What was trained on must not be validated on as if it were new, nor be compared with the best of other sentences"
    corpus = make_tiny_corpus(tmp_path / 'corpus')
    (corpus / 'held_out.txt').write_text('clip00\nclip01\nclip02\n')
    go((corpus, tmp_path / 'cache'), tmp_path / 'run', until=6)
    (corpus / 'held_out.txt').write_text('clip03\nclip04\nclip05\n')
    said = []
    go((corpus, tmp_path / 'cache'), tmp_path / 'run', resume=True, console=said.append)
    assert any('corpus has changed' in line for line in said)


def test_a_line_torn_in_the_middle_does_not_stop_a_resume(tiny, tmp_path):
    go(tiny, tmp_path / 'run', until=3)
    stream = tmp_path / 'run' / 'metrics.jsonl'
    lines = stream.read_text().splitlines(keepends=True)
    stream.write_text(lines[0] + lines[1][:30] + lines[1] + lines[2])  # half a line from a full disk, then the whole of it
    go(tiny, tmp_path / 'run', resume=True, until=4)
    assert [m['step'] for m in read_metrics(stream)] == [1, 3, 4]
    assert len((tmp_path / 'run' / 'metrics.cut.jsonl').read_text().splitlines()) == 1


def test_a_full_disk_leaves_no_half_line(tmp_path):
    import resource
    sink, (soft, hard) = JsonlSink(tmp_path / 'metrics.jsonl', seconds=1e9), resource.getrlimit(resource.RLIMIT_FSIZE)
    sink.log(1, dict(a=1.0))
    sink.flush()
    whole = sink.path.read_bytes()
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
        sink.log(2, dict(a=2.0))
        with pytest.raises(TTSTunerError, match='cannot be written'): sink.flush()
        assert sink.path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    sink.flush()
    assert [m['step'] for m in read_metrics(sink.path)] == [1, 2]


def test_few_mel_bands(tiny, tmp_path):
    assert go(tiny, tmp_path / 'run', hparams(n_mels=8), until=1)['metrics']['mcd'] > 0


def test_a_server_that_is_not_there_costs_seconds(tmp_path):
    "MLflow's own patience is minutes; the study would wait for it at its end"
    code = ("import sys, time; from tts_tuner.training.sinks import connect_mlflow; t = time.monotonic()\n"
            "try: connect_mlflow('http://localhost:1', 'x')\nexcept Exception: print(time.monotonic() - t)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert float(out.stdout) < 20, out.stderr


def test_a_run_is_not_written_over(tiny, unbroken):
    before = {p: p.read_bytes() for p in unbroken[0].rglob('*') if p.is_file() and p.name not in ('status.json', '.lock')}
    with pytest.raises(UserError, match='add --resume'): go(tiny, unbroken[0])
    assert before == {p: p.read_bytes() for p in before}


def test_start_up_stays_light(tiny, tmp_path):
    "torch's compiler takes a second to import and nothing here needs it"
    code = CHILD.format(here=str(HERE), corpus=str(tiny[0]), run=str(tmp_path / 'run'), cache=str(tiny[1]), pause=0, marker=str(tmp_path / 'stepping'),
                        options=dict(until=1), hp=format_overrides(TINY))
    out = subprocess.run([sys.executable, '-c', code + "print([m for m in ('torch._dynamo', 'mlflow', 'optuna', 'pydantic') if m in sys.modules])"],
                         capture_output=True, text=True, timeout=60)
    assert out.stdout.split('\n')[1] == '[]', out.stdout + out.stderr


def test_two_trainers_in_one_folder(tiny, tmp_path):
    with module.RunFolder(tmp_path / 'run', quiet).alone():
        with pytest.raises(UserError, match='Another process'): go(tiny, tmp_path / 'run')


def test_resume_without_a_checkpoint_starts(tiny, tmp_path):
    said = []
    assert go(tiny, tmp_path / 'run', resume=True, until=1, console=said.append)['step'] == 1
    assert any('no checkpoint' in line for line in said)


def test_without_the_optional_packages(tiny, tmp_path, monkeypatch):
    for name in ('tensorboard', 'tensorboard.compat', 'tensorboard.compat.proto', 'tensorboard.compat.proto.event_pb2', 'tensorboard.compat.proto.summary_pb2',
                 'matplotlib', 'matplotlib.backends', 'matplotlib.backends.backend_agg', 'psutil', 'mlflow', 'mlflow.tracking'):
        monkeypatch.setitem(sys.modules, name, None)
    said = []
    assert go(tiny, tmp_path / 'run', until=2, tensorboard=True, tracking='mlflow', tracking_uri=f'sqlite:///{tmp_path}/m.db',
              n_samples=1, console=said.append)['step'] == 2
    for word in ('tensorboard', 'matplotlib', 'MLflow'): assert sum(word in line for line in said) == 1, said


def test_event_files_and_mlflow(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from tts_tuner.training.sinks import connect_mlflow
    uri = f'sqlite:///{tmp_path}/mlflow.db'
    client, experiment = connect_mlflow(uri, 'test')
    parent = client.create_run(experiment, run_name='parent').info.run_id
    options = dict(tensorboard=True, tracking='mlflow', tracking_uri=uri, experiment='test', parent_run_id=parent, n_samples=1)
    go(tiny, tmp_path / 'run', until=6, **options)
    go(tiny, tmp_path / 'run', resume=True, **options)
    board = EventAccumulator(str(tmp_path / 'run')).Reload()
    assert [e.step for e in board.Scalars('train_loss')] == list(range(1, 13))
    assert [e.step for e in board.Scalars('score')] == [6, 12] and board.Images('alignments') and board.Audio('spoken_00')
    children = client.search_runs([experiment], filter_string=f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(children) == 1, 'a resumed run goes on in the same MLflow run'
    run = children[0]
    assert run.info.status == 'FINISHED' and run.data.params['batch_size'] == '4' and run.data.tags['hardware.cores']
    assert [m.step for m in client.get_metric_history(run.info.run_id, 'score')] == [6, 12]


def test_load_validate_export(tiny, unbroken, tmp_path):
    path = export_model(unbroken[0], tmp_path / 'best_model.pt')
    model, hp, table, voice = load(path)
    assert hp.n_symbols == len(table) and 'optimizer' not in voice and not model.training
    assert path.stat().st_size < 0.6 * (unbroken[0] / 'checkpoints' / 'best.pt').stat().st_size
    again = validate(path, tiny[0], tiny[1])
    assert abs(again.metrics['mcd'] - voice['metrics']['mcd']) < 1e-6
