"""Load the public reference, NVIDIA/tacotron2, from a checkout, to measure it beside our own model on the same work.

    git clone https://github.com/NVIDIA/tacotron2 && python bench/train_step.py --reference tacotron2

Nothing of it is copied here. Its model code runs as it stands, with three shims: its hyper-parameters come as a plain object
(its own need TensorFlow 1), its length mask is made on any device, and its output mask is made out of place (the mask it
makes in place changes a tensor that the backward pass reads, so its gradient on padded batches is not the slope of its loss).
"""
import argparse
import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tts_tuner.config.hparams import HParams, create_hparams

# as hparams.py of the reference has them, text and data left out
PUBLISHED = dict(
    n_symbols=148, symbols_embedding_dim=512, encoder_kernel_size=5, encoder_n_convolutions=3, encoder_embedding_dim=512, n_frames_per_step=1,
    decoder_rnn_dim=1024, prenet_dim=256, max_decoder_steps=1000, gate_threshold=0.5, p_attention_dropout=0.1, p_decoder_dropout=0.1,
    attention_rnn_dim=1024, attention_dim=128, attention_location_n_filters=32, attention_location_kernel_size=31, postnet_embedding_dim=512,
    postnet_kernel_size=5, postnet_n_convolutions=5, n_mel_channels=80, mask_padding=True, fp16_run=False)
OURS = dict(p_attention_dropout='attention_dropout', p_decoder_dropout='dropout_decoder', n_mel_channels='n_mels')
_MODULES = ('model', 'layers', 'utils', 'stft', 'audio_processing', 'loss_function')


@contextlib.contextmanager
def _on_path(folder: Path, stubs: dict[str, types.ModuleType]) -> Iterator[None]:
    "Let the checkout's flat module names be found for a moment, with `stubs` instead of what the model does not need"
    kept = {name: sys.modules.pop(name) for name in (*_MODULES, *stubs) if name in sys.modules}
    sys.modules.update(stubs)
    sys.path.insert(0, str(folder))
    try: yield
    finally:
        sys.path.remove(str(folder))
        for name in (*_MODULES, *stubs): sys.modules.pop(name, None)
        sys.modules.update(kept)


def _stub(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    return module


def _length_mask(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def _parse_output(self: Any, outputs: list[torch.Tensor], output_lengths: torch.Tensor | None = None) -> list[torch.Tensor]:
    if not self.mask_padding or output_lengths is None: return outputs
    padding = ~_length_mask(output_lengths)
    mel, mel_postnet, gate, alignments = outputs
    return [mel.masked_fill(padding[:, None], 0.0), mel_postnet.masked_fill(padding[:, None], 0.0), gate.masked_fill(padding, 1e3), alignments]


def load(folder: str | Path) -> SimpleNamespace:
    "Model class, loss class and modules of the reference in `folder`; `hparams(**changes)` makes its settings"
    folder = Path(folder).resolve()
    if not (folder / 'model.py').is_file(): sys.exit(f'{folder} is not a checkout of github.com/NVIDIA/tacotron2: there is no model.py in it.')
    nothing = SimpleNamespace
    audio = _stub('audio_processing', dynamic_range_compression=None, dynamic_range_decompression=None, window_sumsquare=None)
    librosa, filters = _stub('librosa'), _stub('librosa.filters', mel=None)
    stubs = {'audio_processing': audio, 'stft': _stub('stft', STFT=nothing), 'librosa': librosa, 'librosa.filters': filters,
             'scipy': _stub('scipy'), 'scipy.io': _stub('scipy.io'), 'scipy.io.wavfile': _stub('scipy.io.wavfile', read=None)}
    with _on_path(folder, stubs):
        model, loss = importlib.import_module('model'), importlib.import_module('loss_function')
    model.get_mask_from_lengths = _length_mask  # type: ignore[attr-defined]
    model.Tacotron2.parse_output = _parse_output
    return SimpleNamespace(Tacotron2=model.Tacotron2, Tacotron2Loss=loss.Tacotron2Loss, module=model,
                           hparams=lambda **changes: SimpleNamespace(**{**PUBLISHED, **changes}))


def same_settings(theirs: SimpleNamespace, **changes: Any) -> HParams:
    "Our settings for the same work: same sizes, same dropout, padding seen by convolutions, loss over padding, no guide"
    sizes = {OURS.get(k, k): v for k, v in vars(theirs).items() if k not in ('mask_padding', 'fp16_run')}
    return create_hparams('paper', dict(sizes, mask_padding=False, loss_reduction='padded', mel_loss='mse', guided_attention_weight=0.0,
                                        gradient_checkpointing=False, **changes))


@contextlib.contextmanager
def no_dropout(reference: SimpleNamespace) -> Iterator[None]:
    "Switch every dropout of the reference off, for comparing numbers"
    reference.module.F = SimpleNamespace(**{**vars(F), 'dropout': lambda x, *_, **__: x})
    try: yield
    finally: reference.module.F = F


def add_argument(parser: argparse.ArgumentParser) -> None:
    "--reference, the same in every benchmark"
    parser.add_argument('--reference', type=Path, required=True, help='checkout of https://github.com/NVIDIA/tacotron2')


def ljspeech_lengths(folder: str | Path) -> tuple[list[int], list[int]]:
    """Characters and frames of LJSpeech's 12,500 training clips: the texts are real, from the file list of the reference; their
    sound is simulated at 15.2 characters a second with 10 % noise, from 1.11 to 10.10 s as the corpus is described"""
    lines = (Path(folder) / 'filelists' / 'ljs_audio_text_train_filelist.txt').read_text(encoding='utf-8').splitlines()
    characters = np.array([len(line.split('|')[1]) for line in lines])
    seconds = characters / 15.2 * (1 + 0.1 * np.random.default_rng(0).standard_normal(len(characters)))
    return characters.tolist(), (np.clip(seconds, 1.11, 10.10) * 22050 / 256).astype(int).tolist()
