"""A voice that hums: the smallest model that keeps the `TTSModel` protocol, and a program for the tuner.

It learns a pitch; `own.pitch` is the one it should learn, and `own.aim` how well it listens, from 0 to 1. No attention, no torch."""
import json
import math
import sys

import numpy as np

from tts_tuner.training.tts_model import train_model


class Hum:
    def __init__(self, corpus, hp, own):
        self.rate, self.goal, self.aim = min(hp.learning_rate * 10, 0.5), float(own.get('pitch', 220.0)), float(own.get('aim', 1.0))
        self.pitch, self.noise = 100.0, np.random.default_rng(hp.seed)

    def learn(self, step):
        error = self.goal - self.pitch + float(self.noise.normal())
        self.pitch += self.rate * self.aim * error
        return dict(train_loss=error ** 2, grad_norm=abs(error))

    def validate(self, step):
        near = math.exp(-abs(self.goal - self.pitch) / 50)
        return dict(val_loss=1 - near, success=near, score=near ** 2, distance_ratio=1 - near)

    def state(self): return dict(pitch=self.pitch, noise=json.dumps(self.noise.bit_generator.state))

    def load_state(self, state):
        self.pitch = state['pitch']
        self.noise.bit_generator.state = json.loads(state['noise'])

    def speak(self, text): return 0.1 * np.sin(2 * np.pi * self.pitch * np.arange(2205 * max(1, len(text))) / 22050), 22050


if __name__ == '__main__': sys.exit(train_model(Hum))
