"""How long it takes to take a model back, and what the record of it costs.

    python bench/registry.py

A registry of 20 versions on a fresh SQLite store, with an audit log of 2,000 entries. Times of the registry and the log
without imports, medians of repeats, as wall clock; rolling back in a fresh process after its imports, the store opened anew; and the
whole command `tts-tune registry rollback` beside the import of MLflow alone, as processor time. On a shared machine the wall clock
is an upper bound.
"""
import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import results

from tts_tuner.training.sinks import connect_mlflow
from tts_tuner.tuner.audit import AuditLog, read_entry
from tts_tuner.tuner.deployment import Measurement
from tts_tuner.tuner.registry import ModelRegistry


def median(work: Callable[[], object], repeats: int) -> float:
    "Seconds of one call"
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        out.append(time.perf_counter() - start)
    return statistics.median(out)


FRESH = '''
import time
from mlflow.tracking import MlflowClient
import mlflow.store.tracking.sqlalchemy_store, mlflow.store.model_registry.sqlalchemy_store
from tts_tuner.tuner.audit import AuditLog
from tts_tuner.tuner.registry import ModelRegistry
start = time.perf_counter()
ModelRegistry.open('sqlite:///mlflow.db', audit=AuditLog('audit.jsonl')).rollback()
print(time.perf_counter() - start)
'''


def process(cwd: Path, *words: str) -> tuple[float, str]:
    "Processor seconds of a whole Python process, and what it printed"
    def spent() -> float: return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    out = subprocess.run([sys.executable, *words], cwd=cwd, check=True, capture_output=True, text=True).stdout
    return spent() - before, out


def cold(work: Callable[[], object]) -> Callable[[], object]:
    "`work` with no line of the log read before"
    def again() -> object:
        read_entry.cache_clear()
        return work()
    return again


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--versions', type=int, default=20)
    ap.add_argument('--entries', type=int, default=2000, help='of the audit log, before anything is measured')
    ap.add_argument('--repeats', type=int, default=9)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as room:
        home = Path(room)
        uri, log = f'sqlite:///{home}/mlflow.db', AuditLog(home / 'audit.jsonl', who='bench@here')
        client, _ = connect_mlflow(uri, 'bench')
        registry = ModelRegistry(client, 'tts_tuner', log)
        metrics: dict[str, float] = {'append an entry, s': median(lambda: log.record('study started', 'study bench'), a.repeats)}
        while log.verify().entries < a.entries - 50:
            for _ in range(50): log.record('study started', 'study bench')
        made = [time.perf_counter()]
        for k in range(a.versions):
            registry.register('file:///nowhere', '', [Measurement(0.5 + 0.01 * k, 'corpus')], True, 'bench', str(k))
            made.append(time.perf_counter())
        metrics['register with four aliases, s'] = statistics.median(b - a for a, b in zip(made, made[1:]))
        metrics['append an entry to the long log, s'] = median(lambda: log.record('study started', 'study bench'), a.repeats)
        metrics['verify the log, s'] = median(cold(registry.verify), a.repeats)
        metrics['entries verified a second'] = log.verify().entries / metrics['verify the log, s']
        metrics['roll back, s'] = median(cold(registry.rollback), min(a.repeats, a.versions - 7))
        metrics['roll back in a fresh process after imports, s'] = statistics.median(float(process(home, '-c', FRESH)[1]) for _ in range(3))
        metrics['import MLflow alone, processor s'] = process(home, '-c', 'from mlflow.tracking import MlflowClient')[0]
        command = ('-m', 'tts_tuner.cli', 'registry', 'rollback')
        metrics['tts-tune registry rollback with its imports, processor s'] = statistics.median(process(home, *command)[0] for _ in range(3))
        assert registry.verify().ok
    for name, value in metrics.items(): print(f'{name:<57}{value:10.4g}')
    results.save('registry', metrics)


if __name__ == '__main__': main()
