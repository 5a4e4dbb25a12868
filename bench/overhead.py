"""What the tuner takes of the machine while trials train: its processor time over the length of the trials.

    python bench/overhead.py                      # three trials of 10 s, then two of 90 s side by side; about 3 minutes
    python bench/overhead.py --seconds 60

Trainers are stand-ins that write as a small model does, twenty steps a second, with a validation every second. The tuner is
whole: engine, fleet with leases, detectors, decisions, and MLflow in a local database. What a tuner takes once, imports, the
making of the database, and what libraries load when they are first used, shows in a first short study and is counted apart.
Processor time is used, so other programs on the machine disturb little.
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results

FAKE = (sys.executable, str(Path(__file__).resolve().parents[1] / 'tests' / 'fake_trainer.py'))
PACE = 0.05  # seconds a step


def study(home: Path, name: str, trials: int, steps: int, workers: int) -> dict[str, float]:
    "Processor seconds of this process: before the first trainer works, while trainers work, and after; and the trainers' seconds"
    from tts_tuner.config.settings import load_settings
    from tts_tuner.tuner.loop import Data, run_study
    from tts_tuner.tuner.trials import PlainView
    begun, marks, at_work = time.process_time(), [], [0.0]

    class View(PlainView):
        last = time.monotonic()

        def say(self, text: str) -> None: ...

        def update(self, rows: Any) -> None:
            now, running = time.monotonic(), sum(r.state == 'running' for r in rows)
            if running: marks.append(time.process_time())
            at_work[0] += running * (now - self.last)
            self.last = now
    settings = load_settings(study=name, runs=str(home / 'runs'), workers=workers, trials=trials, hparams=f'max_steps={steps},device=cpu',
                             rungs=dict(steps=[steps - 40, steps - 20]), tracking=dict(uri=f'sqlite:///{home}/mlflow.db'))
    run_study(settings, View(), trainer=FAKE, prepare=lambda s, say: Data('corpus', 'abc'))
    return dict(before=marks[0] - begun, during=marks[-1] - marks[0], after=time.process_time() - marks[-1], trained=at_work[0])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seconds', type=float, default=90.0, help='length of a long trial')
    ap.add_argument('--trials', type=int, default=2, help='long trials side by side')
    ap.add_argument('--dry', action='store_true', help='write no results')
    a = ap.parse_args()
    os.environ['FAKE_PACE'] = str(PACE)
    with tempfile.TemporaryDirectory() as name:
        begun = time.process_time()
        short = study(Path(name), 'short', 3, round(10 / PACE), 2)
        once = time.process_time() - begun
        long = study(Path(name), 'long', a.trials, round(a.seconds / PACE), a.trials)
    share = long['during'] / long['trained']
    found = {'seconds of a trial': a.seconds, 'trials side by side': a.trials, "tuner's share of a trial, %": round(100 * share, 2),
             'processor s: once, imports and a new database': round(once - share * short['trained'], 1),
             'processor s: once a study, before and after': round(long['before'] + long['after'], 1)}
    for k, v in found.items(): print(f'{v:8g}  {k}')
    if not a.dry: results.save("the tuner's share of the machine", found, file='overhead')


if __name__ == '__main__': main()
