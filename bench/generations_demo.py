"""Generations against a recipe that is left alone, on the demonstration corpus: the same steps, the same corpus, the same seed, one after the other.

    python bench/generations_demo.py --corpus DATA/demo --data DATA [--steps 900]

About seven minutes on two quiet cores. What is kept: the best score of a validation, the score of the exam, generations, wall clock."""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results

from tts_tuner.config.contracts import read_decisions


def tuned(home: Path, study: str, *words: str) -> dict[str, float]:
    "Run one study; what came of it"
    begun = time.monotonic()
    subprocess.run([sys.executable, '-m', 'tts_tuner.cli', 'run', '--study', study, '--tracking', 'none', f'core_engine.runs={home}', *words], check=True)
    folder = home / study
    final = [d for d in read_decisions(folder / 'decisions.jsonl') if d.kind == 'final'][-1]
    exam = folder / 'exam' / 'exam.json'
    out = {'score of the best validation': final.evidence[0].numbers['score'], 'minutes': round((time.monotonic() - begun) / 60, 2)}
    if exam.is_file(): out['score of the exam'] = json.loads(exam.read_text())['metrics']['score']
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--corpus', required=True, help='the demonstration corpus, made by `tts-tune demo-corpus`')
    parser.add_argument('--data', required=True, help='folder for the feature cache')
    parser.add_argument('--steps', type=int, default=900)
    a = parser.parse_args()
    common = ('--corpus', a.corpus, '--hparams', f'max_steps={a.steps},device=cpu', f'core_engine.data={a.data}')
    with tempfile.TemporaryDirectory() as room:
        home = Path(room)
        left = tuned(home, 'left_alone', *common, '--trials', '1')
        found = tuned(home, 'generations', *common, '--mode', 'generations')
        made = len(list((home / 'generations' / 't000').glob('g*')))
    metrics = {f'{who}: {k}': v for who, got in (('the recipe left alone', left), ('generations', found)) for k, v in got.items()}
    metrics['generations: how many'] = made
    results.save('generations on the demonstration corpus', metrics, 'generations_demo', steps=a.steps)


if __name__ == '__main__': main()
