"""Trains Tacotron 2 voices, tunes them by itself, and knows by measurement when a run will never speak.

The usual names can be imported from here, and nothing heavy is loaded before one of them is asked for:

    from tts_tuner import Tacotron2, Tacotron2Loss, create_hparams, train, validate, load, TTSDataset, collate
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config.hparams import HParams as HParams
    from .config.hparams import create_hparams as create_hparams
    from .data.loader import TTSDataset as TTSDataset
    from .data.loader import collate as collate
    from .model.losses import Tacotron2Loss as Tacotron2Loss
    from .model.tacotron2 import Tacotron2 as Tacotron2
    from .training.trainer import load as load
    from .training.trainer import train as train
    from .training.trainer import validate as validate

__version__ = "0.1.0"

_HOMES = {
    'Tacotron2': 'model.tacotron2', 'Tacotron2Loss': 'model.losses', 'HParams': 'config.hparams', 'create_hparams': 'config.hparams',
    'train': 'training.trainer', 'validate': 'training.trainer', 'load': 'training.trainer', 'TTSDataset': 'data.loader', 'collate': 'data.loader',
}
__all__ = ['HParams', 'TTSDataset', 'Tacotron2', 'Tacotron2Loss', '__version__', 'collate', 'create_hparams', 'load', 'train', 'validate']


def __getattr__(name: str) -> Any:
    "A public name, imported when it is first asked for"
    if name not in _HOMES: raise AttributeError(f'module "tts_tuner" has no attribute "{name}"')
    return getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)


def __dir__() -> list[str]: return sorted([*globals(), *_HOMES])
