"Trains Tacotron 2 voices, tunes them by itself, and knows by measurement when a run will never speak."
__version__ = "0.1.0"
