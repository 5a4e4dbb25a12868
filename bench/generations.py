"""Generations against never changing anything, on simulated trainings whose best learning rate is known.

    python bench/generations.py

A simulated training closes a share of what its goal still lacks with every hundred steps: the largest share where its learning rate is
the right one, less to both sides, and it loses ground where the rate is five times too high. Validations are noisy (0.005). Three cases:
the recipe has the right rate, one four times too high, one four times too low. The same decisions as in a study, the same engine; what
is told to the engine about a generation is varied: the closing rate, the gain per step, the goal at its end, or nothing that it listens to (chance).
Goal reached after a training of 900 steps, mean over seeds with its standard error, and the steps that were trained for it. A simulation
shows how the rules behave, not what they bring on speech.
"""
import argparse
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import results

from tts_tuner.config.contracts import Decision
from tts_tuner.config.hparams import HParams, create_hparams
from tts_tuner.config.settings import RunSettings, check_settings
from tts_tuner.training.learner import lr_at
from tts_tuner.tuner.engines import open_engine
from tts_tuner.tuner.generations import Generation, goal, settles
from tts_tuner.tuner.ledger import Ledger, searched

CASES = {'the recipe is right': 1.0, 'its rate is 4 x too high': 0.25, 'its rate is 4 x too low': 4.0}
VALUES = ('closing rate', 'gain per step', 'goal at the end', 'chance')
BEST_SHARE, WIDTH, NOISE = 0.22, 0.9, 0.005


def train(gap: float, begun: int, end: int, hp: HParams, right: float) -> dict[int, float]:
    "What is lacking to 1 at each hundredth step, from what was lacking at the start"
    found, recipe = {}, replace(hp, learning_rate=create_hparams('small').learning_rate)
    for step in range(begun, end):
        off = math.log(lr_at(step, hp) / (right * lr_at(step, recipe)))
        share = BEST_SHARE * math.exp(-0.5 * (off / WIDTH) ** 2) - (0.1 if off > math.log(5) else 0.0)
        gap = min(1.0, gap * math.exp(-share / 100))
        if (step + 1) % 100 == 0: found[step + 1] = gap
    return found


class Simulated:
    "A study of generations without files and processes"

    def __init__(self, settings: RunSettings, case: float, value: str, seed: int, home: Path) -> None:
        narrowed, _ = searched(settings)
        self.ledger, self.engine, self.case, self.value = Ledger(settings), open_engine(narrowed, home), case, value
        self.noise, self.gaps, self.trained = np.random.default_rng(seed), dict[tuple[str, int], float](), 0

    def validations(self, g: Generation, hp: HParams) -> None:
        "All that a generation would show if nobody ended it"
        start = self.gaps[g.parent, g.begun] if g.parent else 1.0
        for step, gap in train(start, g.begun, self.ledger.max_steps, hp, self.case).items():
            self.gaps[g.name, step] = gap
            score = min(1.0, max(0.0, 1 - gap + NOISE * float(self.noise.normal())))
            shown = dict(score=score, alignment_score=0.97, val_loss=1 + gap, gate_accuracy=0.95)
            self.ledger.validations[g.name] = [*self.ledger.validations[g.name], (step, shown)]

    def told(self, g: Generation, step: int) -> float:
        seen = self.ledger.seen(g.name)
        end = goal(next(m for s, m in seen.own if s == step))
        return {'closing rate': seen.rate(step), 'goal at the end': end, 'chance': 0.0}.get(self.value, (end - goal(seen.before)) / max(1, step - g.begun))

    def ended(self, g: Generation) -> tuple[Decision, int]:
        "How and where a generation ends; what would have come after it is forgotten"
        for step, _ in self.ledger.validations[g.name]:
            _, d = self.ledger.at(g.name, step)
            if d.kind != 'continue': break
        self.ledger.validations[g.name] = [(s, m) for s, m in self.ledger.validations[g.name] if s <= step]
        self.trained += step - g.begun
        return d, step

    def run(self) -> float:  # true goal of the best checkpoint
        g = self.proposal('g001', '', 0)
        while True:
            self.ledger.add(g)
            self.validations(g, create_hparams('small', g.overrides))
            d, step = self.ended(g)
            kind = d.kind
            if g.number is not None: self.engine.tell(g.number, 'complete', self.told(g, step))
            if self.ledger.controller.end(self.ledger.cycle(g.name, step)) and self.ledger.controller.over: break
            if kind == 'continue': break
            name = f'g{int(g.name[1:]) + 1:03}'
            if kind == 'rollback': g = Generation(name, g.parent, g.begun, self.ledger.generations[g.parent].overrides, 'return')
            elif settles(d): g = Generation(name, *self.ledger.best(g.name)[:2], self.ledger.generations[g.parent].overrides, 'return')
            else: g = self.proposal(name, *self.ledger.best(g.name)[:2])
        best = max(((n, s, m) for n, v in self.ledger.validations.items() for s, m in v), key=lambda v: v[2]['score'])
        return 1 - self.gaps[best[0], best[1]]

    def proposal(self, name: str, parent: str, begun: int) -> Generation:
        number = sum(g.number is not None for g in self.ledger.generations.values())
        self.engine.ask(number + 1)
        return Generation(name, parent, begun, self.engine.trials()[number].overrides, 'proposal' if parent else 'recipe', number)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seeds', type=int, default=30)
    ap.add_argument('--count', type=int, default=8, help='generations at most')
    a = ap.parse_args()
    metrics: dict[str, float] = {}
    for case, right in CASES.items():
        never = 1 - list(train(1.0, 0, 900, create_hparams('small', dict(max_steps=900)), right).values())[-1]
        metrics[f'{case}: never changing'] = never
        print(f'{case}\n  {"never changing":<16} {never:.3f}            900 steps')
        for value in VALUES:
            goals, steps = [], []
            for seed in range(a.seeds):
                settings = check_settings({
                    'study': 's', 'hparams': dict(max_steps=900, device='cpu'), 'seed': seed, 'mode': 'generations', 'tracking': dict(enabled=False),
                    'optimization.generations.count': a.count, 'optimization.sampler': 'random' if value == 'chance' else 'tpe'})
                with tempfile.TemporaryDirectory() as home:
                    study = Simulated(settings, right, value, seed, Path(home))
                    goals.append(study.run())
                    steps.append(study.trained)
            error = statistics.stdev(goals) / math.sqrt(len(goals))
            metrics |= {f'{case}: {value}': statistics.mean(goals), f'{case}: {value}, standard error': error,
                        f'{case}: {value}, steps': statistics.mean(steps)}
            print(f'  {value:<16} {statistics.mean(goals):.3f} +- {error:.3f}  {statistics.mean(steps):.0f} steps', flush=True)
    results.save('generations', metrics)


if __name__ == '__main__': main()
