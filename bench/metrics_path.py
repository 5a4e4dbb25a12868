"""What the way of a number costs, from the trainer to a decision.

    python bench/metrics_path.py

The trainer's thread with each sink, a tail of event files, MLflow in batches, the store, looks that find nothing beside a
thousand and a million points, and the time from a validation on disk to a decision on disk with another process writing.
Costs are processor time, best of three, for other work on a machine shows in wall time; what is a wall time says so.
"""
import argparse
import json
import os
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import results

from tts_tuner.config.contracts import Decision, Evidence
from tts_tuner.training.sinks import JsonlSink, MetricSink, MLflowSink, SinkGroup, TensorBoardSink, connect_mlflow, telemetry_off
from tts_tuner.training.streams import EventStream, News
from tts_tuner.tuner.book import Book
from tts_tuner.tuner.log_watcher import JsonlSource, LogWatcher, MetricSource, MlflowFileSource, TensorBoardSource
from tts_tuner.tuner.metrics_store import MetricsHistory, MetricsStore

ROW = ('train_loss', 'mel_loss', 'mel_postnet_loss', 'gate_loss', 'guided_attention_loss', 'learning_rate', 'grad_norm', 'alignment_score',
       'gate_accuracy', 'frames_per_second', 'epoch', 'memory_gb')  # what a training step tells


def best(work: Callable[[], object], repeats: int = 3, clock: Callable[[], float] = time.process_time) -> float:
    "Seconds, the least of some repeats"
    took = []
    for _ in range(repeats):
        begun = clock()
        work()
        took.append(clock() - begun)
    return min(took)


def hot_path(folder: Path, metrics: dict[str, float]) -> None:
    "Microseconds of the trainer's own thread for one number"
    def one(name: str, sinks: list[MetricSink], steps: int = 2000) -> None:
        group = SinkGroup([JsonlSink(folder / f'{name}.jsonl')], sinks)
        rows = [{k: 1.0 / (step + len(k)) for k in ROW} for step in range(steps)]
        group.log(0, rows[0])
        spent = best(lambda: [group.log(step, row) for step, row in enumerate(rows)], clock=time.thread_time)
        group.close()
        metrics[f'hot path, us a metric: {name}'] = 1e6 * spent / steps / len(ROW)

    one('stream', [])
    one('stream and event files', [TensorBoardSink(folder / 'board')])
    one('stream, event files and MLflow', [TensorBoardSink(folder / 'board'), MLflowSink(folder / 'run', f'sqlite:///{folder}/hot.db', 'bench')])
    try: import wandb  # noqa: F401
    except ImportError: return
    from tts_tuner.training.wandb_sink import WandbSink
    one('stream and Weights & Biases, offline', [WandbSink(folder / 'wandb_run')])


def event_file(path: Path, scalars: int, an_event: int, checked: bool = False) -> None:
    "Write an event file of so many numbers, quickly: without checksums of contents, except when asked for and at the end"
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    heads: dict[int, bytes] = {}
    with open(path, 'wb') as f:
        for step in range(scalars // an_event):
            content = Event(wall_time=1e9 + step, step=step, summary=Summary(value=[Summary.Value(tag=ROW[k], simple_value=2.5) for k in range(an_event)]))
            raw = content.SerializeToString()
            if len(raw) not in heads:
                length = struct.pack('<Q', len(raw))
                heads[len(raw)] = length + struct.pack('<I', masked_crc32c(length))
            f.write(heads[len(raw)] + raw + (struct.pack('<I', masked_crc32c(raw)) if checked else b'\0\0\0\0'))
        f.seek(-4, 2)
        f.write(struct.pack('<I', masked_crc32c(raw)))


def event_tail(folder: Path, metrics: dict[str, float], million: int) -> None:
    "Numbers a second"
    for an_event, name in ((1, 'one number a record'), (len(ROW), 'a step a record')):
        path = folder / f'events.{an_event}'
        event_file(path, million, an_event)
        n = million // an_event * an_event
        stream = []
        spent = best(lambda: stream.append(EventStream(path).read()), 2)  # noqa: B023
        assert sum(len(x.points) for x in stream[0][0]) == n
        metrics[f'event tail, numbers a second: {name}'] = n / spent
    small = folder / 'small'
    small.mkdir()
    event_file(small / 'events.out.tfevents.1', 50_000, 1, checked=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    rival = EventAccumulator(str(small), size_guidance={'scalars': 0, 'tensors': 0})
    spent = best(rival.Reload, 1)
    assert len(rival.Scalars(ROW[0])) == 50_000
    metrics['event tail, numbers a second: EventAccumulator'] = 50_000 / spent


def mlflow_writes(folder: Path, metrics: dict[str, float]) -> str:
    "Milliseconds for a metric; the store's address"
    from mlflow.entities import Metric
    uri = f'sqlite:///{folder}/mlflow.db'
    client, experiment = connect_mlflow(uri, 'bench')
    run = client.create_run(experiment).info.run_id
    batches = [[Metric(ROW[k % 12], 1.0, 1000 * (b * 84 + k // 12), b * 84 + k // 12) for k in range(1000)] for b in range(8)]
    singles = iter(range(10 ** 6, 10 ** 7))
    took, wall = [], []
    for batch in batches:
        begun, at = time.process_time(), time.perf_counter()
        client.log_batch(run, metrics=batch)
        took.append(time.process_time() - begun)
        wall.append(time.perf_counter() - at)
    metrics['MLflow, ms a metric: batches of 1,000'] = statistics.median(took)  # seconds a thousand
    metrics['MLflow, ms of wall time a metric: batches of 1,000'] = statistics.median(wall)
    metrics['MLflow, ms of wall time a metric: one by one'] = 1e3 * best(lambda: client.log_metric(run, 'x', 1.0, step=next(singles)), 20, time.perf_counter)
    history = len(client.get_metric_history(run, ROW[0]))
    spent = best(lambda: client.get_metric_history(run, ROW[0]), 3)
    metrics['MLflow, ms of a look with get_metric_history beside a million points, from its slope'] = 1e3 * spent / history * 1e6
    return uri


def idle(folder: Path, metrics: dict[str, float], million: int, uri: str) -> None:
    "Milliseconds of a look that finds nothing; then of one that finds a step"
    for n in (1000, million):
        place = folder / f'idle{n}'
        place.mkdir()
        lines = ''.join(json.dumps({'step': s, 'time': 1e9 + s, **dict.fromkeys(ROW, 2.5)}) + '\n' for s in range(n // len(ROW)))
        (place / 'metrics.jsonl').write_text(lines)
        event_file(place / 'events.out.tfevents.1', n, len(ROW))
        run = mlflow_points(uri.removeprefix('sqlite:///'), n)
        stream, board = JsonlSource('a', place / 'metrics.jsonl'), TensorBoardSource('b', place)
        tracker = MlflowFileSource('c', uri, run)
        for name, source in (('metrics.jsonl', stream), ('event files', board), ('MLflow file', tracker)):
            found = sum(len(x.points) for x in source.poll())
            assert abs(found - n) <= len(ROW), (name, found)
            metrics[f'idle look, ms: {name}, {n:,} points'] = 1e3 * idle_look(source)


def idle_look(source: MetricSource) -> float:
    "Seconds of wall time, median"
    took = []
    for _ in range(200):
        begun = time.perf_counter()
        assert source.poll() == []
        took.append(time.perf_counter() - begun)
    return statistics.median(took)


def mlflow_points(file: str, n: int) -> str:
    "Put so many points into an MLflow store, as its own tables; the run's id"
    db = sqlite3.connect(file)
    db.execute('PRAGMA synchronous = OFF')
    columns = [c[1] for c in db.execute('PRAGMA table_info(runs)')]
    run = f'{n:032d}'
    db.execute(f'INSERT INTO runs SELECT {", ".join("?" if c == "run_uuid" else c for c in columns)} FROM runs LIMIT 1', (run,))
    db.executemany('INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan) VALUES (?, ?, ?, ?, ?, 0)',
                   ((ROW[0], 2.5, 1000 * s, run, s) for s in range(n)))
    db.commit()
    db.close()
    return run


def store(folder: Path, metrics: dict[str, float], million: int) -> None:
    "Inserts and questions"
    path = folder / 'metrics.db'
    kept = MetricsStore(path)
    told = [[(f't{run:03d}/g001', [News(None, [(name, s, 2.5, 1e9 + s) for s in range(first, first + 250) for name in ROW])], str(first))]
            for run in range(4) for first in range(0, million // 48, 250)]
    points = sum(len(news.points) for batch in told for _, found, _ in batch for news in found)
    begun, at = time.process_time(), time.perf_counter()
    for batch in told: kept.take(batch)
    metrics['store, points a second: insert in batches of 3,000'] = points / (time.process_time() - begun)
    metrics['store, points a second: the same, wall time'] = points / (time.perf_counter() - at)
    again = told[:20]
    metrics['store, points a second: told again'] = 60_000 / best(lambda: [kept.take(batch) for batch in again])
    metrics['store, MB for a million points'] = 1e-6 * path.stat().st_size / points * 1e6
    read = MetricsHistory(path)
    one = [('t003/g001', [News(None, [(name, 10 ** 6, 2.5, 2e9) for name in ROW])], 'x')]
    metrics['store, ms: append a step of 12'] = 1e3 * best(lambda: kept.take(one), 20)
    for name, ask in (('latest 50 of a metric of a run', lambda: read.window(['gate_loss'], 't002', last=50)),
                      ('last point of all 48 series', lambda: read.latest()),
                      ('window of 1,000 steps', lambda: read.window(['gate_loss'], 't002', since_step=5000, until_step=5999)),
                      ('since a time, one series', lambda: read.window(['gate_loss'], 't002', since_time=1e9 + million // 48 - 100)),
                      ('min, max, mean and last of a metric in every run', lambda: read.summary(['gate_loss'])),
                      ('min, max, mean and last of all 48 series', lambda: read.summary())):
        metrics[f'store, ms at {points:,} points: {name}'] = 1e3 * best(ask)
    kept.close()
    metrics['store, ms: open it again and check it'] = 1e3 * best(lambda: MetricsStore(path).close())


WRITER = '''
import sys, time
from tts_tuner.training.sinks import JsonlSink
sink = JsonlSink(sys.argv[1])
for step in range(1, int(sys.argv[2]) + 1):
    time.sleep(0.01)
    row = dict(train_loss=3 / step)
    if step % 20 == 0: row |= dict(val_loss=2 / step, alignment_score=0.5)
    sink.log(step, row)
sink.close()
'''


def to_decision(folder: Path, metrics: dict[str, float], steps: int, poll: float = 0.1) -> None:
    "Wall time from a validation's stamp to its decision on disk: a live trainer's stand-in, a watcher with a store, the book"
    path = folder / 'study' / 't000' / 'g001' / 'metrics.jsonl'
    path.parent.mkdir(parents=True)
    kept, book = MetricsStore(folder / 'study' / 'metrics.db'), Book(folder / 'study' / 'decisions.jsonl')
    watcher = LogWatcher(kept)
    watcher.add(JsonlSource('t000/g001', path))
    writer = subprocess.Popen([sys.executable, '-c', WRITER, str(path), str(steps)])
    lags: list[float] = []
    spent, looks, begun = 0.0, 0, time.perf_counter()
    while writer.poll() is None or looks == 0:
        at = time.process_time()
        for news in watcher.poll().get('t000/g001', []):
            for name, step, value, stamp in news.points:
                if name != 'val_loss': continue
                book.record([Decision('promote', 't000', step, 'It goes on.', (Evidence('bench', 'seen', step, 1.0, 'seen', {'val_loss': value}),))])
                lags.append(time.time() - stamp)
        spent, looks = spent + time.process_time() - at, looks + 1
        time.sleep(poll)
    metrics['validation to decision, s of wall time: median'] = statistics.median(lags)
    metrics['validation to decision, s of wall time: worst'] = max(lags)
    metrics['watcher, store and book, share of a processor in %'] = 100 * spent / (time.perf_counter() - begun)
    kept.close()


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--points', type=int, default=1_000_000, help='of the large histories')
    ap.add_argument('--steps', type=int, default=1200, help='of the live run, a hundredth of a second each')
    ap.add_argument('--no-save', action='store_true', help='print only')
    a = ap.parse_args()
    telemetry_off()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room)
        hot_path(folder, metrics)
        event_tail(folder, metrics, a.points)
        uri = mlflow_writes(folder, metrics)
        idle(folder, metrics, a.points, uri)
        store(folder, metrics, a.points)
        to_decision(folder, metrics, a.steps)
    for name, value in metrics.items(): print(f'{name:95s} {value:12,.4g}')
    if not a.no_save: results.save('metrics_path', metrics)


if __name__ == '__main__': main()
