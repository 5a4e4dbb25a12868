"""The decoder's fast and lean paths against the plain one: outputs, gradients, memory, precision, checkpointing."""
import pytest
import torch
from test_model import STILL, make, make_batch, run, tiny
from torch import nn

from tts_tuner.config.hparams import create_hparams
from tts_tuner.model import products
from tts_tuner.model.attention import ForwardAttention, LocationSensitiveAttention
from tts_tuner.model.attention_sequence import attention_sequence, has_sequence
from tts_tuner.model.layers import length_mask
from tts_tuner.model.losses import Tacotron2Loss
from tts_tuner.model.lstm_sequence import CHUNK, lstm_sequence

NOISE = dict(attention_dropout=0.2, dropout_decoder=0.1)
LONG = ((6, 2 * CHUNK + 3), (9, CHUNK), (4, 8))  # more than two chunks, no multiple of one; a text shorter than its batch


def trained(model, batch, path, seed=7):
    "Outputs and gradients of one path, noise from one seed"
    model.decoder.path = path
    model.zero_grad()
    torch.manual_seed(seed)
    out = run(model, batch)
    Tacotron2Loss(model.hp)(out, batch).total.backward()
    return [*(o.detach() for o in out), *(p.grad.clone() for p in model.parameters())]


def agree(one, other, within=1e-9):
    for a, b in zip(one, other): assert (a - b).norm() <= within * a.norm() + 1e-12


@pytest.mark.parametrize('attention', ['location', 'forward', 'dynamic', 'stepwise'])
@pytest.mark.parametrize('r', [1, 2])
def test_paths_agree_over_several_chunks(attention, r):
    "The loss looks at alignments too, by the guide"
    hp = tiny(attention=attention, n_frames_per_step=r, **NOISE)
    model, batch = make(hp).train(), make_batch(hp, LONG)
    model.encoder.dropout = 0.0
    plain = trained(model, batch, 'plain')
    for path in ('fast', 'lean', 'auto'): agree(plain, trained(model, batch, path))


@pytest.mark.parametrize('kind', ['dropout', 'variational', 'output', 'zoneout'])
@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
def test_paths_agree_under_every_noise(kind, training):
    hp = tiny(recurrent_regulariser=kind, spectral_dropout=0.3, n_frames_per_step=2, **NOISE)
    model, batch = make(hp).train(training), make_batch(hp)
    model.encoder.dropout = 0.0
    plain = trained(model, batch, 'plain')
    for path in ('fast', 'lean'): agree(plain, trained(model, batch, path))


def test_long_texts_take_blocks():
    "Location features are computed block by block where one matrix would be too large"
    hp = tiny(attention='forward', n_frames_per_step=2, attention_location_n_filters=8, **NOISE)
    model, batch = make(hp).train(), make_batch(hp, ((150, 20), (301, 14), (3, 9)))
    model.encoder.dropout = 0.0
    agree(trained(model, batch, 'plain'), trained(model, batch, 'lean'))


def attention_case(kind, S=4, N=5, H=3, E=2):
    torch.manual_seed(0)
    hp = create_hparams('small', dict(attention_rnn_dim=H, attention_dim=2, encoder_embedding_dim=E, attention_location_n_filters=2, attention_location_kernel_size=3))
    attention, cell = kind(hp).double(), nn.LSTMCell(2 + E, H).double()
    p, values = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((S, 2, 2), (2, N, E)))
    return attention, cell, p, values, length_mask(torch.tensor([N, 2]), N), torch.rand(S, 2, H) > 0.3


@pytest.mark.parametrize('kind', [LocationSensitiveAttention, ForwardAttention])
@pytest.mark.parametrize('recompute', [False, True], ids=['fast', 'lean'])
def test_gradient_of_attention_is_its_slope(kind, recompute):
    "By finite differences in every input and weight, padding and dropout at work"
    attention, cell, p, values, mask, keep = attention_case(kind)
    weights = [*cell.parameters(), *attention.parameters()]

    def outputs(p, values, *_): return attention_sequence(cell, attention, p, attention.prepare(values, mask), keep, 1 / 0.7, recompute)

    assert torch.autograd.gradcheck(outputs, (p, values, *weights))


@pytest.mark.parametrize('recompute', [False, True], ids=['fast', 'lean'])
def test_gradient_of_the_lstm_is_its_slope(recompute):
    torch.manual_seed(0)
    cell, x, keep = nn.LSTMCell(3, 2).double(), torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True), torch.rand(4, 2, 2) > 0.3

    def outputs(x, w_input, w_state, bias): return lstm_sequence(x, w_input, w_state, bias, keep, 1 / 0.7, recompute, turn=1)

    assert torch.autograd.gradcheck(outputs, (x, cell.weight_ih, cell.weight_hh, cell.bias_ih))


def test_gradients_may_be_asked_for_twice_but_have_none_of_their_own():
    attention, cell, p, values, mask, keep = attention_case(ForwardAttention)
    out = attention_sequence(cell, attention, p, attention.prepare(values, mask), keep, 1 / 0.7)
    first, again = (torch.autograd.grad(out[0].sum() + out[1].square().sum(), values, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)  # what was kept is read, not written
    with pytest.raises(RuntimeError, match='decoder_path=plain'): torch.autograd.grad(out[0].sum(), p, create_graph=True)


def test_only_the_attentions_it_knows_are_taken():
    class Mine(ForwardAttention): "Looks the same and may compute something else"

    attention, cell, p, values, mask, _ = attention_case(Mine)
    assert not has_sequence(attention) and has_sequence(attention_case(ForwardAttention)[0])
    with pytest.raises(TypeError, match='Mine has no sequence'): attention_sequence(cell, attention, p, attention.prepare(values, mask))


@pytest.mark.parametrize('emulated', [True, False], ids=['bf16 products', 'what this processor has'])
def test_bf16_under_autocast(monkeypatch, emulated):
    "States and sums stay in fp32; rounding moves the gradient no more than it moves that of the plain path"
    if emulated: monkeypatch.setattr(products, 'has_bf16', lambda kind: True)
    hp, error = tiny(**{**STILL, 'n_frames_per_step': 2, 'mel_loss': 'mse'}), {}
    model, batch = make(hp, torch.float32).train(), make_batch(hp, dtype=torch.float32)
    exact = torch.cat([g.flatten() for g in trained(model, batch, 'plain')[4:]])
    for path in ('plain', 'fast', 'lean'):
        model.zero_grad()
        model.decoder.path = path
        with torch.autocast('cpu', torch.bfloat16): out = run(model, batch)
        Tacotron2Loss(hp)(type(out)(*(o.float() for o in out)), batch).total.backward()
        error[path] = float((torch.cat([p.grad.flatten() for p in model.parameters()]) - exact).norm() / exact.norm())
        assert path == 'plain' or out.alignments.dtype == torch.float32
    assert 0 < max(error['fast'], error['lean']) < 1.2 * error['plain'] < 0.2, error


@pytest.mark.parametrize('rows, K, N', [(8, 512, 1024), (3, 700, 1024), (64, 512, 1024)])
def test_blocks_of_columns_multiply_like_the_matrix(rows, K, N):
    x, W, base = torch.randn(rows, K), torch.randn(K, N), torch.randn(rows, N)
    product = products.StepProduct(W, rows, torch.float32)
    assert product.blocked and not products.StepProduct(W.double(), rows, torch.float64).blocked
    torch.testing.assert_close(product(x, base, torch.empty_like(base)), base + x @ W, rtol=1e-4, atol=1e-3)
    strided = torch.zeros(rows, N + 7)[:, :N]  # a part of a wider row, as in [context, state]
    torch.testing.assert_close(product(x[:, :K], base, strided), base + x @ W, rtol=1e-4, atol=1e-3)


def test_widths_at_which_products_are_cut_in_blocks():
    "Wide enough for blocks of columns, in float32, with a batch and a sequence that are no round numbers"
    hp = tiny(attention='location', n_frames_per_step=1, attention_rnn_dim=352, encoder_embedding_dim=64, decoder_rnn_dim=544, **NOISE)
    model, batch = make(hp, torch.float32).train(), make_batch(hp, dtype=torch.float32)
    model.encoder.dropout = 0.0
    plain = trained(model, batch, 'plain')
    for path in ('fast', 'lean'): agree(plain[:4], trained(model, batch, path)[:4], 1e-4)


def test_checkpointing_computes_the_same_and_counts_a_batch_once():
    kept, again = [], []
    for results, checkpointing in ((kept, False), (again, True)):
        hp = tiny(**{**NOISE, 'postnet_dropout': 0.5, 'gradient_checkpointing': checkpointing, 'n_frames_per_step': 2})
        model, batch = make(hp).train(), make_batch(hp)
        results += trained(model, batch, 'auto')
        results += [b.double() for b in model.buffers()]
    agree(kept, again)


def kept_for_backward(model, batch):
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), batch.mel, batch.text)}
    sizes, alive = {}, []

    def pack(t):
        alive.append(t)
        if t.untyped_storage().data_ptr() not in known: sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): run(model, batch)
    return sum(sizes.values())


def test_lean_keeps_a_fraction():
    "At proportions like the published model's"
    sizes = dict(encoder_embedding_dim=32, attention_rnn_dim=64, decoder_rnn_dim=64, prenet_dim=16, attention_dim=8, postnet_embedding_dim=32, n_mels=8)
    kept = {}
    for path in ('plain', 'fast', 'lean'):
        hp = create_hparams('default', dict(sizes, n_symbols=20, symbols_embedding_dim=32, decoder_path=path, gradient_checkpointing=path == 'lean', **NOISE))
        kept[path] = kept_for_backward(make(hp, torch.float32).train(), make_batch(hp, ((12, 150), (9, 200)), torch.float32))
    assert kept['plain'] > 1.5 * kept['fast'] and kept['plain'] > 6 * kept['lean']


def test_an_unknown_path_is_refused():
    model = make(tiny())
    model.decoder.path = 'quick'
    with pytest.raises(ValueError, match='no decoder path "quick"; there are auto, plain, fast, lean'): run(model, make_batch(model.hp))
