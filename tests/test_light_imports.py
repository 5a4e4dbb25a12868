"""The numeric core on a bare machine: torch and numpy are all that may be imported."""
import importlib.util
import subprocess
import sys

import pytest

BLOCK = '''
import importlib.abc, sys
import torch, numpy  # whatever these two bring along themselves is theirs

ALLOWED = {'torch', 'numpy', 'tts_tuner', *sys.stdlib_module_names, *(name.partition('.')[0] for name in sys.modules)}

TORCHS_OWN = {'torchgen', 'functorch', 'sympy', 'mpmath', 'opt_einsum', 'typing_extensions', 'triton'}  # which it may import late

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        if top in ALLOWED or top in TORCHS_OWN: return None
        raise ImportError(f'{name} is not there on a bare machine')

for name in ('mlflow', 'optuna', 'librosa', 'soundfile', 'omegaconf', 'pydantic', 'rich', 'matplotlib', 'tensorboard', 'scipy', 'typer'):
    assert name not in sys.modules, name
    ALLOWED.discard(name)
sys.meta_path.insert(0, Block())
'''

MODEL = '''
from tts_tuner.config.hparams import create_hparams
from tts_tuner.model.losses import Tacotron2Loss
from tts_tuner.model.tacotron2 import Tacotron2
from types import SimpleNamespace

hp = create_hparams('small', 'n_symbols=12,n_mels=8,attention_rnn_dim=16,decoder_rnn_dim=16')
model, n, m = Tacotron2(hp), torch.tensor([5, 3]), torch.tensor([8, 4])
batch = SimpleNamespace(text=torch.randint(2, 12, (2, 5)), text_lengths=n, mel=torch.randn(2, 8, 8), mel_lengths=m, gate=torch.ones(2, 2))
Tacotron2Loss(hp)(model(batch.text, n, batch.mel, m), batch).total.backward()
assert all(torch.isfinite(p.grad).all() for p in model.parameters())
assert torch.isfinite(model.eval().infer(batch.text, n, max_steps=3).mel).all()
print('learned')
'''

CORE = ['config.errors', 'config.hparams', 'config.files', 'config.contracts', 'model.layers', 'model.attention', 'model.encoder', 'model.decoder',
    'model.tacotron2', 'model.losses', 'model.int8', 'model.speaking', 'training.checkpoint', 'training.guard', 'training.evaluate', 'training.trainer']


def bare(code): return subprocess.run([sys.executable, '-c', BLOCK + code], capture_output=True, text=True, timeout=120)


def test_the_block_blocks():
    out = bare('import pydantic')
    assert out.returncode != 0 and 'not there on a bare machine' in out.stderr


@pytest.mark.parametrize('module', CORE)
def test_core_imports_with_torch_and_numpy_alone(module):
    if importlib.util.find_spec(f'tts_tuner.{module}') is None: pytest.skip(f'tts_tuner.{module} is not there')
    out = bare(f'import tts_tuner.{module}')
    assert out.returncode == 0, out.stderr


def test_the_model_learns_with_torch_and_numpy_alone():
    out = bare(MODEL)
    assert out.returncode == 0 and 'learned' in out.stdout, out.stderr


def test_the_package_itself_imports_nothing_heavy():
    heavy = "('torch', 'numpy', 'mlflow', 'optuna', 'librosa', 'pydantic', 'omegaconf', 'matplotlib', 'typer', 'rich')"
    out = subprocess.run([sys.executable, '-c', f'import sys, tts_tuner; print([m for m in {heavy} if m in sys.modules])'],
        capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == '[]', out.stdout + out.stderr
