"The command line as a user meets it: quick help, one sentence for each mistake, exit status 2, 1 or 130, nothing lost"
import json, os, pickle, re, resource, shutil, socket, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tts_tuner import cli
from tts_tuner.config.errors import TTSTunerError

VERBS = ('run', 'config show', 'config migrate', 'train', 'synth', 'import', 'export', 'replay', 'judge', 'report', 'doctor', 'demo-corpus', 'version')
HEADLESS = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'WAYLAND_DISPLAY', 'MPLBACKEND')}


@pytest.fixture
def tts_tune(capsys, tmp_path, monkeypatch):
    "Exit status, output and errors of `tts-tune WORDS`, run in an empty folder"
    monkeypatch.chdir(tmp_path)
    for name in ('MLFLOW_DISABLE_TELEMETRY', 'DO_NOT_TRACK', 'MPLBACKEND'): monkeypatch.setenv(name, os.environ.get(name, 'Agg' if name == 'MPLBACKEND' else 'true'))

    def call(*words):
        with pytest.raises(SystemExit) as ended: cli.main([str(w) for w in words])
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err
    return call


def one_sentence(result, status, *words):
    "The refusal is one line without a traceback, has this status and contains these words"
    code, _, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == status, (code, err)
    assert len(lines) == 1 and 'Traceback' not in err, err
    for word in words: assert word in err, (word, err)


@pytest.fixture(scope='session')
def voice(tmp_path_factory):
    "A very small untrained voice that reads characters"
    import torch

    from tts_tuner.config.hparams import create_hparams, to_dict
    from tts_tuner.model.tacotron2 import Tacotron2
    from tts_tuner.text.symbols import SymbolTable
    from tts_tuner.training.checkpoint import save_checkpoint

    table = SymbolTable.characters('en')
    small = dict.fromkeys(('encoder_embedding_dim', 'symbols_embedding_dim', 'attention_rnn_dim', 'decoder_rnn_dim', 'prenet_dim', 'postnet_embedding_dim'), 16)
    hp = create_hparams('small', {**small, 'frontend': 'characters', 'attention_dim': 8, 'max_decoder_steps': 20, 'gate_threshold': 0.99, 'n_symbols': len(table)})
    torch.manual_seed(0)
    state = dict(model=Tacotron2(hp).state_dict(), hparams=to_dict(hp), symbols=table.to_dict(), mel_mean=-6.0, mel_std=2.0, digest='', step=0, metrics={})
    return save_checkpoint(tmp_path_factory.mktemp('voice') / 'best_model.pt', state), state


# ---------------------------------------------------------------- help

def test_help_is_quick():
    "Best of several runs, in seconds of the processor: the machine may be busy, the command is not"
    spent = []
    for _ in range(8):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, '-m', 'tts_tuner.cli', '--help'], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)  # of the processor, so that a busy machine does not count
        assert done.returncode == 0 and 'From recordings to a voice' in done.stdout
        if min(spent) < 0.3: break
    assert min(spent) < 0.3, spent


def test_entry_point():
    command = shutil.which('tts-tune', path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    assert command, 'tts-tune is not installed'
    done = subprocess.run([command, 'version'], capture_output=True, text=True)
    assert done.returncode == 0 and re.match(r'tts_tuner \d+\.\d+', done.stdout)


@pytest.mark.parametrize('verb', VERBS)
def test_each_help_has_examples(tts_tune, verb):
    status, out, _ = tts_tune(*verb.split(), '--help')
    assert status == 0 and 'Examples:' in out and f'  tts-tune {verb}' in out


@pytest.mark.parametrize('words', [['runn'], ['run', '--trails', '3'], ['synth'], ['run', '--trials', '0'], ['train', '--run-dir', 'x']])
def test_usage_errors(tts_tune, words):
    status, _, err = tts_tune(*words)
    assert status == 2 and 'Traceback' not in err


# ---------------------------------------------------------------- settings

def test_flags_reach_the_study(tts_tune, monkeypatch, tmp_path):
    "Every flag of `run` changes the settings that the tuner is given"
    import tts_tuner.report, tts_tuner.tuner.exam, tts_tuner.tuner.loop

    given, examined = [], []

    def study(settings, view):
        given.append(settings)
        settings.folder.mkdir(parents=True, exist_ok=True)
        (settings.folder / 'config.yaml').write_text(f'study: {settings.study}\n')
        view.say('as asked')
        return SimpleNamespace(corpus='where it lies')
    monkeypatch.setattr(tts_tuner.tuner.loop, 'run_study', study)
    monkeypatch.setattr(tts_tuner.tuner.exam, 'sit_exam', lambda *given: examined.append(given))
    (tmp_path / 'study.yaml').write_text('trials: 4\nhparams:\n  learning_rate: 1e-5\n')
    flags = {'--study': ('study', 'anna'), '--trials': ('trials', 3), '--max-trials': ('max_trials', 2), '--timeout': ('timeout', '90m'), '--preset': ('preset', 'paper'),
             '--workers': ('workers', 2), '--seed': ('seed', 5), '--corpus': ('corpus', 'my_voice'), '--dataset': ('corpus', 'my_voice')}
    for flag, (name, value) in flags.items():
        assert tts_tune('run', '--corpus', 'other', flag, value)[0] == 0
        assert getattr(given[-1], name) == value, flag
    assert examined[-1] == (given[-1].folder, 'where it lies', Path('data/cache'))
    code, out, _ = tts_tune('run', '--config', 'study.yaml', '--dataset', 'x', '--auto-deploy-best', '--tracking', 'none', '--hparams', 'max_steps=600', 'rungs.cohort=6')
    s = given[-1]
    assert code == 0 and 'as asked' in out and 'Nothing was measured yet' in out and (s.folder / 'report.html').is_file()
    assert (s.auto_deploy_best, s.tracking.enabled, s.rungs.cohort, s.trials) == (True, False, 6, 4)
    assert s.hparams == {'learning_rate': 1e-5, 'max_steps': 600} and s.base_hparams().learning_rate == 1e-5


def test_printed_settings_can_be_read_back(tts_tune, tmp_path):
    code, out, _ = tts_tune('config', 'show', '--plain', '--trials', '3', '--hparams', 'max_steps=600')
    assert code == 0
    (tmp_path / 'again.yaml').write_text(out)
    assert tts_tune('config', 'show', '--plain', '--config', 'again.yaml')[1] == out
    told = tts_tune('config', 'show', '--meanings', '--trials', '3', '--hparams', 'max_steps=600')[1]
    assert '# --trials: trials wanted' in told
    (tmp_path / 'again.yaml').write_text(told)
    assert tts_tune('config', 'show', '--plain', '--config', 'again.yaml')[1] == out


@pytest.mark.parametrize('text, words', [
    ('trails: 3\n', ('trails', 'trials')), ('rungs:\n  cohrt: 6\n', ('rungs.cohrt', 'cohort')), ('hparams:\n  lerning_rate: 1\n', ('lerning_rate', 'learning_rate')),
    ('search_space:\n  learning_rate: {type: loguniform, low: 1, high: 2, hihg: 3}\n', ('hihg', 'high')), ('trials: [', ('study.yaml',))])
def test_misspelt_settings(tts_tune, tmp_path, text, words):
    (tmp_path / 'study.yaml').write_text(text)
    one_sentence(tts_tune('run', '--config', 'study.yaml'), 2, *words)
    assert not (tmp_path / 'runs').exists() and not (tmp_path / 'data').exists()


@pytest.mark.parametrize('words, said', [
    (['run', '--config', 'nowhere.yaml'], 'nowhere.yaml'), (['run', 'rungs.cohrt=6'], 'cohort'), (['run', '--hparams', 'lerning_rate=1'], 'learning_rate'),
    (['run', '--tracking', 'wandb'], 'mlflow'), (['run', '--workers', 'many'], 'auto'), (['run', '--timeout', 'soon'], 'soon'), (['run', '--preset', 'smal'], 'small'),
    (['report', 'nowhere'], 'nowhere'), (['report'], 'tts-tune run'), (['synth', 'hello'], 'tts-tune run'), (['synth', 'hello', '--model', 'nowhere.pt'], 'nowhere.pt')])
def test_mistakes_on_the_line(tts_tune, words, said): one_sentence(tts_tune(*words), 2, said)


def test_hparams_are_listed(tts_tune):
    code, out, _ = tts_tune('train', '--help-hparams')
    assert code == 0 and 'peak learning rate of Adam' in out and 'n_frames_per_step' in out


# ---------------------------------------------------------------- corpus

def corpus(folder, lines, **sounds):
    "A corpus folder with this metadata; a sound is bytes, or seconds of noise"
    from tts_tuner.audio.wav import save_wav

    (folder / 'wavs').mkdir(parents=True)
    (folder / 'metadata.csv').write_text(lines)
    for name, what in sounds.items():
        path = folder / 'wavs' / f'{name}.wav'
        if isinstance(what, bytes): path.write_bytes(what)
        else: save_wav(path, 0.3 * np.sin(np.arange(int(22050 * what)) * 0.05), 22050)
    return folder


def test_no_corpus(tts_tune): one_sentence(tts_tune('train', '--corpus', 'nowhere', '--run-dir', 'r'), 2, 'nowhere', 'metadata.csv')


def test_no_metadata(tts_tune, tmp_path):
    (tmp_path / 'c').mkdir()
    one_sentence(tts_tune('train', '--corpus', 'c', '--run-dir', 'r'), 2, 'There is no metadata.csv in c')


@pytest.mark.parametrize('lines, word', [('', 'empty'), ('just words\n', 'Line 1'), ('a|b|c|d|e|f\n', 'Line 1')])
def test_malformed_metadata(tts_tune, tmp_path, lines, word):
    corpus(tmp_path / 'c', lines)
    one_sentence(tts_tune('train', '--corpus', 'c', '--run-dir', 'r'), 2, 'metadata.csv', word)


def test_a_wav_that_is_none(tts_tune, tmp_path):
    "Alone it leaves nothing to train on: a sentence names clip and reason"
    corpus(tmp_path / 'c', 'a|Hello there.|Hello there.\n', a=b'this is no sound')
    one_sentence(tts_tune('train', '--corpus', 'c', '--run-dir', 'r', '--hparams', 'frontend=characters'), 2, 'a', 'not a sound file')


def test_unknown_symbols_in_a_corpus(tts_tune, tmp_path):
    corpus(tmp_path / 'c', 'a|漢字漢字漢字|漢字漢字漢字\n', a=1.0)
    one_sentence(tts_tune('train', '--corpus', 'c', '--run-dir', 'r', '--hparams', 'frontend=characters'), 2, '漢')


def test_no_espeak(tts_tune, monkeypatch, tmp_path):
    "Without the synthesiser's library there is no demonstration corpus, and the sentence says how to get it"
    monkeypatch.setitem(sys.modules, 'espeakng_loader', None)
    for words in (['demo-corpus', 'd'], ['run']): one_sentence(tts_tune(*words), 2, "tts_tuner[demo]")
    assert not list(tmp_path.rglob('*.wav')) and not (tmp_path / 'runs').exists()


# ---------------------------------------------------------------- speaking

def test_synth(tts_tune, voice, tmp_path):
    code, out, err = tts_tune('synth', 'Hello there.', '--model', voice[0], '-o', 'deep/hello.wav')
    assert code == 0 and (tmp_path / 'deep/hello.wav').read_bytes()[:4] == b'RIFF' and 's of speech' in out
    assert 'stop gate never fired' in err


def test_synth_takes_the_newest_model(tts_tune, voice, tmp_path):
    for age, name in ((100, 'old'), (0, 'new')):
        path = tmp_path / 'runs' / name / 'best_model.pt'
        path.parent.mkdir(parents=True)
        shutil.copy(voice[0], path)
        os.utime(path, (time.time() - age, time.time() - age))
    assert 'runs/new/best_model.pt' in tts_tune('synth', 'Hello.')[1]


def test_unknown_symbols_in_a_text(tts_tune, voice): one_sentence(tts_tune('synth', '漢字', '--model', voice[0]), 2, '漢')


def test_nothing_to_say(tts_tune, voice): one_sentence(tts_tune('synth', '  ', '--model', voice[0]), 2, 'empty')


def test_checkpoint_of_another_kind(tts_tune, voice, tmp_path):
    import torch

    from tts_tuner.training.checkpoint import save_checkpoint

    path, state = voice
    save_checkpoint(tmp_path / 'wider.pt', {**state, 'hparams': {**state['hparams'], 'decoder_rnn_dim': 24}})
    save_checkpoint(tmp_path / 'half.pt', dict(model=state['model']))
    (tmp_path / 'cut.pt').write_bytes(path.read_bytes()[:2000])
    (tmp_path / 'text.pt').write_text('not a checkpoint')
    torch.save(dict(weights=torch.zeros(2)), tmp_path / 'foreign.pt')
    with open(tmp_path / 'pickle.pt', 'wb') as f: pickle.dump(Path, f)
    for name, word in (('wider', 'another architecture'), ('half', 'hparams'), ('cut', 'cut.pt'), ('text', 'text.pt'), ('foreign', 'foreign.pt'), ('pickle', 'pickle.pt')):
        one_sentence(tts_tune('synth', 'Hello.', '--model', f'{name}.pt'), 2, word)


def test_warm_start_from_another_architecture(tts_tune, voice, tmp_path):
    "Refused with the fields that differ; nothing is trained"
    from tts_tuner.data.demo import make_tone_corpus

    make_tone_corpus(tmp_path / 'c', n=12)
    small = 'frontend=characters,encoder_embedding_dim=32,decoder_rnn_dim=32,max_steps=2,batch_size=2'
    one_sentence(tts_tune('train', '--corpus', 'c', '--run-dir', 'r', '--hparams', small, '--warm-start', voice[0]), 2, 'decoder_rnn_dim', 'another architecture')
    assert not list(tmp_path.rglob('step_*.pt'))


def test_full_disk(voice, tmp_path):
    "The system refuses to write more than 1000 bytes: status 1, a sentence, and the old file is whole"
    (tmp_path / 'hello.wav').write_bytes(b'what was there')
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    done = subprocess.run([sys.executable, '-m', 'tts_tuner.cli', 'synth', 'Hello.', '--model', str(voice[0]), '-o', 'hello.wav'],
                          cwd=tmp_path, env={**HEADLESS, 'OMP_NUM_THREADS': '1'}, preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 1 and 'No space left to write hello.wav' in done.stderr and 'Traceback' not in done.stderr
    assert (tmp_path / 'hello.wav').read_bytes() == b'what was there' and [p.name for p in tmp_path.iterdir()] == ['hello.wav']


# ---------------------------------------------------------------- endings

def break_doctor(monkeypatch, error):
    import tts_tuner.doctor

    def examine(): raise error
    monkeypatch.setattr(tts_tuner.doctor, 'examine', examine)


def test_a_known_failure(tts_tune, monkeypatch):
    break_doctor(monkeypatch, TTSTunerError('Trial t002 died at step 40.'))
    one_sentence(tts_tune('doctor'), 1, 'Trial t002 died at step 40.')


def test_keyboard(tts_tune, monkeypatch):
    break_doctor(monkeypatch, KeyboardInterrupt())
    one_sentence(tts_tune('doctor'), 130, 'Interrupted')


def test_full_disk_anywhere(tts_tune, monkeypatch):
    break_doctor(monkeypatch, OSError(28, 'No space left on device', 'runs/voice'))
    one_sentence(tts_tune('doctor'), 1, 'disk is full', 'runs/voice')


def test_a_bug_of_ours_leaves_its_traceback_in_a_file(tts_tune, monkeypatch, tmp_path):
    break_doctor(monkeypatch, RuntimeError('impossible'))
    result = tts_tune('doctor')
    one_sentence(result, 1, 'bug of ours', 'RuntimeError: impossible')
    log = Path(re.search(r'the file (\S+);', result[2])[1])
    assert log.parent == tmp_path and 'Traceback' in log.read_text() and 'impossible' in log.read_text()


@pytest.mark.parametrize('words', [['--debug', 'doctor'], ['doctor', '--debug'], ['doctor', '--json', '--debug']])
def test_debug_shows_the_traceback(tts_tune, monkeypatch, words):
    break_doctor(monkeypatch, TTSTunerError('broken'))
    code, _, err = tts_tune(*words)
    assert code == 1 and 'Traceback' in err and err.rstrip().endswith('broken')


def test_a_text_may_contain_the_flag(tts_tune, monkeypatch, voice):
    import tts_tuner.serve.synthesizer

    heard = []

    class Listener:
        @classmethod
        def load(cls, *_): return cls()

        def say(self, text, seed):
            heard.append(text)
            raise TTSTunerError('enough')
    monkeypatch.setattr(tts_tuner.serve.synthesizer, 'Synthesizer', Listener)
    one_sentence(tts_tune('synth', '--model', voice[0], '--', '--debug'), 1, 'enough')
    assert heard == ['--debug']


# ---------------------------------------------------------------- doctor

def test_doctor_without_a_display():
    done = subprocess.run([sys.executable, '-m', 'tts_tuner.cli', 'doctor'], env=HEADLESS, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == '' and 'none is needed' in done.stdout and 'espeak' in done.stdout


def test_doctor_names_who_holds_a_port(tts_tune):
    with socket.socket() as s:
        try: s.bind(('127.0.0.1', 6006)); s.listen()
        except OSError: pass  # somebody holds it already, which serves as well
        code, out, _ = tts_tune('doctor', '--json')
    found = {f['name']: f for f in json.loads(out)}
    assert code == 0 and found['port 6006']['state'] == 'note' and 'held by' in found['port 6006']['words'] and '--port 6007' in found['port 6006']['remedy']


def test_doctor_without_espeak(tts_tune, monkeypatch):
    monkeypatch.setitem(sys.modules, 'espeakng_loader', None)
    code, out, _ = tts_tune('doctor')
    assert code == 0 and 'LACKS  espeak' in out and "pip install 'tts_tuner[demo]'" in out


def test_doctor_in_a_folder_that_cannot_be_written(tmp_path):
    from tts_tuner.doctor import check_disk

    if os.geteuid() == 0: pytest.skip('root may write everywhere')
    (tmp_path / 'locked').mkdir(mode=0o500)
    assert check_disk(tmp_path / 'locked').state == 'lacks'


# ---------------------------------------------------------------- the other verbs

def test_demo_corpus(tts_tune, tmp_path):
    pytest.importorskip('espeakng_loader')
    code, out, _ = tts_tune('demo-corpus', 'd', '--sentences', '12')
    assert code == 0 and len(list((tmp_path / 'd/wavs').glob('*.wav'))) == 12 and 'tts-tune run --corpus d' in out


@pytest.mark.parametrize('device', ['cuda:77', 'foo'])
def test_a_device_that_is_not_there(tts_tune, voice, device): one_sentence(tts_tune('synth', 'hello', '--model', voice[0], '--device', device), 2, device, 'auto')


def test_settings_of_another_version(tts_tune, voice, tmp_path):
    from tts_tuner.training.checkpoint import save_checkpoint

    state = voice[1] | dict(hparams=voice[1]['hparams'] | dict(flux=1))
    path = save_checkpoint(tmp_path / 'new.pt', state)
    one_sentence(tts_tune('synth', 'hello', '--model', path), 2, 'new.pt', 'flux', 'another version')


def test_resume_goes_on_with_the_settings_of_the_run(tts_tune, monkeypatch, tmp_path):
    from tts_tuner.config.hparams import create_hparams
    from tts_tuner.training import trainer
    from tts_tuner.training.run_folder import RunFolder

    seen = {}
    monkeypatch.setattr(trainer, 'run_training', lambda corpus, run_dir, hp, **rest: seen.update(hp=hp))
    RunFolder(tmp_path / 'run').write_hparams(create_hparams('paper', 'max_steps=600,learning_rate=1e-5'))
    tts_tune('train', '--corpus', 'c', '--run-dir', 'run', '--resume', '--hparams', 'batch_size=3')
    assert seen['hp'] == create_hparams('paper', 'max_steps=600,learning_rate=1e-5,batch_size=3')
    tts_tune('train', '--corpus', 'c', '--run-dir', 'run', '--resume', '--preset', 'small')
    assert seen['hp'] == create_hparams('small'), 'a preset that is named wins'


def test_train_hands_everything_on(tts_tune, monkeypatch):
    import tts_tuner.training.trainer

    seen = {}
    monkeypatch.setattr(tts_tuner.training.trainer, 'run_training', lambda corpus, run_dir, hp, **kw: seen.update(corpus=corpus, run_dir=run_dir, hp=hp, **kw))
    code, *_ = tts_tune('train', '--corpus', 'c', '--run-dir', 'r', '--preset', 'small', '--hparams', 'max_steps=600', '--until', '40', '--resume', '--tracking', 'mlflow',
                        '--warm-start', 'w.pt', '--cache-dir', 'k', '--parent-run-id', 'p')
    assert code == 0 and seen['hp'].max_steps == 600 and seen['hp'].n_frames_per_step == 4
    assert (seen['until'], seen['resume'], seen['tracking'], seen['parent_run_id']) == (40, True, 'mlflow', 'p')
    assert (seen['corpus'], seen['run_dir'], seen['warm_start'], seen['cache_dir']) == (Path('c'), Path('r'), Path('w.pt'), Path('k'))


def test_report_of_an_unfinished_study_without_a_display(tmp_path):
    from tts_tuner.facts import toy_study

    toy_study(tmp_path / 'runs' / 'toy', finished=False)
    done = subprocess.run([sys.executable, '-m', 'tts_tuner.cli', 'report'], cwd=tmp_path, env=HEADLESS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'runs/toy/report.html' in done.stdout and (tmp_path / 'runs/toy/report.html').is_file()


def test_judge_answers_five_questions_about_a_run(tts_tune, tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'hparams.yaml').write_text('max_steps: 300\nn_free_running: 24\n')
    rows = [dict(step=10 * i, time=0.0, val_loss=2 - i / 30 if i < 25 else 2.0 * 4 ** (i - 24), alignment_score=min(0.95, i / 12)) for i in range(1, 31)]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    said = json.loads(tts_tune('judge', str(run), '--json')[1])
    assert [a['question'] for a in said] == ['Where does it stand?', 'Will it speak?', 'Does its loss explode?', 'Does speech end by itself?', 'May it end here?']
    assert said[0]['verdict'] == 'convergence' and said[2]['verdict'] == 'diverging'
    one_sentence(tts_tune('judge', str(tmp_path)), 2, 'is no run', 'hparams.yaml')
