"Weights of the public reference, value by value, through every wrapping they are passed on in"
import hashlib
import json
import pickle
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_corpus import TINY, make_tiny_corpus

from tts_tuner import cli
from tts_tuner.config.errors import UserError
from tts_tuner.config.hparams import create_hparams, from_dict, to_dict
from tts_tuner.model.tacotron2 import Tacotron2
from tts_tuner.text.symbols import SymbolTable
from tts_tuner.training.checkpoint import load_checkpoint, save_checkpoint
from tts_tuner.training.learner import Learner
from tts_tuner.training.published import PUBLISHED_SYMBOLS, as_published, export_published, import_published, read_published, start_from
from tts_tuner.training.trainer import load, run_training
from tts_tuner.training.warm_start import DoesNotFit

OURS = dict(p_attention_dropout='attention_dropout', p_decoder_dropout='dropout_decoder', n_mel_channels='n_mels')
NOT_SIZES = ('mask_padding', 'fp16_run', 'learning_rate', 'weight_decay', 'grad_clip_thresh', 'max_decoder_steps', 'gate_threshold', *OURS)
SYMBOLS = ('_', *'abcdefghijklmnopqrstuvwxyz', *" !'(),-.:;?", '~', '#')  # as many as the golden embedding has rows; ~ is an end mark


@pytest.fixture(scope='module')
def golden(shared_data):
    with np.load(shared_data / 'golden' / 'tacotron2_tiny.npz') as z: found = {k: z[k] for k in z.files}
    weights = {k.removeprefix('weight/'): torch.from_numpy(v) for k, v in found.items() if k.startswith('weight/')}
    return SimpleNamespace(values=found, weights=weights, config=json.loads(str(found['config'])))


def wide(weights):
    "The golden weights with the 148 rows of the published table"
    rows = weights['embedding.weight']
    more = torch.randn(148 - len(rows), rows.shape[1], generator=torch.Generator().manual_seed(0))
    return {**weights, 'embedding.weight': torch.cat([rows, more])}


def wrapped(weights, layout, prefix=''):
    named = {prefix + k: v for k, v in weights.items()}
    if layout == 'weights': return named
    if layout == 'repository': return dict(iteration=7000, state_dict=named, optimizer=dict(state={}, param_groups=[]), learning_rate=1e-3)
    return dict(epoch=20, cuda_rng_state_all=torch.zeros(4, 16, dtype=torch.uint8), random_rng_state=torch.get_rng_state(), state_dict=named,
                config=dict(mask_padding=False, n_symbols=148, p_attention_dropout=0.0, p_decoder_dropout=0.0, decoder_no_early_stopping=False),
                optimizer=dict(state={0: dict(step=torch.tensor(7000.0))}), amp=dict(loss_scaler0=dict(loss_scale=65536.0, unskipped=3)))


def golden_hp(golden, **more):
    sizes = {k: v for k, v in golden.config.items() if k not in NOT_SIZES}
    return create_hparams('paper', dict(sizes, n_mels=golden.config['n_mel_channels'], **more))


# ---------------------------------------------------------------- reading

def test_the_published_table():
    assert len(PUBLISHED_SYMBOLS) == 148
    assert hashlib.sha256('\n'.join(PUBLISHED_SYMBOLS).encode()).hexdigest() == 'ec5c1790dbfe42e1ef0cea372ab3eb614cc4df326133b0e3f4ccd11103f0545b'


@pytest.mark.parametrize('layout, prefix, new', [('repository', '', True), ('repository', 'module.', False), ('examples', 'module.', True),
                                                 ('examples', 'module.1.', False), ('weights', '', False), ('weights', 'module.', True)])
def test_golden_outputs_through_each_layout(golden, tmp_path, layout, prefix, new):
    "Import changes the numbers of the symbols and nothing that comes out"
    torch.save(wrapped(golden.weights, layout, prefix), tmp_path / 'ref.pt', _use_new_zipfile_serialization=new)
    (tmp_path / 'symbols.txt').write_text('\n'.join(SYMBOLS) + '\n')
    found = import_published(tmp_path / 'ref.pt', tmp_path / 'ours.pt', tmp_path / 'symbols.txt')
    assert (found.layout, found.step) == (layout, 0 if layout == 'weights' else 7000)
    assert all(getattr(found.hp, k) == v for k, v in golden.config.items() if k not in NOT_SIZES) and found.hp.n_mels == golden.config['n_mel_channels']
    model, _, table, _ = load(tmp_path / 'ours.pt')
    model = model.double()
    model.decoder.prenet.dropout = 0.0
    put = {i: table.symbols.index(s) for i, s in enumerate(found.symbols) if s not in ('_', '~')} | {0: 0, found.symbols.index('~'): 1}
    value = {k: torch.from_numpy(golden.values[f'input/{k}']) for k in ('text', 'text_lengths', 'mel', 'mel_lengths')}
    text = value['text'].clone().apply_(put.__getitem__)
    out = model(text, value['text_lengths'], value['mel'].double(), value['mel_lengths'])
    for ours, name in zip(out, ('mel', 'mel_postnet', 'gate', 'alignment')):
        np.testing.assert_allclose(ours.detach().numpy(), golden.values[f'output/{name}'], rtol=0, atol=1e-10, err_msg=name)


def test_half_precision(golden, tmp_path):
    torch.save(wrapped({k: v.half() if v.is_floating_point() else v for k, v in wide(golden.weights).items()}, 'repository'), tmp_path / 'half.pt')
    found = read_published(tmp_path / 'half.pt')
    assert all(v.dtype == torch.float32 for v in found.weights.values() if v.is_floating_point())
    torch.testing.assert_close(found.weights['embedding.weight'], wide(golden.weights)['embedding.weight'], rtol=1e-3, atol=1e-3)


def test_files_without_counters_of_batches(golden, tmp_path):
    "Batch normalisation of older torch counted nothing"
    torch.save(wrapped({k: v for k, v in wide(golden.weights).items() if 'num_batches' not in k}, 'weights'), tmp_path / 'old.pt')
    table, hp = SymbolTable.characters('en'), golden_hp(golden)
    account = start_from(Tacotron2(replace(hp, n_symbols=len(table))), replace(hp, n_symbols=len(table)), tmp_path / 'old.pt', table)
    assert len(account.left) == 8 and 'Tensors not taken, because the file has none (8)' in ' '.join(account.sentences())
    import_published(tmp_path / 'old.pt', tmp_path / 'ours.pt')
    assert load(tmp_path / 'ours.pt')[1].n_symbols == 149


# ---------------------------------------------------------------- refusing

def test_torn_files(golden, tmp_path):
    "Wherever the file is cut, and whatever byte is wrong: a sentence or a whole state, never a stack trace"
    draw = random.Random(1)
    for new in (True, False):
        torch.save(wrapped(wide(golden.weights), 'repository'), tmp_path / 'whole.pt', _use_new_zipfile_serialization=new)
        whole = (tmp_path / 'whole.pt').read_bytes()
        cuts = [*(int(len(whole) * x) for x in (0.001, 0.01, 0.1, 0.5, 0.9, 0.999)), 10, 40, 200, len(whole) - 1]
        for cut in cuts:
            (tmp_path / 'cut.pt').write_bytes(whole[:cut])
            with pytest.raises(UserError, match='cut.pt'): read_published(tmp_path / 'cut.pt')
        for _ in range(60):
            spoilt = bytearray(whole)
            spoilt[draw.randrange(min(len(whole), 6000))] ^= 1 << draw.randrange(8)
            (tmp_path / 'spoilt.pt').write_bytes(spoilt)
            try: read_published(tmp_path / 'spoilt.pt')
            except UserError as e: assert str(tmp_path) in str(e)


class Mine:
    def __reduce__(self): return print, ('code of a stranger',)


@pytest.mark.parametrize('new', [True, False])
def test_a_foreign_pickle_is_not_opened(tmp_path, capsys, new):
    torch.save(dict(iteration=1, state_dict=Mine()), tmp_path / 'a.pt', _use_new_zipfile_serialization=new)
    with pytest.raises(UserError, match='more than tensors and plain values'): read_published(tmp_path / 'a.pt')
    with open(tmp_path / 'b.pt', 'wb') as f: pickle.dump(Mine(), f)
    with pytest.raises(UserError, match='b.pt'): read_published(tmp_path / 'b.pt')
    assert capsys.readouterr().out == ''


def test_other_kinds_of_models(golden, tmp_path):
    def said(content, fits_elsewhere=True):
        torch.save(content, tmp_path / 'a.pt')
        with pytest.raises(UserError) as e: read_published(tmp_path / 'a.pt')
        assert isinstance(e.value, DoesNotFit) == fits_elsewhere
        return str(e.value)
    weights = wide(golden.weights)
    assert 'it holds generator' in said(dict(generator=dict(a=torch.ones(1))))
    assert 'another kind of model: it lacks' in said(dict(state_dict={'upsample.weight': torch.ones(3, 3)}, iteration=1))
    assert 'speaker_embedding.weight is unknown here' in said(wrapped({**weights, 'speaker_embedding.weight': torch.ones(2, 4)}, 'repository'))
    assert 'decoder.gate_layer.linear_layer.bias is missing there' in said({k: v for k, v in weights.items() if k != 'decoder.gate_layer.linear_layer.bias'})
    assert 'decoder.gate_layer.linear_layer.weight is 1 x 60 there' in said({**weights, 'decoder.gate_layer.linear_layer.weight': torch.ones(1, 60)})
    assert 'NaN or infinity, first embedding.weight' in said({**weights, 'embedding.weight': weights['embedding.weight'] * float('inf')}, False)
    assert 'other dimensions' in said({**weights, 'postnet.convolutions.0.0.conv.weight': torch.ones(3)})
    assert '40 symbols, not the 148' in said(golden.weights, False)


def test_symbol_tables_that_do_not_fit(golden, tmp_path):
    torch.save(golden.weights, tmp_path / 'a.pt')
    with pytest.raises(UserError, match='has 39 symbols, .* has 40 rows'): read_published(tmp_path / 'a.pt', SYMBOLS[:39])
    with pytest.raises(UserError, match="names 'a' twice"): read_published(tmp_path / 'a.pt', ('_', *'abc', 'a', *map(str, range(35))))
    with pytest.raises(UserError, match='no symbol table'): import_published(tmp_path / 'a.pt', tmp_path / 'b.pt', tmp_path / 'nowhere.txt')
    assert not (tmp_path / 'b.pt').exists()


# ---------------------------------------------------------------- warm start of a run

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp('published')
    return make_tiny_corpus(root / 'corpus', n=12), root / 'cache'


def start(tiny, golden, run_dir, path, said, **more):
    "One step with a learning rate of zero from the weights in `path`"
    sizes = {k: v for k, v in to_dict(golden_hp(golden)).items() if k in golden.config and k not in NOT_SIZES}
    hp = create_hparams('paper', {**TINY, **sizes, 'n_mels': golden.config['n_mel_channels'], 'learning_rate': 0.0, 'weight_decay': 0.0, **more})
    run_training(tiny[0], run_dir, hp, until=1, warm_start=path, console=said.append, tensorboard=False, n_samples=0, cache_dir=tiny[1],
                 fresh_if_different=bool(more.get('decoder_rnn_dim')))
    return load_checkpoint(run_dir / 'checkpoints' / 'last.pt')


@pytest.mark.parametrize('layout, prefix', [('repository', ''), ('examples', 'module.')])
def test_a_run_starts_from_the_golden_weights(golden, tiny, tmp_path, layout, prefix):
    "Another symbol table here, and the report of mapped rows is right, row by row"
    weights, said = wide(golden.weights), []
    torch.save(wrapped(weights, layout, prefix), tmp_path / 'ref.pt')
    state = start(tiny, golden, tmp_path / 'run', tmp_path / 'ref.pt', said)
    symbols, rows = SymbolTable.from_dict(state['symbols']).symbols, state['model']['embedding.weight']
    assert len(symbols) != 148
    for i, symbol in enumerate(symbols):
        there = 0 if symbol == '<pad>' else PUBLISHED_SYMBOLS.index(symbol) if symbol in PUBLISHED_SYMBOLS else None
        if there is not None: assert torch.equal(rows[i], weights['embedding.weight'][there]), symbol
        else: assert not (rows[i] == weights['embedding.weight']).all(1).any() and symbol in ('<end>', '"')
    taken = [k for k, v in weights.items() if k != 'embedding.weight' and 'running' not in k and 'num_batches' not in k]
    assert all(torch.equal(state['model'][k], weights[k]) for k in taken)
    text = '\n'.join(said)
    assert f'{len(weights) - 1} tensors and 38 symbol rows taken from step 7000.' in text and 'start as drawn (2): <end> ".' in text
    assert 'without a place here (110): A B C' in text and 'sample_rate=8000 instead of 22050' in text


def test_from_an_imported_table_of_another_length(golden, tiny, tmp_path):
    said = []
    torch.save(wrapped(golden.weights, 'repository'), tmp_path / 'ref.pt')
    with pytest.raises(UserError, match='tts-tune import --symbols'): start(tiny, golden, tmp_path / 'no', tmp_path / 'ref.pt', said)
    (tmp_path / 'table.json').write_text(json.dumps(['_', *(f'x{i}' for i in range(30)), *'jihgfedcb']))
    import_published(tmp_path / 'ref.pt', tmp_path / 'ours.pt', tmp_path / 'table.json')
    state = start(tiny, golden, tmp_path / 'run', tmp_path / 'ours.pt', said)
    row = SymbolTable.from_dict(state['symbols']).symbols.index
    for i, letter in enumerate('jihgfedcb'): assert torch.equal(state['model']['embedding.weight'][row(letter)], golden.weights['embedding.weight'][31 + i])
    assert any('without a place here (30): x0 x1' in line for line in said)


def test_refused_or_fresh(golden, tiny, tmp_path):
    torch.save(wrapped(wide(golden.weights), 'repository'), tmp_path / 'ref.pt')
    table = SymbolTable.characters('en')
    hp = golden_hp(golden, n_frames_per_step=2)
    hp = replace(hp, n_symbols=len(table))
    with pytest.raises(UserError, match='n_frames_per_step is 1 there and 2 here'): start_from(Tacotron2(hp), hp, tmp_path / 'ref.pt', table)
    said = []
    state = start(tiny, golden, tmp_path / 'run', tmp_path / 'ref.pt', said, decoder_rnn_dim=32)
    assert state['step'] == 1 and any('decoder_rnn_dim is 40 there and 32 here' in line and 'from the beginning' in line for line in said)
    with pytest.raises(UserError, match='no checkpoint .*nowhere.pt'): start(tiny, golden, tmp_path / 'typo', tmp_path / 'nowhere.pt', [], decoder_rnn_dim=32)


# ---------------------------------------------------------------- writing

def trained(golden, **more):
    "A full checkpoint of a few steps"
    table = SymbolTable.characters('en')
    learner = Learner(replace(golden_hp(golden, **more), n_symbols=len(table)))
    torch.manual_seed(1)
    for p in learner.model.parameters(): p.grad = torch.randn_like(p)
    for _ in range(3): learner.optimizer.step(1e-3, learner.hp)
    return dict(learner.state(), step=3, hparams=to_dict(learner.hp), symbols=table.to_dict(), mel_mean=0.0, mel_std=1.0, digest='d', metrics=dict(score=0.5))


@pytest.mark.parametrize('layout', ['repository', 'examples'])
def test_there_and_back(golden, tmp_path, layout):
    state = trained(golden)
    save_checkpoint(tmp_path / 'ours.pt', state)
    said = export_published(tmp_path / 'ours.pt', tmp_path / 'ref.pt', layout)
    assert said == ['n_symbols=40 there; texts must be numbered by the table of this voice, its end mark included.']
    import_published(tmp_path / 'ref.pt', tmp_path / 'again.pt')
    again = load_checkpoint(tmp_path / 'again.pt')
    assert {k: again[k] for k in ('step', 'hparams', 'symbols', 'digest', 'metrics')} == {k: state[k] for k in ('step', 'hparams', 'symbols', 'digest', 'metrics')}
    assert again['model'].keys() == state['model'].keys() and all(torch.equal(again['model'][k], v) for k, v in state['model'].items())


def test_the_reference_goes_on_with_our_moments(golden):
    "Its Adam numbers the weights in the order of the golden file"
    state = trained(golden)
    content, _ = as_published(state)
    named = {k: torch.nn.Parameter(content['state_dict'][k].clone()) for k in golden.weights if not k.endswith(('running_mean', 'running_var', 'num_batches_tracked'))}
    assert list(golden.weights) == list(content['state_dict'])
    adam = torch.optim.Adam(named.values(), lr=1.0)
    adam.load_state_dict(content['optimizer'])
    for name, p in named.items():
        assert torch.equal(adam.state[p]['exp_avg'], state['optimizer']['mean'][name]) and float(adam.state[p]['step']) == 3, name
    assert adam.param_groups[0]['lr'] == content['learning_rate'] == 1e-3
    for p in named.values(): p.grad = torch.ones_like(p)
    adam.step()


def test_published_rows(golden, tmp_path):
    "The published order: padding first, small letters lend their rows to capitals, the unknown is zero"
    state = trained(golden)
    content, said = as_published(state, rows='published')
    rows, row = content['state_dict']['embedding.weight'], {s: i for i, s in enumerate(SymbolTable.characters('en').symbols)}
    ours = state['model']['embedding.weight']
    for i, s in enumerate(PUBLISHED_SYMBOLS):
        want = ours[0] if s == '_' else ours[row[s]] if s in row else ours[row[s.lower()]] if s.lower() in row else torch.zeros_like(ours[0])
        assert torch.equal(rows[i], want), s
    assert '84 of them are zeros' in said[0] and content['optimizer']['state'] == {}


@pytest.mark.parametrize('change, word', [(dict(attention='forward'), 'attention=forward'), (dict(mel_norm='standard'), 'mel_norm=standard'),
                                          (dict(recurrent_regulariser='zoneout'), 'zoneout'), (dict(symbols_embedding_dim=16), 'symbols_embedding_dim')])
def test_what_has_no_counterpart(golden, change, word):
    state = dict(step=1, model={}, hparams={**to_dict(golden_hp(golden)), **change}, symbols=SymbolTable.characters('en').to_dict(),
                 mel_mean=0.0, mel_std=1.0, digest='', metrics={})
    from_dict(state['hparams'])
    with pytest.raises(UserError, match=word): as_published(state)


def test_from_the_command_line(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(wrapped(wide(golden.weights), 'repository', 'module.'), 'ref.pt')

    def call(*words):
        with pytest.raises(SystemExit) as ended: cli.main(list(words))
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err
    assert call('import', 'ref.pt', '-o', 'ours.pt')[:2] == (0, 'ours.pt: 148 symbols and 84 tensors of ref.pt (layout "repository", 7000 steps).\n')
    assert call('export', '--model', 'ours.pt', '-o', 'back.pt', '--rows', 'published')[0] == 0
    back = torch.load('back.pt', weights_only=True)
    assert all(torch.equal(back['state_dict'][k], v) for k, v in wide(golden.weights).items())
    assert call('import', 'ours.pt') == (2, '', 'ours.pt is a checkpoint of tts_tuner already; use it as it is.\n')
    status, _, err = call('export', '--model', 'ours.pt', '--layout', 'flat')
    assert status == 2 and 'repository, examples and weights' in err
