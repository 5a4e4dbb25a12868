"""The step-wise decoder: the same speech as the equations, whatever the batch, the look at the gate and the layout of the weights."""
import logging

import pytest
import torch

from tts_tuner.config.errors import UserError
from tts_tuner.config.hparams import create_hparams
from tts_tuner.model.attention_family import when_speaking
from tts_tuner.model.decoder import Decoder
from tts_tuner.model.int8 import has_int8
from tts_tuner.model.layers import length_mask
from tts_tuner.model.products import has_bf16
from tts_tuner.model.regularise import draw_noise
from tts_tuner.model.speaking import SparseProduct, StepwiseDecoder
from tts_tuner.model.tacotron2 import Tacotron2

TINY = dict(n_symbols=20, n_mels=8, symbols_embedding_dim=12, encoder_embedding_dim=16, attention_rnn_dim=14, decoder_rnn_dim=18, prenet_dim=10,
    postnet_embedding_dim=10, attention_dim=8, attention_location_n_filters=3, attention_location_kernel_size=7, gate_threshold=0.99)
LENGTHS = (9, 6, 3)
ATTENTIONS = ('location', 'forward', 'dynamic', 'stepwise')


def make(dtype=torch.float64, rows=3, **changes):
    "Settings, decoder, memory and mask; the gate depends on what is said, so that utterances end apart"
    hp = create_hparams('small', {**TINY, **changes})
    torch.manual_seed(0)
    decoder = Decoder(hp).to(dtype).eval()
    values = torch.randn(3, max(LENGTHS), hp.encoder_embedding_dim, dtype=torch.float64).to(dtype)
    mask = length_mask(torch.tensor(LENGTHS), max(LENGTHS))
    return hp, decoder, (values * mask[..., None])[:rows], mask[:rows]


def seeded(seed=1): return torch.Generator().manual_seed(seed)


def by_equations(hp, decoder, values, mask, limit, generator=None):
    "One `Decoder.step` after another, zoneout added by hand; the gate is tested at every step"
    memory = when_speaking(decoder.attention_layer.prepare(values, mask), hp)
    state, frame, said = decoder.start(memory), values.new_zeros(len(values), hp.n_mels), []
    threshold, ends = torch.logit(torch.tensor(hp.gate_threshold)).item(), [None] * len(values)
    for t in range(1, limit + 1):
        out, gate, state = decoder.step(decoder.prenet(frame, generator), state, memory)
        frame = out[:, -hp.n_mels:]
        said.append((out, gate, state.attended.weights))
        ends = [end or (t if g > threshold else None) for end, g in zip(ends, gate.tolist())]
        if None not in ends: break
    frames, gates, alignments = (torch.stack(x) for x in zip(*said))
    return frames, gates.T, alignments.transpose(0, 1), [end or limit for end in ends], [end is not None for end in ends]


def assert_same(said, expected, atol):
    for ours, theirs in zip(said[:3], expected): torch.testing.assert_close(ours, theirs, atol=atol, rtol=atol)
    assert said.steps.tolist() == expected[3] and said.stopped.tolist() == expected[4]


def ending_apart(**changes):
    "An example whose gates fire at different steps, without dropout"
    hp, decoder, values, mask = make(**changes)
    values = 4 * values
    decoder.prenet.dropout = 0.0
    gate = decoder.gate_layer.linear_layer
    with torch.no_grad():
        gate.bias.fill_(-50)
        logits = StepwiseDecoder(decoder, hp)(values, mask, 40, warn=False).gate + 50
        first = lambda level: [next((t for t, x in enumerate(row, 1) if x > level), 99) for row in logits.tolist()]
        spread = lambda level: len(set(first(level))) if max(first(level)) < 40 else 0
        level = max((logits.flatten() - 1e-6).tolist(), key=spread)
        gate.bias.fill_(torch.logit(torch.tensor(hp.gate_threshold)).item() - level)
    assert spread(level) > 1
    return hp, decoder, values, mask, first(level)


@torch.no_grad()
@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('rows', [1, 3])
@pytest.mark.parametrize('changes', [dict(n_frames_per_step=1), dict(n_frames_per_step=3, attention_window=2)], ids=['r=1', 'r=3, window'])
def test_says_what_the_equations_say(attention, rows, changes):
    hp, decoder, values, mask = make(rows=rows, attention=attention, **changes)
    said = StepwiseDecoder(decoder, hp)(values, mask, 15, seeded(), warn=False)
    assert_same(said, by_equations(hp, decoder, values, mask, 15, seeded()), 1e-12)
    decoder, values = decoder.float(), values.float()
    said = StepwiseDecoder(decoder, hp)(values, mask, 15, seeded(), warn=False)
    assert_same(said, by_equations(hp, decoder, values, mask, 15, seeded()), 1e-6)


@torch.no_grad()
def test_table_of_contexts_sparse_product_and_blocked_weights_change_nothing(monkeypatch):
    "Sizes at which a single utterance takes the table and the sparse product, and a batch the laid-out weights"
    sizes = dict(encoder_embedding_dim=64, attention_rnn_dim=256, decoder_rnn_dim=256, prenet_dim=64, n_frames_per_step=1)
    hp, decoder, values, mask = make(torch.float32, **sizes)
    monkeypatch.setattr(SparseProduct, 'LEAST', 0)
    for rows, times in ((1, 1), (3, 1), (3, 8)):
        v, m = values[:rows].repeat(times, 1, 1), mask[:rows].repeat(times, 1)
        assert_same(StepwiseDecoder(decoder, hp)(v, m, 12, seeded(), warn=False), by_equations(hp, decoder, v, m, 12, seeded()), 2e-6)


@torch.no_grad()
@pytest.mark.parametrize('attention', ATTENTIONS)
def test_utterances_stop_one_by_one_and_do_not_know_each_other(attention):
    hp, decoder, values, mask, ends = ending_apart(attention=attention)
    whole = StepwiseDecoder(decoder, hp)(values, mask, 60)
    assert whole.steps.tolist() == ends and whole.stopped.all() and len(whole.frames) == max(ends)
    for i, n in enumerate(LENGTHS):
        alone = StepwiseDecoder(decoder, hp)(values[i:i + 1, :n], mask[i:i + 1, :n], 60)
        assert alone.steps.item() == ends[i] == len(alone.frames)
        torch.testing.assert_close(alone.frames[:, 0], whole.frames[:ends[i], i])
        torch.testing.assert_close(alone.alignments[0], whole.alignments[i, :ends[i], :n])
    order = torch.tensor([2, 0, 1])
    turned = StepwiseDecoder(decoder, hp)(values[order], mask[order], 60)
    torch.testing.assert_close(turned.frames, whole.frames[:, order])
    assert turned.steps.tolist() == whole.steps[order].tolist()


@torch.no_grad()
@pytest.mark.parametrize('every', [2, 7, 16, 100])
def test_how_often_the_gate_is_looked_at_does_not_show(every):
    hp, decoder, values, mask, ends = ending_apart()
    for limit in (60, max(ends) - 1):
        said = [StepwiseDecoder(decoder, hp, gate_every=k)(values, mask, limit, warn=False) for k in (1, every)]
        for a, b in zip(*said): assert torch.equal(a, b)


@torch.no_grad()
def test_the_limit_is_said_with_names(caplog):
    hp, decoder, values, mask, ends = ending_apart()
    order = sorted(range(3), key=lambda i: ends[i])
    with caplog.at_level(logging.WARNING):
        said = StepwiseDecoder(decoder, hp)(values, mask, ends[order[0]], names=['anna', 'bert', 'cleo'])
    late = [name for name, stopped in zip(['anna', 'bert', 'cleo'], said.stopped.tolist()) if not stopped]
    assert late and len(caplog.messages) == 1 and f'{ends[order[0]]} decoder steps' in caplog.text and caplog.messages[0].endswith(f'{", ".join(late)}.')
    caplog.clear()
    StepwiseDecoder(decoder, hp)(values, mask, 60)
    StepwiseDecoder(decoder, hp)(values, mask, 1, warn=False)
    assert not caplog.messages


@torch.no_grad()
def test_same_seed_same_speech_and_the_global_generator_is_left_alone():
    hp, decoder, values, mask = make()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    a, b, c = (StepwiseDecoder(decoder, hp)(values, mask, 8, seeded(s), warn=False).frames for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(before, torch.get_rng_state())


def test_changed_weights_are_noticed():
    hp, decoder, values, mask = make()
    decoder.prenet.dropout, speaker = 0.0, StepwiseDecoder(decoder, hp)
    say = lambda: speaker(values, mask, 6, warn=False).frames
    fresh = lambda: StepwiseDecoder(decoder, hp)(values, mask, 6, warn=False).frames
    said, prepared = say(), speaker.weights(3)
    assert speaker.weights(3) is prepared and speaker.weights(1) is not prepared
    optimizer = torch.optim.Adam(decoder.parameters(), lr=0.1)
    for p in decoder.parameters(): p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(say(), fresh()) and not torch.equal(say(), said)
    decoder.load_state_dict({k: v * 0.5 for k, v in decoder.state_dict().items()})
    assert torch.equal(say(), fresh())
    decoder.attention_rnn.weight_hh.data.mul_(3)
    speaker.refresh()
    assert torch.equal(say(), fresh())
    decoder.float()
    values = values.float()
    assert torch.equal(say(), fresh())


@torch.no_grad()
def test_zoneout_speaks_with_its_expectation():
    hp, decoder, values, mask = make(recurrent_regulariser='zoneout', attention_dropout=0.3, dropout_decoder=0.2, prenet_dropout=0.0, attention='location')
    memory, frame, said = decoder.attention_layer.prepare(values, mask), values.new_zeros(3, hp.n_mels), []
    attended = decoder.attention_layer.start(memory)
    a, ac, d, dc = (values.new_zeros(3, n) for n in (14, 14, 18, 18))
    noise = [draw_noise(1, x, p, 'zoneout', training=False).at(0) for x, p in ((a, 0.3), (d, 0.2))]
    for _ in range(6):
        h, c = decoder.attention_rnn(torch.cat([decoder.prenet(frame), attended.context], 1), (a, ac))
        _, a, ac = noise[0].apply(h, c, a, ac)
        attended = decoder.attention_layer(a, attended, memory)
        h, c = decoder.decoder_rnn(torch.cat([a, attended.context], 1), (d, dc))
        _, d, dc = noise[1].apply(h, c, d, dc)
        out = decoder.linear_projection(torch.cat([d, attended.context], 1))
        frame = out[:, -hp.n_mels:]
        said.append(out)
    torch.testing.assert_close(StepwiseDecoder(decoder, hp)(values, mask, 6, warn=False).frames, torch.stack(said), atol=1e-12, rtol=1e-12)


WIDE = dict(encoder_embedding_dim=64, attention_rnn_dim=128, decoder_rnn_dim=128, prenet_dim=32)


@torch.no_grad()
@pytest.mark.parametrize('precision, largest', [('bf16', 0.02), ('int8', 0.05)])
@pytest.mark.parametrize('rows', [1, 3])
def test_rounding_stays_small(precision, largest, rows):
    hp, decoder, values, mask = make(torch.float32, rows=rows, **WIDE)
    speaker = StepwiseDecoder(decoder, hp, precision)
    full, said = (s(values, mask, 30, seeded(), warn=False).frames for s in (StepwiseDecoder(decoder, hp), speaker))
    difference = float((said - full).norm() / full.norm())
    assert difference < largest
    if not speaker.note: assert difference > 0, 'nothing was rounded'
    here = has_int8('cpu') if precision == 'int8' else rows == 1 or has_bf16('cpu')
    assert bool(speaker.note) != here


@torch.no_grad()
@pytest.mark.skipif(not has_int8('cpu'), reason='no instructions for products of bytes on this processor')
def test_bytes_do_not_couple_the_rows_of_a_batch():
    hp, decoder, values, mask = make(torch.float32, **WIDE)
    decoder.prenet.dropout = 0.0
    loud = torch.cat([values[:2], 100 * values[2:]])
    speak = lambda v: StepwiseDecoder(decoder, hp, 'int8')(v, mask, 10, warn=False).frames[:, :2]
    torch.testing.assert_close(speak(values), speak(loud), atol=1e-6, rtol=1e-6)


def test_a_precision_the_machine_lacks_is_said(monkeypatch):
    import tts_tuner.model.speaking as module
    hp, decoder, values, mask = make(torch.float32)
    monkeypatch.setattr(module, 'has_int8', lambda kind: False)
    monkeypatch.setattr(module, 'has_bf16', lambda kind: False)
    for precision in ('int8', 'bf16'):
        speaker = StepwiseDecoder(decoder, hp, precision)
        said = speaker(values, mask, 5, seeded(), warn=False)
        assert 'fp32' in speaker.note and torch.equal(said.frames, StepwiseDecoder(decoder, hp)(values, mask, 5, seeded(), warn=False).frames)
    with pytest.raises(UserError, match='precision=.int9.'): StepwiseDecoder(decoder, hp, 'int9')


def test_infer_takes_a_prepared_decoder_and_speaks_under_autocast():
    hp = create_hparams('small', {**TINY, 'max_decoder_steps': 7})
    torch.manual_seed(0)
    model = Tacotron2(hp).eval()
    text, n = torch.randint(2, 20, (2, 6)), torch.tensor([6, 4])
    speak = lambda **kw: model.infer(text, n, generator=seeded(), warn=False, **kw)
    plain, prepared = speak(), speak(decoder=StepwiseDecoder(model.decoder, hp))
    for a, b in zip(plain, prepared): assert torch.equal(a, b)
    assert not plain.mel.requires_grad and not plain.mel.is_inference()
    with torch.autocast('cpu', torch.bfloat16): coarse = speak()
    assert coarse.mel.dtype == torch.float32 and (coarse.mel - plain.mel).abs().max() < 0.05
