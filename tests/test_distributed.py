"Several processes, one model: what they compute is what one computes, and what ends one of them is known to all"
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tiny_corpus import TINY, make_tiny_corpus

from tts_tuner.cli import main
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.hparams import create_hparams, format_overrides
from tts_tuner.data.loader import Batch
from tts_tuner.training.checkpoint import load_checkpoint
from tts_tuner.training.distributed import Ranks, RanksLost, fingerprint, rehearse
from tts_tuner.training.guard import NonFinite
from tts_tuner.training.joining import join
from tts_tuner.training.learner import Learner
from tts_tuner.training.sinks import read_metrics
from tts_tuner.training.trainer import run_training

STILL = dict(prenet_dropout=0.0, attention_dropout=0.0, dropout_decoder=0.0, encoder_dropout=0.0, postnet_dropout=0.0)


# ---------------------------------------------------------------- the same numbers as one process

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def hparams(**more): return create_hparams('small', {**TINY, **STILL, 'n_symbols': 12, **more})


def batch_of(rows, seed):
    "A batch of noise with clips of very different lengths"
    draw = torch.Generator().manual_seed(seed)
    text_lengths, mel_lengths = (torch.randint(low, high, (rows,), generator=draw) for low, high in ((3, 9), (5, 33)))
    N, T = int(text_lengths.max()), -(-int(mel_lengths.max()) // 4) * 4
    text = torch.randint(2, 12, (rows, N), generator=draw) * (torch.arange(N) < text_lengths[:, None])
    mel = torch.randn(rows, 20, T, generator=draw)
    gate = (torch.arange(T // 4) >= ((mel_lengths - 1) // 4)[:, None]).to(mel)
    return Batch(text, text_lengths, mel, mel_lengths, gate, [f'clip{seed}.{i}' for i in range(rows)])


def share_of(batch, rank, world):
    rows = slice(rank, None, world)
    return replace(batch, text=batch.text[rows], text_lengths=batch.text_lengths[rows], mel=batch.mel[rows], mel_lengths=batch.mel_lengths[rows], gate=batch.gate[rows],
                   ids=batch.ids[rows])


def learn(group, batches, start=None, **more):
    "Steps on shares of the batches; the learner and the numbers of each step"
    learner = Learner(hparams(**more), 'cpu', group)
    if start: learner.load(start)
    steps = [learner.learn(share_of(b, group.rank, group.world) if isinstance(b, Batch) else [share_of(x, group.rank, group.world) for x in b]) for b in batches]
    return learner, [{k: float(v) for k, v in m.items()} for m in steps]


@pytest.mark.parametrize('world,rows,more', [(2, 4, {}), (2, 5, dict(loss_reduction='padded')), (3, 2, dict(gradient_checkpointing=True)), (2, 3, dict(mask_padding=False, grad_clip_thresh=0.05))],
                         ids=['even', 'uneven', 'checkpointed, a rank without clips', 'clipped'])
def test_ranks_equal_one_process_on_the_same_batch(double, world, rows, more):
    batches = [batch_of(rows, seed) for seed in range(2)] + [[batch_of(rows, 7), batch_of(rows + 1, 8)]]  # the last step of two batches
    torch.manual_seed(3)
    fresh = {k: v for k, v in Learner(hparams(**more)).state().items() if k in ('step', 'model', 'optimizer')}
    start = {**fresh, 'model': {k: v.clone() for k, v in fresh['model'].items()}}
    whole, expected = learn(Ranks(), batches, start, **more)
    ranks = rehearse(world, lambda group: learn(group, batches, start, **more))
    for learner, numbers in ranks:
        for a, b in zip(expected, numbers):
            for k in a: assert abs(a[k] - b[k]) < 1e-9 * max(1, abs(a[k])), k
        for (k, a), b in zip(whole.model.state_dict().items(), learner.model.state_dict().values()):
            assert float((a - b).abs().max()) < 1e-9, k
    assert len({fingerprint(learner.model.state_dict()) for learner, _ in ranks}) == 1, 'ranks agree to the last bit'
    assert any(float((a - b).abs().max()) > 1e-4 for a, b in zip(start['model'].values(), whole.model.state_dict().values())), 'something was learned'


def test_weights_are_those_of_rank_0():
    def work(group):
        learner = Learner(hparams(seed=group.rank), 'cpu', group)  # threads draw from one generator, so each model is another
        group.agree('the weights', fingerprint(learner.model.state_dict()), 'look')
        with torch.no_grad(): learner.model.decoder.attention_rnn.weight_hh[0, 0] += group.rank * 1e-7
        group.agree('the weights', fingerprint(learner.model.state_dict()), 'look')
    with pytest.raises(UserError, match='The ranks disagree on the weights: [0-9a-f]+ on rank 0, [0-9a-f]+ on rank 1; look'): rehearse(2, work)


def test_nan_on_one_rank_stops_all_at_the_same_step():
    batch = batch_of(4, 1)
    broken = replace(batch, mel=batch.mel.clone())
    broken.mel[3] = float('nan')  # a clip of rank 1
    found = {}

    def work(group):
        learner = Learner(hparams(), 'cpu', group)
        before = None
        try:
            for b in (batch, broken):
                before = fingerprint(learner.model.state_dict())
                learner.learn(share_of(b, group.rank, 2))
        except NonFinite as e: found[group.rank] = e.report.blamed, e.report.step, e.report.batch, fingerprint(learner.model.state_dict()) == before
    rehearse(2, work)
    assert found[0] == found[1] == (('clip1.3',), 1, ('clip1.0', 'clip1.2', 'clip1.1', 'clip1.3'), True)


# ---------------------------------------------------------------- meeting

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def variables(rank, port, world=2): return dict(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))


@pytest.mark.parametrize('rank,seen', [(0, 'rank 1 of 2 did not come in time'), (1, 'nothing listens on port')])
def test_a_missing_rank_is_named_in_time(rank, seen):
    begun = time.monotonic()
    with pytest.raises(TTSTunerError, match=f'(?s){seen}.*MASTER_ADDR=127.0.0.1.*firewall.*machines times ranks.*GLOO_SOCKET_IFNAME'): join('cpu', 1.0, variables(rank, free_port()))
    assert time.monotonic() - begun < 4


def test_something_that_listens_and_says_nothing():
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        begun = time.monotonic()
        with pytest.raises(TTSTunerError, match='Rank 1 of 2 could not join the others'): join('cpu', 1.0, variables(1, other.getsockname()[1]))
        assert time.monotonic() - begun < 6


# ---------------------------------------------------------------- processes

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp('ranks')
    return make_tiny_corpus(root / 'corpus'), root / 'cache'


def one_rank(rank, port, corpus, run_dir, cache, overrides, pause, options, answer):
    "A rank: what it returned or the error it died of goes into `answer`"
    os.environ.update(variables(rank, port))
    if pause:
        step = Learner.learn

        def slow(self, batch):
            time.sleep(pause)
            return step(self, batch)
        Learner.learn = slow
    try:
        out = run_training(corpus, run_dir, create_hparams('small', {**TINY, **overrides}), cache_dir=cache, tensorboard=False, n_samples=0, console=lambda line: None, **options)
        answer.put((rank, out['state'], out['step']))
    except BaseException as e: answer.put((rank, type(e).__name__, str(e)))


class Pair:
    "Two ranks as processes, forked from a server that has made the imports once"

    def __init__(self, tiny, run_dir, corpora=(), pause=0.0, own=({}, {}), max_steps=8, **options):
        context = multiprocessing.get_context('forkserver')
        context.set_forkserver_preload(['tts_tuner.training.trainer', 'test_distributed'])
        self.run_dir, self.answers, port = run_dir, context.Queue(), free_port()
        shared = dict(max_steps=max_steps, eval_every=4, checkpoint_every=2, prenet_dropout=0.5)
        self.ranks = [context.Process(target=one_rank, daemon=True, args=(r, port, (corpora or (tiny[0],) * 2)[r], run_dir, tiny[1], {**shared, **own[r]}, pause, options, self.answers))
                      for r in range(2)]
        for rank in self.ranks: rank.start()

    def ends(self, n=2):
        "What the ranks said at their end, by rank"
        found = sorted(self.answers.get(timeout=60) for _ in range(n))
        for rank in self.ranks: rank.join(timeout=20)
        assert not any(rank.is_alive() for rank in self.ranks)
        return [rest for _, *rest in found]

    def reaches(self, step):
        deadline = time.monotonic() + 60
        while not ((rows := read_metrics(self.run_dir / 'metrics.jsonl')) and rows[-1]['step'] >= step):
            assert time.monotonic() < deadline, 'nothing happened'
            time.sleep(0.02)


@pytest.fixture(scope='module')
def unbroken(tiny, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp('runs') / 'unbroken'
    assert Pair(tiny, run_dir, own=({}, dict(learning_rate=0.5, max_steps=3))).ends() == [['finished', 8]] * 2
    return run_dir


def same(a, b, where='state'):
    if isinstance(a, torch.Tensor): assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a: same(a[k], b[k], f'{where}.{k}')
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)): same(x, y, f'{where}[{i}]')
    else: assert a == b, where


def test_the_run_of_two_is_the_run_of_one(tiny, tmp_path):
    own = dict(STILL, batch_size=3, max_steps=6)
    assert Pair(tiny, tmp_path / 'two', own=(own, own)).ends() == [['finished', 6]] * 2
    hp = create_hparams('small', {**TINY, **own, 'eval_every': 4, 'checkpoint_every': 2})
    run_training(tiny[0], tmp_path / 'one', hp, cache_dir=tiny[1], tensorboard=False, n_samples=0, console=lambda line: None)
    rows = [read_metrics(tmp_path / name / 'metrics.jsonl') for name in ('one', 'two')]
    for a, b in zip(*rows, strict=True):
        assert all(a[k] == pytest.approx(b[k], rel=1e-3, abs=1e-4) for k in ('train_loss', 'mel_loss', 'gate_loss', 'guided_loss', 'grad_norm')) and a['epoch'] == b['epoch']


def test_rank_0_decides_and_writes(unbroken):
    log = (unbroken / 'train.log').read_text()
    assert 'Rank 1 was started with another learning_rate, max_steps; it takes that of rank 0.' in log and log.count('validation:') == 2
    assert [m['step'] for m in read_metrics(unbroken / 'metrics.jsonl')] == list(range(1, 9))
    assert json.loads((unbroken / 'metadata.json').read_text())['ranks'] == 2
    state = load_checkpoint(unbroken / 'checkpoints' / 'last.pt')
    assert len(state['rng_of_others']) == 1 and not torch.equal(state['rng_of_others'][0]['torch'], state['rng']['torch']), 'each rank draws its own dropout'


def test_a_killed_rank_ends_the_run_and_resume_is_bit_for_bit(tiny, unbroken, tmp_path):
    pair = Pair(tiny, tmp_path / 'run', pause=0.05)
    pair.reaches(5)
    os.kill(pair.ranks[1].pid, signal.SIGKILL)
    [(kind, words)] = pair.ends(1)
    assert kind == RanksLost.__name__ and 'Rank 0 of 2 lost another rank' in words and 'start all ranks again with --resume' in words
    status = json.loads((tmp_path / 'run' / 'status.json').read_text())
    assert status['state'] == 'failed' and 'lost another rank' in status['reason'] and status['saved'] >= 4
    assert Pair(tiny, tmp_path / 'run', resume=True).ends() == [['finished', 8]] * 2
    same(*(load_checkpoint(run / 'checkpoints' / 'last.pt') for run in (unbroken, tmp_path / 'run')))


def test_one_process_goes_on_with_the_run_of_two(tiny, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / 'run')
    said: list[str] = []
    hp = create_hparams('small', {**TINY, 'max_steps': 10, 'eval_every': 10})
    ended = run_training(tiny[0], tmp_path / 'run', hp, resume=True, cache_dir=tiny[1], tensorboard=False, n_samples=0, console=said.append)
    assert ended['step'] == 10 and any('a run on 2 processes, this one has 1' in line for line in said)


def test_ranks_with_other_data_say_so(tiny, tmp_path):
    other = shutil.copytree(tiny[0], tmp_path / 'other')
    rows = (other / 'metadata.csv').read_text().splitlines()
    (other / 'metadata.csv').write_text('\n'.join(rows[:-1]) + '\n')
    (kind0, words0), (kind1, words1) = Pair(tiny, tmp_path / 'run', corpora=(tiny[0], other)).ends()
    assert (kind0, kind1) == ('UserError', 'UserError') and words0 == words1
    assert words0.startswith('The ranks disagree on the data: ') and words0.endswith('give every machine the same corpus.')


def test_what_ends_one_rank_is_known_to_the_other(tiny, tmp_path):
    (kind0, words0), (kind1, words1) = Pair(tiny, tmp_path / 'run', corpora=(tmp_path / 'nothing', tiny[0])).ends()
    assert kind0 == 'UserError' and kind1 == 'RanksLost' and words0 in words1 and words1.startswith('Rank 0 of 2 ended:')


def test_a_signal_to_torchrun_leaves_one_good_checkpoint(tiny, tmp_path):
    run_dir = tmp_path / 'run'
    overrides = format_overrides({**TINY, 'max_steps': 100_000, 'eval_every': 100_000, 'checkpoint_every': 100_000})
    process = subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'tts_tuner.cli', 'train', '--corpus', str(tiny[0]),
                                '--run-dir', str(run_dir), '--cache-dir', str(tiny[1]), '--hparams', overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not ((run_dir / 'metrics.jsonl').exists() and (run_dir / 'metrics.jsonl').read_text().count('\n') > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    status = json.loads((run_dir / 'status.json').read_text())
    assert (status['state'], status['reason']) == ('stopped', 'SIGINT received')
    assert load_checkpoint(run_dir / 'checkpoints' / 'last.pt')['step'] == status['step'] == read_metrics(run_dir / 'metrics.jsonl')[-1]['step'] > 3


@pytest.mark.parametrize('more,env,words', [(['--nodes', '2'], {}, '--master is the machine of rank 0'), (['--ranks', '2'], dict(WORLD_SIZE='2'), 'torchrun has done so already'),
                                            (['--nodes', '2', '--node-rank', '2', '--master', 'a:1'], {}, '--node-rank=2 is not between 0 and')])
def test_mistakes_in_starting_ranks_are_named(monkeypatch, capsys, more, env, words):
    for k, v in env.items(): monkeypatch.setenv(k, v)
    with pytest.raises(SystemExit) as e: main(['train', '--corpus', 'c', '--run-dir', 'r', *more])
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count('\n') == 1
