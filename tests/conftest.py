"""What several test files need."""
import os
import sys
from pathlib import Path

import pytest
from helpers import make_tiny_corpus


def pytest_runtest_setup(item) -> None:
    "A trainer tested before in this process has numbers next to nothing flushed to zero, and hypothesis draws some"
    if 'torch' in sys.modules: sys.modules['torch'].set_flush_denormal(False)


@pytest.fixture(scope='session')
def shared_data() -> Path:
    "Folder of reference data: TTS_TUNER_DATA, or `shared/data` beside the repository; tests that need it are skipped without"
    folder = Path(os.environ.get('TTS_TUNER_DATA') or Path(__file__).resolve().parents[2] / 'shared' / 'data')
    if not folder.is_dir(): pytest.skip('no reference data here: set TTS_TUNER_DATA to the folder that holds it')
    return folder


@pytest.fixture(scope='session')
def tiny_corpus(tmp_path_factory) -> Path:
    "24 short clips of beeps in the LJSpeech layout; tests that change it make their own with `helpers.make_tiny_corpus`"
    return make_tiny_corpus(tmp_path_factory.mktemp('tiny') / 'corpus')
