"""The model's promises: gradients, parity of both decoders, batches in any order, speaking, sizes."""
from types import SimpleNamespace

import pytest
import torch

from tts_tuner.config.hparams import create_hparams
from tts_tuner.model.losses import Tacotron2Loss, guided_attention_loss
from tts_tuner.model.tacotron2 import Tacotron2

TINY = dict(n_symbols=20, n_mels=8, symbols_embedding_dim=12, encoder_embedding_dim=12, attention_rnn_dim=14, decoder_rnn_dim=16, prenet_dim=10,
    postnet_embedding_dim=10, attention_dim=8, attention_location_n_filters=3, attention_location_kernel_size=7)
STILL = dict(prenet_dropout=0.0, encoder_dropout=0.0, postnet_dropout=0.0, attention_dropout=0.0, dropout_decoder=0.0)


def tiny(preset='small', **overrides): return create_hparams(preset, {**TINY, **overrides})


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


@pytest.mark.parametrize('preset', ['small', 'default'])
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('reduction', ['masked', 'padded'])
def test_gradient_is_the_slope_of_the_loss(preset, training, reduction):
    hp = tiny(preset, **STILL, mel_loss='mse', loss_reduction=reduction, n_frames_per_step=2)
    model, batch, loss_fn = make(hp).train(training), make_batch(hp), Tacotron2Loss(hp)
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


@pytest.mark.parametrize('attention', ['location', 'forward'])
@pytest.mark.parametrize('dropout', [{}, dict(attention_dropout=0.1), dict(attention_dropout=0.1, dropout_decoder=0.2)], ids=['still', 'attention', 'both'])
def test_plain_fast_and_lean_decoder_agree(attention, dropout):
    hp = tiny(attention=attention, n_frames_per_step=2, **dropout)
    model, batch, results = make(hp).train(), make_batch(hp), []
    model.encoder.dropout = 0.0
    for path in ('plain', 'fast', 'lean'):
        model.decoder.path = path
        model.zero_grad()
        torch.manual_seed(7)
        out = run(model, batch)
        Tacotron2Loss(hp)(out, batch).total.backward()
        results.append([*(o.detach() for o in out), *(p.grad.clone() for p in model.parameters())])
    for other in results[1:]:
        for a, b in zip(results[0], other): assert (a - b).norm() <= 1e-9 * a.norm() + 1e-12


def test_rows_do_not_depend_on_neighbours_or_order():
    hp = tiny(**STILL)
    model, batch = make(hp).eval(), make_batch(hp)
    whole, order = run(model, batch), torch.tensor([2, 0, 1])
    turned = model(batch.text[order], batch.text_lengths[order], batch.mel[order], batch.mel_lengths[order])
    for a, b in zip(whole, turned): torch.testing.assert_close(a[order], b)
    n, m = int(batch.text_lengths[2]), int(batch.mel_lengths[2])
    alone = model(batch.text[2:, :n], batch.text_lengths[2:], batch.mel[2:, :, :m], batch.mel_lengths[2:])
    torch.testing.assert_close(whole.mel_postnet[2, :, :m], alone.mel_postnet[0])
    torch.testing.assert_close(whole.alignments[2, : m // hp.n_frames_per_step, :n], alone.alignments[0])


def test_padding_takes_no_part():
    hp = tiny(**STILL)
    model, batch = make(hp).train(), make_batch(hp)
    real = torch.arange(batch.mel.shape[2]) < batch.mel_lengths[:, None]
    loss = Tacotron2Loss(hp)(run(model, batch), batch)
    dirty = SimpleNamespace(**{**vars(batch), 'mel': batch.mel + 50.0 * ~real[:, None], 'text': batch.text + 3 * (batch.text == 0)})
    out = run(model, dirty)
    assert all(torch.isfinite(o).all() for o in out)
    assert (out.mel.transpose(1, 2)[~real] == 0).all() and (out.alignments[0, :, 6:] == 0).all()
    # Frames behind the end feed later steps only, and those are padding too: nothing real may move, batch statistics aside.
    still = make(hp).eval()
    torch.testing.assert_close(Tacotron2Loss(hp)(run(still, dirty), dirty).total, Tacotron2Loss(hp)(run(still, batch), batch).total)
    assert torch.isfinite(loss.total)


@pytest.mark.parametrize('reduction', ['masked', 'padded'])
def test_parts_add_up(reduction):
    hp = tiny(loss_reduction=reduction, gate_loss_weight=0.3)
    model, batch = make(hp), make_batch(hp)
    torch.manual_seed(0)
    out = run(model, batch)
    for step in (0, 150, 300):
        parts = Tacotron2Loss(hp)(out, batch, step)
        torch.testing.assert_close(parts.total, parts.mel + parts.mel_postnet + parts.gate + parts.guided)
    assert parts.guided == 0 and parts.guided_weight == 0


def test_guided_loss_knows_no_reduction_factor():
    path = torch.nn.functional.one_hot((torch.linspace(0, 1, 160) ** 1.3 * 24.99).long(), 25).double()
    one, four = (guided_attention_loss(path.view(1, -1, r, 25).mean(2), torch.tensor([25]), torch.tensor([160 // r])) for r in (1, 4))
    assert abs(one - four) < 0.002


def test_speaking_is_repeatable_and_stops_one_by_one():
    hp = tiny(max_decoder_steps=9)
    model, batch = make(hp).eval(), make_batch(hp)
    say = lambda seed, **kw: model.infer(batch.text, batch.text_lengths, generator=torch.Generator().manual_seed(seed), **kw)
    a, b, c = say(1), say(1), say(2)
    for x, y in zip(a, b): assert torch.equal(x, y)
    assert not torch.equal(a.mel, c.mel) and not a.mel.requires_grad
    model.decoder.prenet.dropout, gate = 0.0, model.decoder.gate_layer.linear_layer
    with torch.no_grad(): gate.bias.fill_(-50)
    logits = say(1).gate + 50  # nobody stops: what each gate says at each step
    first = lambda level: [next((t for t, x in enumerate(row) if x > level), len(row)) for row in logits.tolist()]
    level = max((logits.flatten() - 1e-9).tolist(), key=lambda level: len(set(first(level))))
    with torch.no_grad(): gate.bias.fill_(-level)
    spoken = say(1)
    assert len(set(spoken.steps.tolist())) > 1
    for i, (n, steps) in enumerate(zip(batch.text_lengths.tolist(), spoken.steps.tolist())):
        alone = model.infer(batch.text[i : i + 1, :n], batch.text_lengths[i : i + 1])
        frames = steps * hp.n_frames_per_step
        assert alone.steps.item() == steps and alone.stopped.item() == spoken.stopped[i].item()
        torch.testing.assert_close(alone.mel_postnet[0], spoken.mel_postnet[i, :, :frames])
        assert (spoken.mel[i, :, frames:] == 0).all() and (spoken.alignments[i, steps:] == 0).all()
    assert say(1, max_steps=2).mel.shape[2] <= 2 * hp.n_frames_per_step


@pytest.mark.parametrize('attention', ['location', 'forward'])
@pytest.mark.parametrize('r', [1, 3])
def test_speaking_and_teacher_forcing_are_the_same_decoder(attention, r):
    "Fed its own frames, the teacher-forced decoder repeats what was spoken"
    hp = tiny(**STILL, attention=attention, n_frames_per_step=r, gate_threshold=0.99)
    model, batch = make(hp).eval(), make_batch(hp)
    with torch.no_grad(): model.decoder.gate_layer.linear_layer.bias.fill_(-50)
    spoken = model.infer(batch.text, batch.text_lengths, max_steps=8)
    out = model(batch.text, batch.text_lengths, spoken.mel, torch.full((3,), spoken.mel.shape[2]))
    for ours, name in zip(out, ('mel', 'mel_postnet', 'gate', 'alignments')): torch.testing.assert_close(ours, getattr(spoken, name))


def test_one_symbol_and_one_frame():
    hp = tiny(n_frames_per_step=1)
    model, batch = make(hp).eval(), make_batch(hp, lengths=((1, 1),))
    out = run(model, batch)
    assert out.mel.shape == (1, hp.n_mels, 1) and torch.isfinite(Tacotron2Loss(hp)(out, batch).total)
    assert model.infer(batch.text, batch.text_lengths, max_steps=3).mel.isfinite().all()


def test_parameter_counts_of_the_published_model():
    with torch.device('meta'):
        counts = {n: sum(p.numel() for p in Tacotron2(create_hparams('paper', f'n_symbols={n}')).parameters()) for n in (60, 148)}
    assert counts == {60: 28_148_097, 148: 28_193_153}


def test_unequal_frames_are_refused():
    hp = tiny()
    batch = make_batch(hp)
    with pytest.raises(ValueError, match='multiple of n_frames_per_step=4'): make(hp)(batch.text, batch.text_lengths, batch.mel[..., :30], batch.mel_lengths)
