"The usual names, and what importing the package costs"
import subprocess
import sys

import pytest

import tts_tuner


@pytest.mark.parametrize('name', [n for n in tts_tuner.__all__ if n != '__version__'])
def test_usual_names_are_there_and_documented(name):
    found = getattr(tts_tuner, name)
    assert found.__name__ == name and found.__doc__ and not found.__doc__.startswith(f'{name}(')


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match='no attribute "Takotron"'): _ = tts_tuner.Takotron


def test_the_package_alone_is_light():
    code = 'import sys, tts_tuner; print([m for m in ("torch", "numpy", "mlflow", "optuna", "librosa", "pydantic", "typer") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
