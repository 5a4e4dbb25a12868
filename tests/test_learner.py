"Steps that are hard to take: in half precision, in pieces, without the memory for them, with gradients that jump"
import csv
import dataclasses
import gc
import math

import pytest
import torch
from helpers import tiny_hparams

from tts_tuner.config.errors import TTSTunerError
from tts_tuner.control.relief import ReliefRule, ReliefState, relieve
from tts_tuner.data.loader import Batch
from tts_tuner.training import memory
from tts_tuner.training.checkpoint import load_checkpoint, save_checkpoint
from tts_tuner.training.distributed import rehearse
from tts_tuner.training.guard import NonFinite
from tts_tuner.training.learner import Learner, lr_at, prepare_machine
from tts_tuner.training.memory import cap_memory, free_memory, padded_frames
from tts_tuner.training.precision import LossScale, usable_precision

STILL = dict(prenet_dropout=0, encoder_dropout=0, postnet_dropout=0, attention_dropout=0, dropout_decoder=0)


def settings(**changes): return dataclasses.replace(tiny_hparams(**changes), n_symbols=9)


def make_batch(seed=0, lengths=(24, 17, 9, 20), frames=None, n_mels=20, r=4):
    "Noise to be learned by heart"
    draw, m = torch.Generator().manual_seed(seed), torch.tensor(lengths)
    T, n = frames or -(-max(lengths) // r) * r, torch.randint(3, 7, (len(lengths),), generator=draw)
    n[0] = 6
    text = torch.randint(2, 9, (len(m), 6), generator=draw).masked_fill(torch.arange(6) >= n[:, None], 0)
    mel = torch.randn(len(m), n_mels, T, generator=draw).masked_fill(torch.arange(T) >= m[:, None, None], 0)
    gate = (torch.arange(T // r) >= (-(-m // r) - 1)[:, None]).float()
    return Batch(text, n, mel, m, gate, [f'{seed}-{i}' for i in range(len(m))])


def learner(hp=None, **changes):
    hp = hp or settings(**changes)
    prepare_machine(hp)
    return Learner(hp)


def weights_of(learner): return {k: v.clone() for k, v in learner.model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def gradient(learner, batches):
    learner.gradients(batches)
    return torch.cat([w.grad.flatten() for w in learner.model.parameters()])


# Precision


def has_bf16(monkeypatch, answer):
    for module in ('model.products', 'training.precision'): monkeypatch.setattr(f'tts_tuner.{module}.has_bf16', lambda kind: answer)


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precision_learns_like_full(monkeypatch, precision):
    has_bf16(monkeypatch, True)
    full, half = learner(**STILL), learner(precision=precision, **STILL)
    batch = make_batch()
    a, b = ([float(x.learn(batch)['train_loss']) for _ in range(12)] for x in (full, half))
    assert a != b and a[0] == pytest.approx(b[0], rel=5e-3) and a[-1] == pytest.approx(b[-1], rel=5e-2) and b[-1] < 0.9 * b[0]
    assert {v.dtype for v in half.model.parameters()} == {v.dtype for v in half.optimizer.mean.values()} == {torch.float32}


def test_without_instructions_for_bf16_products_stay_in_fp32_and_that_is_said(monkeypatch):
    has_bf16(monkeypatch, False)
    full, found = learner(), learner(precision='bf16')
    assert len(found.notes) == 1 and 'no bf16 instructions' in found.notes[0] and not full.notes
    batch, losses = make_batch(), []
    for x in (full, found):
        prepare_machine(x.hp)
        losses.append([float(x.learn(batch)['train_loss']) for _ in range(2)])
    assert losses[0] == losses[1]
    has_bf16(monkeypatch, True)
    assert usable_precision('bf16', 'cpu') == ('bf16', None) and usable_precision('fp16', 'cpu')[0] == 'fp16'


def test_overflow_skips_the_step_and_halves_the_scale():
    found, batch = learner(precision='fp16'), make_batch()
    found.scaler.scale = torch.tensor(LossScale.TOP)
    before, moments = weights_of(found), {k: v.clone() for k, v in found.optimizer.mean.items()}
    numbers = found.learn(batch)
    parameters = dict(found.model.named_parameters())
    assert all(torch.equal(before[k], w) for k, w in parameters.items()) and same(moments, found.optimizer.mean) and found.optimizer.count == 0
    assert (float(numbers['loss_scale']), float(numbers['overflows']), float(numbers['grad_norm']), found.step) == (LossScale.TOP / 2, 1, 0, 1)
    for _ in range(12): numbers = found.learn(batch)
    assert found.optimizer.count == 13 - float(numbers['overflows']) > 0 and 0 < float(numbers['grad_norm']) < 100
    assert not same(before, weights_of(found))


def test_overflow_at_the_floor_says_what_to_do(monkeypatch):
    found, clip = learner(precision='fp16'), torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', lambda weights, most: clip(weights, most) * math.inf)
    for _ in range(16): assert found.learn(make_batch())['grad_norm'] == 0
    assert found.scaler.scale == 1
    before = weights_of(found)
    with pytest.raises(NonFinite, match='loss scale of 1; resume with precision=bf16'): found.learn(make_batch())
    assert same(before, weights_of(found)) and found.step == 16


def test_a_clip_too_large_for_fp16_is_named_at_once():
    batch = make_batch()
    batch.mel[2] *= 1e7
    found = learner(precision='fp16')
    with pytest.raises(NonFinite) as e: found.learn(batch)
    assert e.value.report.blamed == ('0-2',) and found.step == 0 and 'loss' in str(e.value)


def test_resume_with_scaler_is_bit_for_bit(tmp_path):
    "Dropout is on and the scale overflows and grows on the way, before and after the pause"
    def begin():
        found = learner(precision='fp16', prenet_dropout=0.5)
        found.scaler.EVERY, found.scaler.scale = 3, torch.tensor(LossScale.TOP)
        return found
    whole = begin()
    numbers = [{k: float(v) for k, v in whole.learn(make_batch(t)).items()} for t in range(16)]
    half = begin()
    for t in range(7): half.learn(make_batch(t))
    save_checkpoint(tmp_path / 'a.pt', dict(half.state(), rng=torch.get_rng_state()))
    state, rest = load_checkpoint(tmp_path / 'a.pt'), learner(precision='fp16', prenet_dropout=0.5)
    rest.scaler.EVERY = 3
    rest.load(state)
    torch.set_rng_state(state['rng'])
    assert [{k: float(v) for k, v in rest.learn(make_batch(t)).items()} for t in range(7, 16)] == numbers[7:]
    assert same(weights_of(whole), weights_of(rest)) and rest.scaler.state_dict() == whole.scaler.state_dict()
    scales = [n['loss_scale'] for n in numbers]
    assert any(b > a for a, b in zip(scales[7:], scales[8:])) and numbers[-1]['overflows'] > numbers[6]['overflows'] > 0


def test_checkpoints_without_the_newer_parts_load():
    first = learner()
    first.learn(make_batch())
    old = {k: v for k, v in first.state().items() if k in ('step', 'model', 'optimizer')}
    for precision in ('fp32', 'fp16'):
        found = learner(precision=precision)
        found.load(old)
        assert found.step == 1 and same(weights_of(first), weights_of(found)) and math.isfinite(found.learn(make_batch())['train_loss'])
    other = learner(precision='fp16')
    other.learn(make_batch())
    first.load(other.state())  # and the other way round: a scaler nobody needs any more
    assert first.scaler is None and first.step == 1


def test_broken_steps_do_not_reach_the_moments():
    "As on a GPU, where the look comes after the step"
    found = learner()
    found.watch.every = 10
    for t in range(3): found.learn(make_batch(t))
    bad = make_batch(3)
    bad.mel[1, 0, 0] = math.nan
    with pytest.raises(NonFinite) as e:
        for t in range(3, 10): found.learn(bad if t == 3 else make_batch(t))
    assert (e.value.report.step, e.value.report.blamed, found.step) == (3, ('3-1',), 0)
    state = found.state()
    assert all(bool(torch.isfinite(v).all()) for part in (state['model'], *(state['optimizer'][k] for k in ('mean', 'square'))) for v in part.values())


# Accumulation


@pytest.mark.parametrize('reduction', ['masked', 'padded'])
def test_several_batches_are_one_large_batch(reduction):
    "In float64 and with batch normalisation frozen nothing is left but rounding"
    whole = make_batch(0, (24, 17, 9, 20, 13, 5), frames=24)
    whole.mel, whole.gate = whole.mel.double(), whole.gate.double()
    pieces = memory.cut(whole, 3)
    found = learner(loss_reduction=reduction, **STILL)
    found.model.double().eval()
    together, added = gradient(found, [whole]), gradient(found, pieces)
    torch.testing.assert_close(together, added, rtol=1e-9, atol=1e-12)
    blind = torch.stack([gradient(found, [p]) for p in pieces]).mean(0)
    assert (blind - together).norm() > 1e-3 * together.norm() or reduction == 'padded', 'clips of other lengths: means must not be averaged'
    one, several = found.gradients([whole]), found.gradients(pieces)
    assert all(torch.allclose(one[k], several[k], rtol=1e-12) for k in one)
    found.model.train()
    assert not torch.allclose(gradient(found, [whole]), gradient(found, pieces), rtol=1e-3), 'batch normalisation sees the pieces'


def test_accumulation_makes_one_step():
    found = learner()
    numbers = found.learn([make_batch(0), make_batch(1)])
    assert found.step == 1 and found.optimizer.count == 1 and math.isclose(
        numbers['train_loss'], sum(numbers[k] for k in ('mel_loss', 'mel_postnet_loss', 'gate_loss', 'guided_loss')), rel_tol=1e-5)
    bad = make_batch(1)
    bad.mel[3] = math.inf
    with pytest.raises(NonFinite) as e: found.learn([make_batch(0), bad])
    assert e.value.report.blamed == ('1-3',) and len(e.value.report.batch) == 8


# Memory


def shrink(monkeypatch, found, frames):
    "Let the model run out of memory above so many padded frames at once, after it has drawn and normalised"
    model, sizes = type(found.model).forward, []

    def forward(self, text, text_lengths, mel, mel_lengths):
        out = model(self, text, text_lengths, mel, mel_lengths)
        sizes.append(len(text) * mel.shape[2])
        if sizes[-1] > frames: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB')
        return out
    monkeypatch.setattr(found.model, 'forward', forward.__get__(found.model))
    return sizes


def test_a_batch_that_does_not_fit_is_cut(monkeypatch):
    tight, knowing = learner(), learner()
    batches = [make_batch(t) for t in range(4)]
    sizes = shrink(monkeypatch, tight, 50)
    prepare_machine(tight.hp)
    a = [float(tight.learn(b)['train_loss']) for b in batches]
    assert sizes[:3] == [96, 24 * 2, 24 * 2] and max(sizes[1:]) <= 50, 'it fails once'
    assert [(c.parameter, c.old, c.new, c.when) for c in tight.changes] == [('fit_batch', 96, 48, 1)] and 'did not fit' in tight.changes[0].why
    knowing.fit.bound.limit = 48
    prepare_machine(tight.hp)
    assert a == [float(knowing.learn(b)['train_loss']) for b in batches]
    assert same(weights_of(tight), weights_of(knowing)), 'the failed attempt leaves no trace'
    again = learner()
    again.load(tight.state())
    assert again.fit.bound.limit == 48
    elsewhere = learner(precision='bf16')
    elsewhere.load(tight.state())
    assert elsewhere.fit.bound.limit == 0, 'other settings, other bounds'


def test_a_clip_that_does_not_fit_alone(monkeypatch):
    found = learner()
    found.learn(make_batch())
    sizes, before = shrink(monkeypatch, found, 20), weights_of(found)
    with pytest.raises(TTSTunerError, match='The clip 1-0 of 24 frames does not fit into memory even by itself; .*gradient_checkpointing') as e: found.learn(make_batch(1))
    assert e.value.exit_code == 1 and sizes == [96, 48, 24] and same(before, weights_of(found)) and found.step == 1
    monkeypatch.undo()
    found.learn(make_batch(1))
    assert found.step == 2, 'the state can be gone on with'


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    found = learner()
    with pytest.raises(RuntimeError, match='Sizes of tensors'): found.learn(dataclasses.replace(make_batch(), mel=torch.randn(4, 19, 24)))
    fixed = learner(fit_batch=False)
    shrink(monkeypatch, fixed, 50)
    with pytest.raises(torch.OutOfMemoryError): fixed.learn(make_batch())


def test_ranks_cut_alike_and_end_alike():
    "One of two ranks has less memory; in trials, so that none is left waiting in the middle of a step"
    def work(group):
        found = Learner(settings(**STILL), group=group)
        found.fit.rehearse = True
        model, sizes = found.model.forward, []

        def forward(text, text_lengths, mel, mel_lengths):
            sizes.append(len(text) * mel.shape[2])
            if sizes[-1] > (30 if group.rank else 1000) and not group.together: raise torch.OutOfMemoryError('none left')
            return model(text, text_lengths, mel, mel_lengths)
        found.model.forward = forward
        numbers = [float(found.learn(make_batch(10 * t + group.rank, (24, 17, 9, 20)))['train_loss']) for t in range(3)]
        return numbers, weights_of(found), [c.new for c in found.changes], sizes[-4:]

    one, two = rehearse(2, work)
    assert one[0] == two[0] and one[2] == two[2] == [48, 24] and one[3] == two[3] == [24] * 4
    assert all(torch.equal(one[1][k], two[1][k]) for k in one[1] if 'num_batches' not in k)


def test_ranks_tell_each_other_whose_clip_is_broken():
    def work(group):
        found, batch = Learner(settings(**STILL), group=group), make_batch(group.rank)
        if group.rank: batch.mel[2] = math.inf
        with pytest.raises(NonFinite) as e: found.learn(batch)
        return e.value.report
    one, two = rehearse(2, work)
    assert one.words() == two.words() and one.blamed == ('1-2',) and len(one.batch) == 8


def test_share_of_the_gpu(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, 'set_per_process_memory_fraction', lambda *a: said.append(a))
    cap_memory('cpu', 0.5)
    cap_memory('cuda:1', 0.25)
    assert said == [(0.25, torch.device('cuda:1'))]


def test_moments_in_main_memory_give_the_same_numbers():
    a, b = learner(), learner(cpu_offload=True)
    for found in (a, b):
        prepare_machine(found.hp)
        for t in range(3): found.learn(make_batch(t))
    assert same(weights_of(a), weights_of(b)) and b.optimizer.device.type == 'cpu'


def test_memory_is_flat_over_ten_trials():
    def count():
        free_memory()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    found = []
    for seed in range(10):
        trial = learner(seed=seed)
        for t in range(2): trial.learn(make_batch(t))
        trial.changes.append(trial)  # a circle, as a careless user makes one
        del trial
        found.append(count())
    assert len(set(found[1:])) == 1, found


# Relief


def streams(folder):
    "Gradient norms of recorded runs by name"
    for path in sorted((folder / 'curves' / 'tacotron2').glob('*.csv')):
        with open(path) as f: yield path.stem, [float(row['grad_norm']) for row in csv.DictReader(f) if row['grad_norm']]


def easings(norms, rule=ReliefRule()):  # noqa: B008
    state, found = ReliefState(), []
    for t, norm in enumerate(norms):
        state, change = relieve(state, t, norm, rule)
        if change and change.new < change.old: found.append(t)
    return found


def test_healthy_runs_are_left_alone(shared_data):
    runs = dict(streams(shared_data))
    healthy = {name: norms for name, norms in runs.items() if '_nan_' not in name}
    assert sum(map(len, healthy.values())) > 6000 and {name: e for name, norms in healthy.items() if (e := easings(norms))} == {}
    assert easings(runs['B_nan_lr100']), 'the one that exploded is not'


def test_spikes_put_into_recorded_runs_are_found(shared_data):
    late = []
    for norms in (n for _, n in streams(shared_data) if len(n) >= 150):
        typical = sorted(norms[40:100])[30]
        found = easings([20 * typical if 100 <= t < 130 and t % 5 == 0 else x for t, x in enumerate(norms[:150])])
        late.append(found[0] - 100 if found else math.inf)
    assert len(late) >= 15 and sorted(late)[-1] <= 15, late


def test_relief_changes_the_step_and_says_so():
    found = learner(lr_relief=True, **STILL)
    found.relief = ReliefState(norms=(1e-6,) * 30, spikes=(0, 0, 0))
    found.learn(make_batch())
    numbers = found.learn(make_batch())
    assert numbers['lr_relief'] == 0.5 and numbers['learning_rate'] == 0.5 * lr_at(1, found.hp)
    assert [(c.parameter, c.old, c.new, c.when) for c in found.changes] == [('lr_relief', 1.0, 0.5, 2)]
    fixed = learner(lr_relief=False, **STILL)
    fixed.relief = found.relief._replace(share=1.0)
    for _ in range(3): assert 'lr_relief' not in fixed.learn(make_batch())
    assert not fixed.changes


@pytest.mark.parametrize('every', [1, 10])
def test_relief_does_not_depend_on_when_the_run_was_stopped(every):
    "On a GPU norms are looked at every few steps, and a pause looks in between"
    def go(found, steps, stops=()):
        found.watch.every, out = every, []
        for _ in range(steps):
            out.append(found.learn(make_batch(found.step % 3))['learning_rate'])
            if found.step in stops: found.look()
        return out
    start = ReliefState(norms=(1e-6,) * 100, spikes=())
    whole = learner(lr_relief=True, **STILL)
    whole.relief = start
    rates = go(whole, 24)
    half = learner(lr_relief=True, **STILL)
    half.relief = start
    first = go(half, 7, stops=(3,))
    half.look()
    rest = learner(lr_relief=True, **STILL)
    rest.load(half.state())
    assert first + go(rest, 17, stops=(13,)) == rates
    assert rest.relief == whole.relief and whole.relief.share < 1


def test_padded_frames_count_rows_and_length():
    assert padded_frames(make_batch()) == 96
