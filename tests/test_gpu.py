"What runs on a GPU: chunks of the recurrence on any machine, kernels in Triton's interpreter where it is installed, both on a GPU where there is one"
import importlib.util
import os
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import tiny_hparams

from tts_tuner.config.errors import UserError
from tts_tuner.config.hparams import create_hparams
from tts_tuner.model import graphs, kernels
from tts_tuner.model.attention_family import create_attention
from tts_tuner.model.attention_sequence import attention_sequence
from tts_tuner.model.layers import length_mask
from tts_tuner.model.lstm_sequence import lstm_sequence
from tts_tuner.model.operations import Sizes, deviation, tolerance
from tts_tuner.model.tacotron2 import Tacotron2

TINY = 'attention_rnn_dim=20,encoder_embedding_dim=16,attention_dim=12,attention_location_kernel_size=5'
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU on this machine')
triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='triton is not installed')


def scene(kind, dtype=torch.double, device='cpu', S=21, B=3, N=19, settings=TINY):
    "Attention, its LSTM, what is known, what attention looks at, and a dropout mask"
    torch.manual_seed(3)
    hp = create_hparams('small', f'attention={kind},{settings}')
    E = hp.encoder_embedding_dim
    attention, cell = create_attention(hp), torch.nn.LSTMCell(8 + E, hp.attention_rnn_dim)
    p, values = torch.randn(S, B, 8), torch.randn(B, N, E)
    keep, mask = torch.rand(S, B, hp.attention_rnn_dim) > 0.1, length_mask(torch.tensor([max(1, N - 5 * b) for b in range(B)]), N)
    parts = [part.to(device, dtype) for part in (attention, cell)] + [part.to(device, dtype).requires_grad_() for part in (p, values)]
    return *parts, mask.to(device), keep.to(device)


def outcome(run, attention, cell, p, values, mask, keep, *more):
    "Outputs and gradients of a sequence under a loss that uses everything"
    states, weights = run(cell, attention, p, attention.prepare(values, mask), keep, 1 / 0.9, *more)
    dice = torch.Generator().manual_seed(1)
    loss = sum((x.float() if x.dtype == torch.bfloat16 else x).mul(torch.randn(x.shape, generator=dice).to(x.device)).sum() for x in (states, weights))
    return states, weights, *torch.autograd.grad(loss, [p, values, *cell.parameters(), *attention.parameters()])


def apart(a, b):
    "Largest difference of two lists of tensors, relative to the largest number of each tensor"
    return max(float((x.detach().double() - y.detach().double()).abs().max() / y.detach().double().abs().max().clamp_min(1e-30)) for x, y in zip(a, b))


def chunk_like(parts, kind, steps, way='eager'):
    attention, cell, p, values, _, keep = parts
    sizes = Sizes(*values.shape[:2], attention.v.linear_layer.weight.shape[1], values.shape[2], cell.hidden_size, attention.kernel_size)
    chunk = graphs.make_chunk(way, graphs.attention_shape(sizes, p, keep is not None, kind == 'forward'), steps)
    chunk.prepare_backward()
    return chunk


@pytest.mark.parametrize('kind', ['location', 'forward'])
@pytest.mark.parametrize('steps, dropped', [(1, True), (7, False), (8, True), (32, True)])
def test_chunks_of_attention_are_the_uncut_loop(kind, steps, dropped):
    "Borders anywhere, lengths that are no multiple, padded rows and symbols"
    parts = scene(kind)
    if not dropped: parts = *parts[:5], None
    assert apart(outcome(graphs.attention_sequence, *parts, chunk_like(parts, kind, steps)), outcome(attention_sequence, *parts)) < 1e-9


@pytest.mark.parametrize('steps, rows', [(1, 21), (8, 1), (32, 21)])
def test_chunks_of_an_lstm_are_the_uncut_loop(steps, rows):
    torch.manual_seed(0)
    cell, x, keep = torch.nn.LSTMCell(9, 12).double(), torch.randn(21, 3, 9).double().requires_grad_(), torch.rand(rows, 3, 12) > 0.2
    chunk = graphs.make_chunk('eager', graphs.Shape(Sizes(8, 0, 0, 0, 12, 0), torch.double, x.device, True, 'lstm'), steps)
    chunk.prepare_backward()
    args = x, cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh, keep, 1.25
    ours, whole = ((y, *torch.autograd.grad(y.square().sum(), [x, *cell.parameters()])) for y in (graphs.lstm_sequence(*args, chunk=chunk), lstm_sequence(*args)))
    assert apart(ours, whole) < 1e-9


def test_a_chunk_serves_another_sequence_before_the_way_back():
    "Sequences of other lengths and sizes in between, and numbers that went wrong, leave no trace"
    parts, other = scene('forward'), scene('forward', S=40, B=5, N=30)
    chunk = chunk_like(parts, 'forward', 8)
    wanted = outcome(attention_sequence, *parts)

    def interrupted(cell, attention, p, memory, keep, scale):
        out = graphs.attention_sequence(cell, attention, p, memory, keep, scale, chunk)
        broken = *other[:2], other[2].detach().fill_(float('nan')).requires_grad_(), *other[3:]
        outcome(graphs.attention_sequence, *broken, chunk)
        return out
    assert apart(outcome(interrupted, *parts), wanted) < 1e-9


def test_bf16_products_under_autocast_stay_near():
    parts = scene('location', torch.float)
    with torch.autocast('cpu', torch.bfloat16): ours = outcome(graphs.attention_sequence, *parts, chunk_like(parts, 'location', 8))
    assert ours[0].dtype == torch.bfloat16 and ours[2].dtype == torch.float
    assert apart(ours, outcome(attention_sequence, *parts)) < 0.1


@pytest.fixture
def pretend(monkeypatch):
    "A machine that takes its CPU for a GPU; what happens when chunks are made is up to the test"
    monkeypatch.setattr(graphs, '_WITHDRAWN', {})
    monkeypatch.setattr(graphs, '_CHUNKS', type(graphs._CHUNKS)())
    monkeypatch.setattr(kernels, 'available', lambda: True)

    def way(device, low):
        "The choice on a GPU"
        return next(w for w in graphs.WAYS if w not in graphs._WITHDRAWN)
    monkeypatch.setattr(graphs, 'chosen_way', way)
    return monkeypatch


def test_what_fails_is_said_once_and_the_next_way_is_taken(pretend):
    made = []

    def make(way, shape, steps=graphs.STEPS):
        made.append(way)
        if way == 'kernels': raise RuntimeError('Failed to find C compiler.\nPlease specify via CC.')
        return real(way, shape, steps)
    real = graphs.make_chunk
    pretend.setattr(graphs, 'make_chunk', make)
    attention, cell, p, values, mask, keep = parts = scene('location')
    with pytest.warns(UserWarning, match='TTS_TUNER_GPU=graphs, since "kernels" does not work here: Failed to find C compiler. Please') as said:
        ours = outcome(graphs.attention_sequence, *parts)
    assert apart(ours, outcome(attention_sequence, *parts)) < 1e-9
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        outcome(graphs.attention_sequence, *parts)
    assert len(said) == 1 and made == ['kernels', 'graphs']  # the second sequence found the chunk of the first


def test_nothing_works_and_the_sequences_of_the_cpu_are_left(pretend):
    def make(way, shape, steps=graphs.STEPS): raise OSError(f'{way} missing')
    pretend.setattr(graphs, 'make_chunk', make)
    attention, cell, p, values, mask, keep = scene('location')
    with pytest.warns(UserWarning) as said: assert graphs.attention_sequence(cell, attention, p, attention.prepare(values, mask)) is None
    assert [str(w.message).split(',')[0].rpartition('=')[2] for w in said] == ['graphs', 'eager']


def test_lack_of_memory_and_mistakes_are_handed_on(pretend):
    attention, cell, p, values, mask, keep = scene('location')
    for error in (torch.OutOfMemoryError('full'), TypeError('ours')):
        def make(way, shape, steps=graphs.STEPS, error=error): raise error
        pretend.setattr(graphs, 'make_chunk', make)
        with pytest.raises(type(error)): graphs.attention_sequence(cell, attention, p, attention.prepare(values, mask))
    assert not graphs._WITHDRAWN


@pytest.mark.parametrize('attention, autocast', [('location', False), ('forward', True), ('stepwise', False)])
def test_the_decoder_takes_recorded_chunks_by_itself(pretend, attention, autocast):
    "The whole model, with dropout in both LSTMs: outputs and gradients of the fast path without chunks"
    pretend.setitem(graphs._WITHDRAWN, 'kernels', 'not here')
    settings = dict(attention=attention, attention_dropout=0.1, dropout_decoder=0.1, gradient_checkpointing=True, n_symbols=12)
    model = Tacotron2(tiny_hparams(**settings)).train()
    n, m = torch.tensor([9, 6, 4]), torch.tensor([40, 28, 12])
    text, mel = torch.randint(2, 12, (3, 9)), torch.randn(3, 20, 40)

    def trained(path):
        torch.manual_seed(5)
        model.zero_grad()
        model.decoder.path = path
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast): out = model(text, n, mel, m)
        (out.mel_postnet.float().square().mean() + out.alignments.float().square().sum() + out.mel.float().sum() * 1e-3).backward()
        return out.mel.float(), out.alignments.float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    ours = trained('auto')
    assert {shape.kind for _, shape in graphs._CHUNKS} == ({'lstm', attention} - {'stepwise'})
    pretend.setattr(graphs, 'chosen_way', lambda device, low: 'eager')
    assert apart(ours, trained('fast')) < (0.1 if autocast else 1e-4)


def test_the_oldest_chunks_are_let_go(pretend):
    pretend.setattr(graphs, 'KEEP', 2)
    pretend.setitem(graphs._WITHDRAWN, 'kernels', 'not here')
    shapes = [graphs.Shape(Sizes(B, 0, 0, 0, 4, 0), torch.float, torch.device('cpu'), False, 'lstm') for B in (8, 16, 8, 24)]
    for shape in shapes: graphs.chunk_for(shape, backward=False)
    assert [shape.sizes.B for _, shape in graphs._CHUNKS] == [8, 24]
    graphs.release()
    assert not graphs._CHUNKS


def test_the_way_is_chosen_by_device_type_and_wish(monkeypatch):
    on_gpu = torch.device('cuda')
    monkeypatch.setattr(graphs, '_WITHDRAWN', {})
    monkeypatch.delenv('TTS_TUNER_GPU', raising=False)
    monkeypatch.setattr(kernels, 'available', lambda: True)
    assert graphs.chosen_way(torch.device('cpu'), torch.float) == 'eager'
    assert [graphs.chosen_way(on_gpu, low) for low in (torch.float, torch.bfloat16, torch.double)] == ['kernels', 'kernels', 'graphs']
    monkeypatch.setattr(kernels, 'available', lambda: False)
    assert graphs.chosen_way(on_gpu, torch.bfloat16) == 'graphs'
    monkeypatch.setenv('TTS_TUNER_GPU', 'eager')
    assert graphs.chosen_way(on_gpu, torch.bfloat16) == 'eager'
    monkeypatch.setenv('TTS_TUNER_GPU', 'fast')
    with pytest.raises(UserError, match='TTS_TUNER_GPU=fast is not one of kernels, graphs, eager'): graphs.chosen_way(on_gpu, torch.float)


def test_kernels_are_not_trusted_when_they_differ(monkeypatch):
    class Wrong(kernels.Twins):
        def lstm_forward(self, gates, cell, mask, new_cell, hidden):
            super().lstm_forward(gates, cell, mask, new_cell, hidden)
            hidden[0, 0] = float('nan')
    monkeypatch.setattr(kernels, 'Fused', Wrong)
    kernels.mistrust.cache_clear()
    shape = graphs.Shape(Sizes(8, 0, 0, 0, 4, 0), torch.float, torch.device('cpu'), False, 'lstm')
    with pytest.raises(RuntimeError, match='the fused kernels differ from plain torch by nan in x'): graphs.make_chunk('kernels', shape)
    kernels.mistrust.cache_clear()


INTERPRETED = '''
import torch
from test_gpu import apart, chunk_like, outcome, scene
from tts_tuner.model.attention_sequence import attention_sequence
from tts_tuner.model import graphs
from tts_tuner.model.kernels import Fused
from tts_tuner.model.operations import Sizes, deviation, tolerance
for low, forward, sizes in ((torch.float, False, Sizes()), (torch.float, True, Sizes(2, 33, 64, 128, 192, 31)), (torch.bfloat16, True, Sizes())):
    found = deviation(Fused(), 'cpu', low, sizes, forward)
    assert max(found.values()) < tolerance(low), found
for kind in ('location', 'forward'):
    parts = scene(kind, torch.float, S=7)
    assert apart(outcome(graphs.attention_sequence, *parts, chunk_like(parts, kind, 4, 'kernels')), outcome(attention_sequence, *parts)) < 1e-4
print('agreed')
'''


@triton
def test_kernels_agree_with_their_twins_in_the_interpreter():
    "Triton runs its kernels on a CPU when TRITON_INTERPRET is set before they are compiled, hence the process"
    here = os.path.dirname(__file__)
    paths = os.pathsep.join(filter(None, [here, os.environ.get('PYTHONPATH', '')]))
    done = subprocess.run([sys.executable, '-c', INTERPRETED], env={**os.environ, 'TRITON_INTERPRET': '1', 'PYTHONPATH': paths}, capture_output=True, text=True)
    assert done.stdout.strip() == 'agreed', done.stderr[-3000:]


@gpu
@triton
@pytest.mark.parametrize('low', [torch.float, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('forward', [False, True])
@pytest.mark.parametrize('sizes', [Sizes(), Sizes(32, 150, 128, 512, 1024, 31), Sizes(8, 400, 64, 128, 192, 31)])
def test_kernels_agree_with_their_twins_on_the_gpu(low, forward, sizes):
    found = deviation(kernels.Fused(), 'cuda', low, sizes, forward)
    assert max(found.values()) < tolerance(low), found


@gpu
@pytest.mark.parametrize('kind', ['location', 'forward'])
@pytest.mark.parametrize('way', ['graphs', 'kernels'])
def test_recorded_chunks_are_the_uncut_loop_on_the_gpu(kind, way, monkeypatch):
    "Twice, so that the second run replays what the first recorded"
    if way == 'kernels' and not kernels.available(): pytest.skip('triton is not installed')
    monkeypatch.setenv('TTS_TUNER_GPU', way)
    for seed_length in (75, 40):
        parts = scene(kind, torch.float, 'cuda', S=seed_length, B=5, N=45, settings='')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            ours = outcome(graphs.attention_sequence, *parts)
        assert apart(ours, outcome(attention_sequence, *parts)) < 1e-3
    assert all(chunk.run_forward.graph is not None for chunk in graphs._CHUNKS.values())
    graphs.release()
