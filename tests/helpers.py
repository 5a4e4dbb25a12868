"Small things that several test files make"
from pathlib import Path

from tts_tuner.config.hparams import HParams, create_hparams
from tts_tuner.data.demo import make_tone_corpus

_TINY = dict(frontend='characters', n_mels=20, symbols_embedding_dim=16, encoder_embedding_dim=16, encoder_n_convolutions=1, attention_rnn_dim=24,
             attention_dim=8, attention_location_n_filters=4, attention_location_kernel_size=5, decoder_rnn_dim=24, prenet_dim=16,
             postnet_embedding_dim=8, postnet_n_convolutions=2, batch_size=4, bucket_batches=2, n_validation=4, n_free_running=2, max_decoder_steps=80,
             device='cpu')


def make_tiny_corpus(root: Path, n: int = 24, seed: int = 0, speakers: tuple[str, ...] = ()) -> Path:
    "A corpus of beeps in the LJSpeech layout, one pitch a letter, about a second each, with word times; needs no synthesiser"
    return make_tone_corpus(root, n=n, seed=seed, speakers=speakers)


def tiny_hparams(**changes) -> HParams:
    "Settings of a very small model for `make_tiny_corpus`"
    return create_hparams('small', {**_TINY, **changes})
