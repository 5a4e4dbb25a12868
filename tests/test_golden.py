"""The published reference, value by value: same weights, same batch, same outputs and gradients in float64."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tts_tuner.config.hparams import create_hparams
from tts_tuner.model.losses import Tacotron2Loss
from tts_tuner.model.tacotron2 import Tacotron2

OURS = dict(p_attention_dropout='attention_dropout', p_decoder_dropout='dropout_decoder', n_mel_channels='n_mels')
UNUSED = ('mask_padding', 'fp16_run')  # the reference's mask_padding is about outputs, which are always masked here


@pytest.fixture(scope='module')
def golden(shared_data):
    with np.load(shared_data / 'golden' / 'tacotron2_tiny.npz') as z: return {k: z[k] for k in z.files}


def reference_model(golden, dtype=torch.float64):
    config = {OURS.get(k, k): v for k, v in json.loads(str(golden['config'])).items() if k not in UNUSED}
    hp = create_hparams('default', dict(config, mask_padding=False, loss_reduction='padded', mel_loss='mse', prenet_dropout=0.0,
        guided_attention_weight=0.0))
    model = Tacotron2(hp).to(dtype).eval()
    model.load_state_dict({k.removeprefix('weight/'): torch.from_numpy(v) for k, v in golden.items() if k.startswith('weight/')})
    batch = SimpleNamespace(**{k: torch.from_numpy(golden[f'input/{k}']) for k in ('text', 'text_lengths', 'mel', 'mel_lengths', 'gate')})
    batch.mel, batch.gate = batch.mel.to(dtype), batch.gate.to(dtype)
    return hp, model, batch


def run(model, batch): return model(batch.text, batch.text_lengths, batch.mel, batch.mel_lengths)


@pytest.mark.parametrize('path', ['plain', 'fast', 'lean'])
def test_outputs_and_gradients(golden, path):
    hp, model, batch = reference_model(golden)
    model.decoder.path = path
    out = run(model, batch)
    for ours, name in zip(out, ('mel', 'mel_postnet', 'gate', 'alignment')):
        np.testing.assert_allclose(ours.detach().numpy(), golden[f'output/{name}'], rtol=0, atol=1e-10, err_msg=name)
    loss = Tacotron2Loss(hp)(out, batch).total
    assert abs(loss.item() - float(golden['output/loss'])) < 1e-10
    loss.backward()
    names = {k.removeprefix('gradient/') for k in golden if k.startswith('gradient/')}
    assert names == {k for k, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        want = golden[f'gradient/{name}']
        # The file holds float32: half of its last place cannot be known, all that goes beyond counts.
        known = np.spacing(np.abs(want)).astype(np.float64) / 2 if want.dtype == np.float32 else 0.0
        beyond = np.maximum(np.abs(p.grad.numpy() - want) - known, 0)
        assert np.linalg.norm(beyond) <= 1e-9 * np.linalg.norm(want.astype(np.float64)), name


def test_outputs_in_float32(golden):
    _, model, batch = reference_model(golden, torch.float32)
    for ours, name in zip(run(model, batch), ('mel', 'mel_postnet', 'gate', 'alignment')):
        np.testing.assert_allclose(ours.detach().numpy(), golden[f'output/{name}'], rtol=0, atol=1e-5, err_msg=name)


def test_masking_convolutions_is_the_only_difference(golden):
    "With padding kept from the convolutions the longest utterance, which has none in its text, keeps its alignment"
    _, model, batch = reference_model(golden)
    reference = run(model, batch).alignments
    model.hp = create_hparams('default', dict(mask_padding=True, n_frames_per_step=1))
    masked = run(model, batch).alignments
    longest = int(batch.text_lengths.argmax())
    torch.testing.assert_close(masked[longest], reference[longest])
    assert (masked - reference).abs().max() > 1e-6
