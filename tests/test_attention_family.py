"""Four kinds of attention behind one protocol, and four kinds of noise: in the whole model, in training and in speaking."""
from types import SimpleNamespace

import pytest
import torch

from tts_tuner.config.errors import UserError
from tts_tuner.config.hparams import create_hparams, to_dict
from tts_tuner.model.attention import window_mask
from tts_tuner.model.attention_family import ATTENTIONS, create_attention, when_speaking
from tts_tuner.model.layers import dropout_mask, length_mask
from tts_tuner.model.losses import Tacotron2Loss
from tts_tuner.model.regularise import draw_noise, spectral_mask
from tts_tuner.model.tacotron2 import Tacotron2
from tts_tuner.text.symbols import SymbolTable
from tts_tuner.training.warm_start import check_architecture

KINDS = tuple(ATTENTIONS)
NOISES = ('dropout', 'output', 'variational', 'zoneout')
TINY = dict(n_symbols=20, n_mels=8, symbols_embedding_dim=12, encoder_embedding_dim=12, attention_rnn_dim=14, decoder_rnn_dim=16, prenet_dim=10,
    postnet_embedding_dim=10, attention_dim=8, attention_location_n_filters=3, attention_location_kernel_size=7, attention_dynamic_n_filters=3,
    attention_dynamic_kernel_size=7, n_frames_per_step=2)
STILL = dict(prenet_dropout=0.0, encoder_dropout=0.0, postnet_dropout=0.0, attention_dropout=0.0, dropout_decoder=0.0)


def tiny(**overrides): return create_hparams('small', {**TINY, **STILL, **overrides})


def make(hp, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return Tacotron2(hp).to(dtype)


def make_batch(hp, lengths=((6, 17), (9, 30), (4, 8)), dtype=torch.float64):
    "Not sorted by length, padded in text and mel"
    g, r = torch.Generator().manual_seed(1), hp.n_frames_per_step
    n, m = torch.tensor(lengths).T
    N, T = int(n.max()), -(-int(m.max()) // r) * r
    text = torch.randint(2, hp.n_symbols, (len(n), N), generator=g).masked_fill(torch.arange(N) >= n[:, None], 0)
    mel = torch.randn(len(n), hp.n_mels, T, generator=g, dtype=dtype).masked_fill(torch.arange(T) >= m[:, None, None], 0)
    gate = (torch.arange(T // r) >= (-(-m // r) - 1)[:, None]).to(dtype)
    return SimpleNamespace(text=text, text_lengths=n, mel=mel, mel_lengths=m, gate=gate)


def run(model, batch): return model(batch.text, batch.text_lengths, batch.mel, batch.mel_lengths)


def walk(attention, values, mask, queries, **how):
    "Rows [S, B, N] and the last state"
    memory = attention.prepare(values, mask)._replace(**how)
    state, rows = attention.start(memory), []
    for query in queries:
        state = attention(query, state, memory)
        rows.append(state.weights)
    return torch.stack(rows), state


@pytest.fixture
def scene():
    torch.manual_seed(2)
    return torch.randn(3, 15, 12).double(), torch.tensor([15, 8, 1]), torch.randn(20, 3, 14).double()


def each(hp=TINY): return {kind: create_attention(create_hparams('small', {**TINY, 'attention': kind})).double().eval() for kind in KINDS}


@pytest.mark.parametrize('kind', KINDS)
def test_protocol(kind, scene):
    values, lengths, queries = scene
    attention, mask = each()[kind], length_mask(lengths, 15)
    rows, state = walk(attention, values, mask, queries)
    torch.testing.assert_close(rows.sum(2), torch.ones(20, 3).double())
    assert (rows >= 0).all() and (rows.masked_select(~mask) == 0).all()
    torch.testing.assert_close(state.context, (state.weights[..., None] * values).sum(1))
    torch.testing.assert_close(state.cumulative, rows.sum(0) + attention.start(attention.prepare(values, mask)).cumulative)
    alone, _ = walk(attention, values[1:2, :8], mask[1:2, :8], queries[:, 1:2])
    torch.testing.assert_close(alone[:, 0], rows[:, 1, :8])
    order = torch.tensor([2, 0, 1])
    turned, _ = walk(attention, values[order], mask[order], queries[:, order])
    torch.testing.assert_close(turned, rows[:, order])
    dirty, _ = walk(attention, values + 1e6 * ~mask[..., None], mask, queries)
    torch.testing.assert_close(dirty, rows)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', [{}, dict(window=2)], ids=['open', 'window'])
def test_a_row_of_padding_harms_nobody(kind, how, scene):
    values, _, queries = scene
    attention, lengths = each()[kind], torch.tensor([15, 8, 0])
    rows, state = walk(attention, values.requires_grad_(), length_mask(lengths, 15), queries, **how)
    (state.context ** 2).sum().backward()
    assert torch.isfinite(rows).all() and torch.isfinite(values.grad).all() and all(torch.isfinite(p.grad).all() for p in attention.parameters())


@pytest.mark.parametrize('kind', KINDS)
def test_attention_stays_in_its_window(kind, scene):
    values, lengths, queries = scene
    attention, mask = each()[kind], length_mask(lengths, 15)
    rows, _ = walk(attention, values, mask, queries, window=2)
    before = torch.cat([torch.zeros(1, 3, dtype=torch.long), rows.argmax(2)[:-1]])
    near = (torch.arange(15) - before[..., None]).abs() <= 2
    assert (rows.masked_select(~(near & mask)) == 0).all()
    torch.testing.assert_close(rows.sum(2), torch.ones(20, 3).double())
    wide, _ = walk(attention, values, mask, queries, window=15)
    torch.testing.assert_close(wide, walk(attention, values, mask, queries)[0])  # a window that sees all changes nothing


@pytest.mark.parametrize('kind', KINDS)
def test_one_symbol(kind):
    hp = tiny(attention=kind, attention_prior_length=1, attention_window=1)
    model, batch = make(hp).eval(), make_batch(hp, lengths=((1, 4),))
    out = run(model, batch)
    assert (out.alignments == 1).all() and torch.isfinite(Tacotron2Loss(hp)(out, batch).total)
    assert (model.infer(batch.text, batch.text_lengths, max_steps=3).alignments == 1).all()


def test_window_starts_at_the_first_symbol():
    nowhere, mask = torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool)
    assert window_mask(nowhere, 1, mask).tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize('kind', KINDS)
def test_gradient_is_the_slope_of_the_loss(kind):
    hp = tiny(attention=kind, mel_loss='mse')
    model, batch, loss_fn = make(hp).train(), make_batch(hp), Tacotron2Loss(hp)
    model.decoder.attention_layer.noise = 0.0  # of stepwise attention
    torch.manual_seed(5)
    direction, eps = [torch.randn_like(p) for p in model.parameters()], 1e-6
    loss_fn(run(model, batch), batch).total.backward()
    by_autograd = sum((p.grad * d).sum() for p, d in zip(model.parameters(), direction)).item()

    def moved(size):
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction): p.add_(d, alpha=size)
            value = loss_fn(run(model, batch), batch).total.item()
            for p, d in zip(model.parameters(), direction): p.sub_(d, alpha=size)
        return value

    assert by_autograd == pytest.approx((moved(eps) - moved(-eps)) / (2 * eps), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('path', ['fast', 'lean'])
@pytest.mark.parametrize('noise', NOISES)
def test_paths_agree(kind, path, noise):
    "Outputs and gradients of both ways with the same draws, for each attention under each noise"
    hp = tiny(attention=kind, recurrent_regulariser=noise, attention_dropout=0.2, dropout_decoder=0.3, spectral_dropout=0.2)
    model, batch, results = make(hp).train(), make_batch(hp), []
    for model.decoder.path in ('plain', path):
        model.zero_grad()
        torch.manual_seed(7)
        out = run(model, batch)
        Tacotron2Loss(hp)(out, batch).total.backward()
        results.append([*(o.detach() for o in out), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results): assert (a - b).norm() <= 1e-9 * a.norm() + 1e-12


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('noise', ['dropout', 'zoneout'])
def test_speaking_and_teacher_forcing_are_the_same_decoder(kind, noise):
    "Fed its own frames, the teacher-forced decoder repeats what was spoken; zoneout speaks by its expectation"
    hp = tiny(attention=kind, recurrent_regulariser=noise, attention_dropout=0.2, dropout_decoder=0.3, gate_threshold=0.99)
    model, batch = make(hp).eval(), make_batch(hp)
    with torch.no_grad(): model.decoder.gate_layer.linear_layer.bias.fill_(-50)
    spoken = model.infer(batch.text, batch.text_lengths, max_steps=8)
    out = model(batch.text, batch.text_lengths, spoken.mel, torch.full((3,), spoken.mel.shape[2]))
    for ours, name in zip(out, ('mel', 'mel_postnet', 'gate', 'alignments')): torch.testing.assert_close(ours, getattr(spoken, name))


@pytest.mark.parametrize('kind', KINDS)
def test_window_holds_in_speaking_and_not_in_training(kind):
    narrow, free = tiny(attention=kind, attention_window=1), tiny(attention=kind)
    batch, models = make_batch(free), [make(hp).eval() for hp in (narrow, free)]
    torch.testing.assert_close(*(run(model, batch).alignments for model in models))
    with torch.no_grad(): models[0].decoder.gate_layer.linear_layer.bias.fill_(-50)
    spoken = models[0].infer(batch.text, batch.text_lengths, max_steps=10).alignments
    assert ((spoken > 0).sum(2) <= 3).all()


def test_hard_decisions_are_for_speaking():
    hp = tiny(attention='stepwise', attention_hard=True)
    model, batch = make(hp).eval(), make_batch(hp)
    assert ((run(model, batch).alignments > 0).sum(2) > 1).any()
    with torch.no_grad(): model.decoder.gate_layer.linear_layer.bias.fill_(-50)
    spoken = model.infer(batch.text, batch.text_lengths, max_steps=10).alignments
    assert set(spoken.unique().tolist()) == {0.0, 1.0} and (spoken.argmax(2).diff(dim=1) >= 0).all() and (spoken.argmax(2).diff(dim=1) <= 1).all()


def test_nothing_of_it_is_on_unless_asked_for():
    for preset in ('default', 'paper', 'small'):
        hp = create_hparams(preset)
        memory = create_attention(hp).prepare(torch.zeros(1, 3, hp.encoder_embedding_dim), torch.ones(1, 3, dtype=torch.bool))
        assert (when_speaking(memory, hp).window, when_speaking(memory, hp).hard) == (0, False)
        assert hp.attention in ('location', 'forward') and hp.recurrent_regulariser == 'dropout' and hp.spectral_dropout == 0


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_half_precision_is_finite(kind, dtype):
    "A hundred steps there and back under mixed precision; weights are carried in single precision"
    torch.manual_seed(3)
    attention = create_attention(create_hparams('small', {**TINY, 'attention': kind}))
    with torch.autocast('cpu', dtype=dtype):
        rows, state = walk(attention, torch.randn(2, 60, 12), length_mask(torch.tensor([60, 25]), 60), torch.randn(100, 2, 14))
    (state.context.float() ** 2).sum().backward()
    assert rows.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in attention.parameters())
    torch.testing.assert_close(rows.sum(2), torch.ones(100, 2))


@pytest.mark.parametrize('kind', ['dynamic', 'stepwise'])
def test_learns_a_diagonal(kind):
    "Each symbol is a pattern that lasts two or three steps; no guide, and the peaks find the symbols"
    wide = dict(attention_rnn_dim=32, symbols_embedding_dim=16, encoder_embedding_dim=16, attention_dim=16, attention_prior_length=4)
    hp = tiny(attention=kind, guided_attention_weight=0.0, mel_loss='mse', **{**wide, 'n_frames_per_step': 1})
    model, loss_fn, g = make(hp, torch.float32), Tacotron2Loss(hp), torch.Generator().manual_seed(4)
    patterns, optimizer = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)), torch.optim.Adam(model.parameters(), 0.02)

    def draw():
        text, lasts = torch.randint(2, 20, (16, 6), generator=g), torch.randint(2, 4, (16, 6), generator=g)
        place = (torch.arange(12)[None, :, None] >= lasts.cumsum(1)[:, None]).sum(2)
        full = lambda n: torch.full((16,), n)
        mel = patterns[text.gather(1, place)].transpose(1, 2)
        return SimpleNamespace(text=text, text_lengths=full(6), mel=mel, mel_lengths=full(12), gate=torch.zeros(16, 12), place=place)

    for _ in range(80):
        batch = draw()
        optimizer.zero_grad()
        loss_fn(run(model, batch), batch).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    batch = draw()
    near = lambda m: ((run(m.eval(), batch).alignments.argmax(2) - batch.place).abs() <= 1).float().mean().item()
    assert near(model) > 0.85 > 0.75 > near(make(hp, torch.float32))
    assert torch.isfinite(model.infer(batch.text, batch.text_lengths, max_steps=5).mel).all()


def checkpoint(hp): return dict(hparams=to_dict(hp), step=7, symbols=SymbolTable.characters('en').to_dict())


def test_kinds_that_share_weights_follow_each_other_and_others_are_refused():
    table = SymbolTable.characters('en')
    for a in KINDS:
        for b in KINDS:
            there, here = tiny(attention=a), tiny(attention=b)
            if 'dynamic' in (a, b) and a != b:
                with pytest.raises(UserError, match=f'attention is {a} there and {b} here'): check_architecture(checkpoint(there), here, table, 'start anew')
                assert set(make(there).state_dict()) != set(make(here).state_dict())
            else:
                check_architecture(checkpoint(there), here, table, 'start anew')
                make(here).load_state_dict(make(there).state_dict())
    with pytest.raises(UserError, match='attention_dynamic_n_filters is 3 there and 5 here'):
        check_architecture(checkpoint(tiny(attention='dynamic')), tiny(attention='dynamic', attention_dynamic_n_filters=5), table, 'start anew')
    check_architecture(checkpoint(tiny()), tiny(attention_dynamic_n_filters=5), table, 'start anew')


def test_noise_draws_as_dropout_always_did():
    state = torch.zeros(3, 5)
    torch.manual_seed(1)
    expected = dropout_mask(state.new_empty(4, 3, 5), 0.3), dropout_mask(state.new_empty(4, 3, 5), 0.2)
    torch.manual_seed(1)
    for mask, p in zip(expected, (0.3, 0.2)): assert torch.equal(draw_noise(4, state, p).mask, mask)
    with pytest.raises(ValueError, match='no recurrent regulariser "half"'): draw_noise(4, state, 0.1, 'half')


def test_masks_of_time_and_of_bands():
    state = torch.zeros(8, 200, dtype=torch.float64)
    variational = draw_noise(30, state, 0.25, 'variational').mask
    assert variational.shape == (30, 8, 200) and (variational == variational[0]).all() and abs(variational[0].mean() - 1) < 0.05
    bands = spectral_mask(torch.zeros(30, 8, 200), 0.25)
    assert bands.shape == (8, 200) and sorted(set(bands.flatten().tolist())) == [0, pytest.approx(4 / 3)]


def test_spectral_dropout_hides_bands_from_the_decoder():
    "With every band but one hidden, what the others hold changes nothing"
    hp = tiny(spectral_dropout=0.5)
    model, batch = make(hp).train(), make_batch(hp)
    outputs = []
    for shift in (0.0, 3.0):
        torch.manual_seed(3)
        mask = spectral_mask(torch.zeros(1, 3, 8, dtype=torch.float64), 0.5)
        hidden = (mask == 0)[..., None]
        torch.manual_seed(3)  # the decoder draws the bands first
        values = torch.randn(3, 9, 12, generator=torch.Generator().manual_seed(1)).double()
        outputs.append(model.decoder(values, length_mask(batch.text_lengths, 9), batch.mel + shift * hidden)[0])
    assert hidden.any() and torch.equal(*outputs)
