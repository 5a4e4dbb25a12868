"""How a benchmark leaves its figures: one JSON file in bench/results/, which the benchmark page shows as it stands.

    {"name": ..., "command": ..., "machine": ..., "date": ..., "metrics": {name: number}}

`name` says what was measured; files of the same name (other seeds) become rows of one table. `command` is what a reader
types to measure again.
"""
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from tts_tuner.config.files import write_atomic

FOLDER = Path(__file__).resolve().parent / 'results'


def machine() -> str:
    "Processor, cores, Python and torch, in one line"
    import os

    import torch
    names = [line.split(':', 1)[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')] \
        if Path('/proc/cpuinfo').exists() else []
    gpu = f', {torch.cuda.get_device_name()}' if torch.cuda.is_available() else ''
    return f'{os.cpu_count()} cores, {names[0] if names else platform.processor() or platform.machine()}{gpu}, ' \
        f'Python {platform.python_version()}, torch {torch.__version__}'


def command() -> str:
    "The command line of this process, from the repository's folder; DATA stands for folders of this machine"
    words = [f'DATA/{Path(w).name}' if Path(w).is_absolute() or w.startswith('..') else w for w in sys.argv[1:]]
    return shlex.join(['python', f'bench/{Path(sys.argv[0]).name}', *words])


def save(name: str, metrics: dict[str, float], file: str | None = None, **more: Any) -> Path:
    "Write bench/results/FILE.json (FILE is NAME when not given) and say so"
    path = FOLDER / f'{file or name}.json'
    content = dict(name=name, command=command(), machine=machine(), date=time.strftime('%Y-%m-%d'), metrics=metrics, **more)
    write_atomic(path, json.dumps(content, indent=1, ensure_ascii=False) + '\n')
    print(f'written: bench/results/{path.name}')
    return path


def run_metrics(run_dir: Path) -> list[dict[str, float]]:
    "metrics.jsonl of a run, oldest first"
    return [json.loads(line) for line in (run_dir / 'metrics.jsonl').read_text().splitlines() if line.strip()]


def winner(study: Path) -> Path:
    "Run folder of the trial whose model was handed over, by the study's last final decision"
    from tts_tuner.config.contracts import read_decisions
    final = [d for d in read_decisions(study / 'decisions.jsonl') if d.kind == 'final']
    if not final: sys.exit(f'{study} has no final decision: it is not finished, or it failed.')
    return sorted((study / final[-1].subject).glob('g*'))[-1]


FINAL = ('score', 'success', 'mcd', 'mcd_mean_frame', 'mcd_copy_synthesis', 'distance_ratio', 'stop_rate', 'alignment_score', 'free_alignment_score',
         'duration_ratio', 'token_accuracy', 'gate_accuracy')


def final_metrics(study: Path) -> dict[str, float]:
    "What the handed-over model measured on held-out sentences that were never spoken before, or in validation where too few were left"
    from tts_tuner.training.checkpoint import load_checkpoint
    from tts_tuner.tuner.exam import read_exam
    found, exam = load_checkpoint(study / 'best_model.pt'), read_exam(study)
    numbers = exam.metrics if exam else found['metrics']
    return {'step': found['step'], 'sentences': exam.sentences if exam else 0, **{k: float(numbers[k]) for k in FINAL if k in numbers}}
