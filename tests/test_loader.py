"Batches shared by processes, by frames, made ahead by workers; mels on disk or not"
import dataclasses
import json
import logging
import os
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

from tts_tuner.audio.mel import MelSpectrogram
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import build_features
from tts_tuner.data.loader import BatchOrder, BatchStream, Place, TTSDataset, epoch_cost, plan_epoch, plan_frames, split
from tts_tuner.data.workers import PreparedStream, open_stream

TENSORS = ('text', 'text_lengths', 'mel', 'mel_lengths', 'gate')


def same(a, b): return a.ids == b.ids and all(torch.equal(getattr(a, k), getattr(b, k)) for k in TENSORS)


@pytest.fixture(scope='module')
def cached(tiny_corpus, tmp_path_factory):
    hp = tiny_hparams(mel_norm='standard')
    return build_features(read_corpus(tiny_corpus, hp), hp, tmp_path_factory.mktemp('cached'))


def dataset_of(features, **changes):
    hp = dataclasses.replace(features.hp, **changes)
    return TTSDataset(features, split(features, hp)[0], hp), hp


# ---- several processes

@pytest.mark.parametrize('world', [1, 2, 3, 4])
@pytest.mark.parametrize('changes', [dict(batch_size=4), dict(batch_size=7, n_frames_per_step=3), dict(batch_frames=900)])
def test_rows_of_all_ranks_are_the_whole_batch(cached, world, changes):
    dataset, hp = dataset_of(cached, **changes)
    whole, ranks = BatchStream(dataset, hp), [BatchStream(dataset, hp, k, world) for k in range(world)]
    for _ in range(25):
        parts = [next(s) for s in ranks]
        batch = next(whole)
        while len(batch) < world: batch = next(whole)  # passed over by all ranks
        assert sum(map(len, parts)) == len(batch) and max(map(len, parts)) - min(map(len, parts)) <= 1
        for name in TENSORS:
            joined = torch.empty_like(getattr(batch, name))
            for k, p in enumerate(parts): joined[k::world] = getattr(p, name)
            assert torch.equal(joined, getattr(batch, name))
        assert len({json.dumps(s.state_dict()) for s in (whole, *ranks)}) == 1


def test_a_run_may_go_on_with_another_number_of_processes(cached):
    dataset, hp = dataset_of(cached)
    two = BatchStream(dataset, hp, 0, 2)
    for _ in range(7): next(two)
    one = BatchStream(dataset, hp)
    one.load_state_dict(two.state_dict())
    assert next(two).ids == next(one).ids[::2]


@pytest.mark.parametrize('changes, world, says', [(dict(batch_size=4), 8, 'cannot share'), (dict(batch_frames=150), 4, 'raise it to')])
def test_too_many_processes_are_refused_with_a_remedy(cached, changes, world, says):
    with pytest.raises(UserError, match=says): BatchStream(*dataset_of(cached, **changes), 0, world)


# ---- batches by frames

@pytest.mark.parametrize('r', [1, 3, 4])
@pytest.mark.parametrize('budget', [300, 700, 5000])
def test_a_budget_is_kept_after_padding_and_every_clip_is_used(cached, r, budget, caplog):
    dataset, hp = dataset_of(cached, batch_frames=budget, n_frames_per_step=r)
    stream, seen = BatchStream(dataset, hp), []
    for _ in range(len(stream)):
        batch = next(stream)
        seen += batch.ids
        assert batch.mel.shape[0] * batch.mel.shape[2] <= budget or len(batch) == 1
    assert len(seen) == len(set(seen)) >= len(dataset) - 1 and stream.cost.largest <= max(budget, max(dataset.lengths) + r)


def test_a_clip_longer_than_the_budget_is_said_once_and_trained_on(cached, caplog):
    longest = max(range(len(cached)), key=lambda i: cached.n_frames[i])
    dataset, hp = dataset_of(cached, n_validation=1, batch_frames=int(cached.n_frames[longest]) - 1)
    if longest not in dataset.indices: dataset = TTSDataset(cached, range(len(cached)), hp)
    with caplog.at_level(logging.WARNING): stream = BatchStream(dataset, hp)
    assert len(caplog.records) == 1 and 'a batch of its own' in caplog.text
    assert cached.ids[longest] in [i for _ in range(len(stream)) for i in next(stream).ids]


def test_a_budget_resumes_and_another_one_starts_the_epoch_again(cached, caplog):
    dataset, hp = dataset_of(cached, batch_frames=500)
    stream = BatchStream(dataset, hp)
    for _ in range(len(stream) + 2): next(stream)
    again = BatchStream(dataset, hp)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert all(same(next(again), next(stream)) for _ in range(9)) and not caplog.records
    for changes in (dict(batch_frames=600), dict(batch_frames=0)):
        other = BatchStream(dataset, dataclasses.replace(hp, **changes))
        other.load_state_dict(stream.state_dict())
        assert other.place == Place(stream.epoch) and caplog.records.pop()


def test_pools_and_budgets_cost_what_is_published():
    lengths = np.random.default_rng(0).integers(100, 870, 4000).tolist()
    order, pooled, budget = (epoch_cost(p, lengths) for p in (plan_epoch(lengths, 32, 1, 0, 0), plan_epoch(lengths, 32, 32, 0, 0), plan_frames(lengths, 15520, 32, 0, 0)))
    assert order.waste > 0.35 and pooled.waste < 0.03 and budget.waste < 0.04 and pooled.steps < 0.62 * order.steps
    assert order.clips == pooled.clips == budget.clips == 4000 and budget.largest <= 15520


def test_looking_ahead_does_not_move(cached):
    order = BatchOrder(cached.n_frames.tolist(), cached.hp)
    place, passed = Place(), []
    for _ in range(40):
        clips, place = order.after(place)
        passed.append(clips)
    assert [order.after(Place(0, k))[0] for k in range(3)] == passed[:3] and place.epoch >= 5


# ---- mels computed as they are needed

def test_mels_from_sound_are_those_of_the_cache(cached, tiny_corpus, tmp_path):
    hp = dataclasses.replace(cached.hp, cache_mels=False)
    lean = build_features(read_corpus(tiny_corpus, hp), hp, tmp_path)
    assert [p.name for p in tmp_path.rglob('*') if p.is_file()] == ['index.json']
    assert (lean.mel_mean, lean.mel_std, lean.key) == (cached.mel_mean, cached.mel_std, cached.key)
    one, two = (BatchStream(*dataset_of(f)) for f in (cached, lean))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(same(next(one), next(two)) for _ in range(12))
    finally: torch.set_num_threads(before)


def test_real_speech_from_sound_is_that_of_the_cache(shared_data, tmp_path):
    hp = tiny_hparams(n_mels=80)
    corpus = read_corpus(shared_data / 'ljspeech-mini', hp)
    kept, lean = (build_features(corpus, dataclasses.replace(hp, cache_mels=c), tmp_path / str(c)) for c in (True, False))
    assert all(np.array_equal(kept.mel(i), lean.mel(i)) for i in range(0, 24, 3))


@pytest.mark.parametrize('spoil', ['mels.npy', 'index.json'])
def test_a_damaged_cache_is_said_and_made_again(cached, tiny_corpus, tmp_path, spoil, caplog):
    corpus = read_corpus(tiny_corpus, cached.hp)
    folder = build_features(corpus, cached.hp, tmp_path).folder
    raw = bytearray((folder / spoil).read_bytes())
    raw[len(raw) // 2] ^= 4
    (folder / spoil).write_bytes(raw)
    again = build_features(corpus, cached.hp, tmp_path)
    assert 'damaged' in caplog.text and all(np.array_equal(again.mel(i), cached.mel(i)) for i in range(len(cached)))


def test_a_damaged_file_of_mels_does_not_matter_where_none_is_read(cached, tiny_corpus, tmp_path, caplog):
    corpus = read_corpus(tiny_corpus, cached.hp)
    (build_features(corpus, cached.hp, tmp_path).folder / 'mels.npy').write_bytes(b'')
    lean = build_features(corpus, dataclasses.replace(cached.hp, cache_mels=False), tmp_path)
    assert not caplog.records and np.array_equal(lean.mel(3), cached.mel(3))


def test_mixed_sample_rates_are_said_once_and_heard_alike(tmp_path):
    hp, rates = tiny_hparams(trim_db=0), (8000, 16000, 22050, 44100, 48000, 44100)
    sound = lambda rate: 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(1.5 * rate)) / rate) * np.hanning(int(1.5 * rate))
    (tmp_path / 'c' / 'wavs').mkdir(parents=True)
    for i, rate in enumerate(rates): sf.write(tmp_path / 'c' / 'wavs' / f'a{i}.wav', sound(rate), rate, subtype='FLOAT' if i < 5 else 'PCM_24')
    (tmp_path / 'c' / 'metadata.csv').write_text(''.join(f'a{i}|some words number {i}\n' for i in range(len(rates))))
    corpus = read_corpus(tmp_path / 'c', hp)
    assert [n for n in corpus.notes if 'sample rates' in n] == [
        'The clips have 5 sample rates (1 at 8000 Hz, 1 at 16000 Hz, 1 at 22050 Hz, 2 at 44100 Hz, 1 at 48000 Hz); all are brought to 22050 Hz.']
    features, wanted = build_features(corpus, hp, tmp_path / 'cache'), MelSpectrogram(hp)(sound(22050).astype(np.float32))
    loud = wanted.max(axis=1) > -4
    for i in range(len(rates)):
        mel = features.mel(i)
        assert abs(len(mel) - len(wanted)) <= 1 and np.abs(mel[:len(loud)][loud[:len(mel)]].max(1) - wanted[loud][:len(mel)].max(1)).max() < 0.02


# ---- workers

def test_resume_in_the_middle_of_an_epoch_with_workers_is_bitwise(cached, tiny_corpus, tmp_path):
    hp = dataclasses.replace(cached.hp, cache_mels=False, loader_workers=2, batch_size=3)
    features = build_features(read_corpus(tiny_corpus, hp), hp, tmp_path)
    dataset = TTSDataset(features, split(features, hp)[0], hp)
    plain, ahead = BatchStream(dataset, hp), open_stream(dataset, hp)
    for _ in range(9): assert same(next(plain), next(ahead)) and plain.state_dict() == ahead.state_dict() and plain.progress == ahead.progress
    state = json.loads(json.dumps(ahead.state_dict()))
    ahead.close()
    resumed = PreparedStream(dataset, hp)
    resumed.load_state_dict(state)
    assert all(same(next(plain), next(resumed)) for _ in range(9))
    pids = [w.__self__.process.pid for _, w in resumed._makers]
    resumed.load_state_dict(state)  # back, with batches under way
    assert resumed.state_dict() == state
    dead = resumed._makers[1][1].__self__.process
    dead.kill()
    taken, began = 0, time.monotonic()
    with pytest.raises(TTSTunerError, match='SIGKILL.*--resume'):
        while True: next(resumed); taken += 1
    assert time.monotonic() - began < 10 and taken <= 5
    again = BatchStream(dataset, hp)
    again.load_state_dict(resumed.state_dict())
    reached = BatchStream(dataset, hp)
    reached.load_state_dict(state)
    for _ in range(taken): next(reached)
    assert same(next(again), next(reached))
    assert not any(Path(f'/proc/{p}').exists() for p in pids) or not Path('/proc').exists()


GROUP = """
import os, signal, sys, time; sys.path.insert(0, sys.argv[3])
from helpers import tiny_hparams
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import build_features
from tts_tuner.data.loader import TTSDataset, split
from tts_tuner.data.workers import open_stream
heard = []
for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, lambda n, _: heard.append(n))
hp = tiny_hparams(loader_workers=1)
f = build_features(read_corpus(sys.argv[1], hp), hp, sys.argv[2])
stream = open_stream(TTSDataset(f, split(f, hp)[0], hp), hp)
for _ in range(3): next(stream)
print(stream._makers[0][1].__self__.process.pid, flush=True)
while len(heard) < 2: time.sleep(0.01)
for _ in range(9): next(stream)
print(stream.state_dict()['position'], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_signals_for_the_group_leave_the_worker_and_it_does_not_outlive_the_trainer(tiny_corpus, tmp_path):
    command = [sys.executable, '-c', GROUP, str(tiny_corpus), str(tmp_path), str(Path(__file__).parent)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    worker = int(trainer.stdout.readline())
    os.kill(worker, 0)
    for s in (signal.SIGINT, signal.SIGTERM):
        os.killpg(trainer.pid, s)
        os.kill(worker, s)  # as a scheduler does that signals every process of a job
        time.sleep(0.1)
    assert int(trainer.stdout.readline()) == 2 and trainer.wait(30) == -signal.SIGKILL
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try: os.kill(worker, 0)
        except ProcessLookupError: return
        if Path(f'/proc/{worker}/stat').exists() and Path(f'/proc/{worker}/stat').read_text().rsplit(')', 1)[1].split()[0] == 'Z': return
        time.sleep(0.05)
    raise AssertionError('the worker is still there')


def test_a_batch_that_cannot_be_made_is_a_sentence_and_the_place_is_kept(cached, tmp_path):
    hp = dataclasses.replace(cached.hp, cache_mels=False)
    root = make_tiny_corpus(tmp_path / 'c', n=6)
    features = build_features(read_corpus(root, hp), hp, tmp_path / 'cache')
    dataset = TTSDataset(features, range(6), hp)
    stream = PreparedStream(dataset, dataclasses.replace(hp, batch_size=3), pin=False)  # one thread, no processes
    next(stream)
    state = stream.state_dict()
    for path in features.paths: path.rename(path.with_suffix('.aside'))
    with pytest.raises(TTSTunerError, match='sound file'):  # gone before it was opened, or while
        for _ in range(4): state = stream.state_dict(); next(stream)
    assert stream.state_dict() == state
    for path in features.paths: path.with_suffix('.aside').rename(path)
    expected = BatchStream(dataset, stream.hp)
    expected.load_state_dict(state)
    assert same(next(stream), next(expected))
    stream.close()


def test_a_worker_that_cannot_start_says_so(monkeypatch, cached):
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    dataset, hp = dataset_of(cached, loader_workers=1)
    stream = open_stream(dataset, hp)
    with pytest.raises(TTSTunerError, match='exit code 1'): next(stream)
    assert stream.place == Place()
