"Watching runs and keeping their metrics: sources, store, sinks, through kills, full disks, damaged files and clocks that jump"
import json
import math
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.training import sink_suite
from tts_tuner.training.sinks import JsonlSink, MLflowSink, TensorBoardSink, connect_mlflow, read_metrics, rewind
from tts_tuner.training.streams import BLOCK, EventStream, Framing, LineStream, News, Tail
from tts_tuner.tuner import source_suite
from tts_tuner.tuner.histories import read_events
from tts_tuner.tuner.log_watcher import (Apart, JsonlSource, LogWatcher, MlflowFileSource, MlflowServerSource, TensorBoardSource, mlflow_source,
                                         sources_of)
from tts_tuner.tuner.metrics_store import MOST, MetricsHistory, MetricsStore
from tts_tuner.tuner.trials import MetricsReader


def row(step, **numbers): return json.dumps({'step': step, 'time': 1e9 + step, **(numbers or {'loss': 1 / step})}) + '\n'


def steps(news): return [p[1] for n in news for p in n.points]


# Streams


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 30), st.just('look'), st.just('cut'), st.just('resume')), max_size=25), st.integers(0, 9))
def test_a_stream_tells_what_the_file_holds_whatever_happened_to_it(tmp_path_factory, doings, torn):
    path = tmp_path_factory.mktemp('stream') / 'metrics.jsonl'
    source, kept, step = JsonlSource('t', path), {}, 0
    for what in [*doings, 'look']:
        if what == 'look': source_suite.settle(kept, source.poll())
        elif what == 'cut' and path.exists(): step = rewind(path, step // 2) and step // 2 or step
        elif what == 'resume':
            mark, source = source.mark(), JsonlSource('t', path)
            source.resume(mark)
        elif isinstance(what, int):
            text = ''.join(row(s, loss=float(len(doings) + what + s)) for s in range(step + 1, step + what + 1))
            step += what
            with open(path, 'ab') as f:
                f.write(text.encode()[:-torn or None])
                f.flush()
                source_suite.settle(kept, source.poll())  # in the middle of a line
                f.write(text.encode()[len(text) - torn:] if torn else b'')
    assert kept == {('loss', r['step']): r['loss'] for r in read_metrics(path)}


def test_a_line_longer_than_a_block_is_read(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(row(1) + json.dumps({'step': 2, 'note': 'x' * 3 * BLOCK, 'loss': 0.5}) + '\n' + row(3))
    assert [r['step'] for r in LineStream(path).read()[1]] == [1, 2, 3]


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(row(1) + '{"step": 2, "lo\n[3]\n{"step": "4"}\n{"step": 5, "time": null}\n{"step": 1' + '0' * 40 + '}\n\xff\n{"loss": 1}\n\n' + row(6))
    assert steps(JsonlSource('t', path).poll()) == [1, 6] and sorted(r['step'] for r in MetricsReader(path).read()) == [1, 6]


def test_a_file_replaced_in_the_middle_of_a_look_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(''.join(row(s) for s in range(1, 4001)))
    monkeypatch.setattr('tts_tuner.training.streams.BLOCK', 20_000)
    stream, looks = LineStream(path), []
    read = stream.tail.read

    def and_then_cut():
        if len(looks) == 3: rewind(path, 700)
        looks.append(1)
        return read()

    stream.tail._block = 20_000
    stream.tail.read = and_then_cut
    kept = {}
    for _ in range(2):
        void, rows = stream.read()
        source_suite.settle(kept, [News(void, [('loss', r['step'], r['loss'], 0.0) for r in rows])])
    assert sorted(s for _, s in kept) == list(range(1, 701)) and len(looks) > 4


def test_a_file_rewritten_in_place_is_noticed(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(''.join(row(s) for s in range(1, 4)))
    stream = LineStream(path)
    stream.read()
    with open(path, 'r+') as f: f.write(''.join(row(s, loss=9.0) for s in range(1, 6)))
    void, rows = stream.read()
    assert void == 0 and [r['loss'] for r in rows] == [9.0] * 5


def test_a_copy_of_the_file_with_more_in_it_is_the_same_file(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text(''.join(row(s) for s in range(1, 2001)))
    stream = LineStream(path)
    stream.read()
    other = tmp_path / 'copy'
    other.write_text(''.join(row(s) for s in range(1, 2004)))
    os.replace(other, path)
    void, rows = stream.read()
    assert void is None and [r['step'] for r in rows] == [2001, 2002, 2003]


def test_the_reader_of_a_trial_lets_go_what_was_cut(tmp_path):
    sink = JsonlSink(tmp_path / 'metrics.jsonl', seconds=0)
    reader = MetricsReader(sink.path)
    for step in range(1, 11): sink.log(step, dict(train_loss=1 / step))
    reader.read()
    rewind(sink.path, 6)
    sink.log(7, dict(train_loss=9.0))
    reader.read()
    assert reader.step == 7 and reader.rows[7] == {'train_loss': 9.0} and sorted(reader.last_time) == list(range(1, 8))


def board(folder, first, last, resumed=None, **more):
    sink = TensorBoardSink(folder, resumed)
    for step in range(first, last + 1): sink.log(step, dict(loss=1 / step, **more))
    sink.close()
    return max(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns)


def test_half_a_record_is_waited_for_wherever_it_is_cut(tmp_path):
    whole = board(tmp_path / 'a', 1, 3).read_bytes()
    path = tmp_path / 'events.out.tfevents.1'
    for cut in range(len(whole)):
        path.unlink(missing_ok=True)
        path.write_bytes(whole[:cut])
        stream = EventStream(path)
        told = steps(stream.read()[0])
        with open(path, 'ab') as f: f.write(whole[cut:])
        told += steps(stream.read()[0])
        assert told == [1, 2, 3] and stream.framing.damaged == 0, cut


def test_a_file_that_lost_its_end_and_is_written_on_loses_only_the_torn_record(tmp_path):
    whole = board(tmp_path / 'a', 1, 6).read_bytes()
    ends = [sum(16 + len(c) for c in Framing().split(whole)[0][:k]) for k in range(8)]
    for cut in range(ends[3], ends[4]):  # in the middle of the third step
        path = tmp_path / f'events.out.tfevents.{cut}'
        path.write_bytes(whole[:cut] + whole[ends[4]:])
        news, _ = EventStream(path).read()
        assert steps(news) == [1, 2, 4, 5, 6], cut


def test_a_truncated_event_file_is_survived(tmp_path):
    path = board(tmp_path, 1, 50)
    source, kept = TensorBoardSource('t', tmp_path), {}
    source_suite.settle(kept, source.poll())
    data = path.read_bytes()
    with open(path, 'r+b') as f: f.truncate(len(data) // 2)
    source_suite.settle(kept, source.poll())
    left = max(s for _, s in kept)
    assert 20 < left < 30 and len(kept) == left
    with open(path, 'ab') as f: f.write(data[len(data) // 2:])
    source_suite.settle(kept, source.poll())
    assert sorted(s for _, s in kept) == list(range(1, 51)) and source.poll() == []


def test_numbers_written_as_tensors_are_numbers_and_pictures_are_none(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(tmp_path))
    scalars = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name='scalars'))
    values = [Summary.Value(tag='new', tensor=make_tensor_proto(2.5), metadata=scalars), Summary.Value(tag='zero', simple_value=0.0),
              Summary.Value(tag='text', tensor=make_tensor_proto('words')), Summary.Value(tag='map', image=Summary.Image(height=1, width=1))]
    writer.add_event(Event(wall_time=5.0, step=3, summary=Summary(value=values)))
    writer.close()
    files = list(tmp_path.glob('events*'))
    assert read_events(files) == {'new': [(3.0, 2.5)], 'zero': [(3.0, 0.0)]}
    assert TensorBoardSource('t', tmp_path).poll() == [News(None, [('new', 3, 2.5, 5.0), ('zero', 3, 0.0, 5.0)])]


def test_what_is_no_event_file_says_nothing(tmp_path):
    (tmp_path / 'events.out.tfevents.1').write_bytes(os.urandom(3000))
    (tmp_path / 'events.out.tfevents.2').write_bytes(bytes(3000))
    assert TensorBoardSource('t', tmp_path).poll() == []
    assert Tail(tmp_path / 'absent').read() == (b'', False)


# MLflow


@pytest.fixture(scope='module')
def mlflow_uri(tmp_path_factory):
    uri = f'sqlite:///{tmp_path_factory.mktemp("mlflow")}/mlflow.db'
    connect_mlflow(uri, 'watched')
    return uri


class MlflowWriter:
    "A training that logs with MLflow's own client; one run for each folder"

    def __init__(self, uri, folder):
        self.client, experiment = connect_mlflow(uri, 'watched')
        note = folder / 'run'
        if not note.is_file(): note.write_text(self.client.create_run(experiment).info.run_id)
        self.run, self.waiting = note.read_text(), []

    def log(self, step, metrics):
        from mlflow.entities import Metric
        self.waiting += [Metric(k, v, time.time_ns() // 1_000_000, step) for k, v in metrics.items()]

    def flush(self):
        for k in range(0, len(self.waiting), 1000): self.client.log_batch(self.run, metrics=self.waiting[k:k + 1000])
        self.waiting.clear()

    close = flush


def run_of(folder): return (folder / 'run').read_text() if (folder / 'run').is_file() else 'none'


class InProcess(MlflowServerSource):
    "A server without the network: MLflow's own store answers, in the words of its server"

    def _get(self, what, **words):
        from mlflow.exceptions import MlflowException
        client, _ = connect_mlflow(self.uri, 'watched')
        as_json = lambda m: json.loads(json.dumps(dict(key=m.key, value=m.value if math.isfinite(m.value) else str(m.value), step=m.step, timestamp=m.timestamp)))
        try:
            if what == 'runs/get': return dict(run=dict(data=dict(metrics=[as_json(m) for m in client.get_run(self.run_id).data.to_proto().metrics])))
        except MlflowException: return dict(run=dict(data=dict()))
        found = client._tracking_client.store.get_metric_history_bulk_interval(words['run_ids'], words['metric_key'], words['max_results'],
                                                                              words['start_step'], words['end_step'])
        return dict(metrics=[as_json(m.metric if hasattr(m, 'metric') else m) for m in found])


@pytest.mark.parametrize('check', source_suite.CHECKS, ids=lambda c: c.__name__)
def test_mlflow_in_a_file_keeps_what_every_source_keeps(check, mlflow_uri, tmp_path):
    check(lambda folder, resumed: MlflowWriter(mlflow_uri, folder), lambda folder: MlflowFileSource('t', mlflow_uri, run_of(folder)), tmp_path)


@pytest.mark.parametrize('check', source_suite.CHECKS[1:5], ids=lambda c: c.__name__)
def test_mlflow_by_its_server_keeps_what_every_source_keeps(check, mlflow_uri, tmp_path):
    check(lambda folder, resumed: MlflowWriter(mlflow_uri, folder), lambda folder: InProcess('t', mlflow_uri, run_of(folder), most=7), tmp_path)


class Server:
    "Answers as MLflow's server does, or not at all"

    def __init__(self, points, hang=0.0):
        outer = self
        self.asked, self.points, self.hang, self.given = [], points, hang, ''

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                time.sleep(outer.hang)
                address = urlparse(self.path)
                words = parse_qs(address.query)
                outer.asked.append(address.path.rsplit('/', 1)[-1])
                outer.given = self.headers.get('Authorization', '')
                as_json = lambda p: dict(key=p[0], step=str(p[1]), value=p[2], timestamp=str(int(1000 * p[3])))
                if address.path.endswith('runs/get'):
                    latest = {p[0]: p for p in sorted(outer.points, key=lambda p: p[1])}
                    body = dict(run=dict(data=dict(metrics=[as_json(p) for p in latest.values()])))
                else:
                    low, high = (int(words[k][0]) for k in ('start_step', 'end_step'))
                    body = dict(metrics=[as_json(p) for p in outer.points if p[0] == words['metric_key'][0] and low <= p[1] <= high])
                raw = json.dumps(body).encode()
                self.send_response(200)
                self.send_header('Content-Length', str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *a): pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.uri = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_a_server_is_asked_once_when_nothing_moved_and_with_the_users_credentials(monkeypatch):
    monkeypatch.setenv('MLFLOW_TRACKING_TOKEN', 'canary-of-a-token')
    server = Server([('loss', s, 1 / s, 1e9 + s) for s in range(1, 6)] + [('odd', 1, 'NaN', 1e9)])
    source = MlflowServerSource('t', server.uri, 'a1')
    told = source.poll()[0].points
    assert [p[1] for p in told if p[0] == 'loss'] == [1, 2, 3, 4, 5] and math.isnan(next(p[2] for p in told if p[0] == 'odd'))
    server.asked.clear()
    assert source.poll() == [] and server.asked == ['get'] and server.given == 'Bearer canary-of-a-token'
    assert 'canary' not in source.mark()
    server.points.append(('loss', 6, 0.1, 1e9 + 6))
    later = MlflowServerSource('t', server.uri, 'a1')
    later.resume(source.mark())
    assert steps(later.poll()) == [6]
    server.server.shutdown()


def test_a_server_that_hangs_holds_nobody():
    server, said = Server([], hang=3.0), []
    watcher = LogWatcher(say=said.append)
    watcher.add(Apart(MlflowServerSource('t', server.uri, 'a1', seconds=0.2)))
    begun, longest = time.monotonic(), 0.0
    while not said and time.monotonic() - begun < 10:
        at = time.monotonic()
        watcher.poll()
        longest = max(longest, time.monotonic() - at)
        time.sleep(0.02)
    assert longest < 0.15 and said[0].startswith('t is not watched for now: The MLflow server') and 'timed out' in said[0].lower()
    watcher.drop('t')
    server.server.shutdown()


def test_mlflow_stores_that_are_none_are_named(tmp_path):
    (tmp_path / 'other.db').write_text('words' * 1000)
    with pytest.raises(TTSTunerError, match='is not an MLflow store'): MlflowFileSource('t', f'sqlite:///{tmp_path}/other.db', 'a').poll()
    db = sqlite3.connect(tmp_path / 'old.db')
    db.execute('CREATE TABLE metrics (key, value)')
    db.close()
    with pytest.raises(UserError, match='another kind'): MlflowFileSource('t', f'sqlite:///{tmp_path}/old.db', 'a').poll()
    assert MlflowFileSource('t', f'sqlite:///{tmp_path}/absent.db', 'a').poll() == [] and not (tmp_path / 'absent.db').exists()
    with pytest.raises(UserError, match='mlflow server'): mlflow_source('t', 'mysql://host/db', 'a')
    assert isinstance(mlflow_source('t', 'http://localhost:1', 'a'), Apart)


def test_an_mlflow_store_in_the_middle_of_a_transaction_is_read_later(mlflow_uri, tmp_path):
    writer = MlflowWriter(mlflow_uri, tmp_path)
    source = MlflowFileSource('t', mlflow_uri, writer.run)
    writer.log(1, dict(loss=1.0))
    writer.flush()
    assert steps(source.poll()) == [1]
    db = sqlite3.connect(mlflow_uri.removeprefix('sqlite:///'), isolation_level=None)
    db.execute('BEGIN EXCLUSIVE')
    assert source.poll() == []
    db.execute('ROLLBACK')
    db.close()
    writer.log(2, dict(loss=1.0))
    writer.flush()
    assert steps(source.poll()) == [2]


# Store


def study(folder, runs=1, last=20):
    for k in range(runs):
        place = folder / f't{k:03d}' / 'g001'
        place.mkdir(parents=True)
        (place / 'metrics.jsonl').write_text(''.join(row(s) for s in range(1, last + 1)))
    return folder


def rows_of(path, run='t000/g001', name='loss'):
    history = MetricsHistory(path)
    found = history.window([name], run)
    history.close()
    return dict(zip(found[0].steps.tolist(), found[0].values.tolist(), strict=True)) if found else {}


def test_the_store_is_made_of_the_run_folders_and_the_same_rows_change_nothing(tmp_path):
    store = MetricsStore(study(tmp_path) / 'metrics.db')
    told = [json.loads(row(s)) for s in range(1, 21)]
    before = MetricsHistory(store.path).summary()
    for _ in range(2): store.append('t000/g001', told)
    assert MetricsHistory(store.path).summary() == before and before[0].n == 20
    store.append('t000/g001', [dict(step=11, time=5.0, loss=7.0)], void_from=11)
    assert list(rows_of(store.path)) == list(range(1, 12)) and rows_of(store.path)[11] == 7.0
    store.close()


def test_windows(tmp_path):
    store = MetricsStore(tmp_path / 'metrics.db')
    for g in (1, 2): store.append(f't000/g00{g}', [dict(step=s, time=100.0 * g + s, pesq=s / 10, stoi=0.5, mos=math.inf if s == 3 else s) for s in range(1, 11)])
    store.append('t0001/g001', [dict(step=1, time=1.0, loss=math.nan)])
    history = MetricsHistory(store.path)
    assert [(s.run, s.name, s.steps.tolist()) for s in history.window(['pesq'], 't000', last=2)] == [(f't000/g00{g}', 'pesq', [9, 10]) for g in (1, 2)]
    assert [s.steps.tolist() for s in history.window(['stoi'], 't000/g002', since_step=3, until_step=5)] == [[3, 4, 5]]
    assert [(s.run, s.steps.tolist()) for s in history.window(['pesq'], since_time=209.0)] == [('t000/g002', [9, 10])]
    found = {(s.run, s.name): s for s in history.summary()}
    assert found['t000/g001', 'mos'].max == math.inf and found['t000/g001', 'pesq'].mean == pytest.approx(0.55)
    assert found['t0001/g001', 'loss'].bad == 1 and math.isnan(found['t0001/g001', 'loss'].mean) and len(history.window(['loss'], last=1)) == 1
    assert history.latest(['pesq', 'stoi'], 't000/g001') == {'t000/g001': {'pesq': (10, 1.0), 'stoi': (10, 0.5)}}
    assert history.runs('t000') == ['t000/g001', 't000/g002'] and history.window(of='t9') == [] and history.names() == ['loss', 'mos', 'pesq', 'stoi']
    with pytest.raises(UserError, match='Did you mean "pesq"'): history.window(['pesc'])
    store.close()


WRITER = '''
import sys, time
from tts_tuner.tuner.metrics_store import MetricsStore
store = MetricsStore(sys.argv[1])
step = 0
while True:
    store.append('t000/g001', [dict(step=s, time=float(s), a=float(s), b=-float(s)) for s in range(step + 1, step + 51)])
    step += 50
    print(step, flush=True)
'''


def write_in_another_process(path): return subprocess.Popen([sys.executable, '-c', WRITER, str(path)], stdout=subprocess.PIPE, text=True)


def test_two_readers_beside_a_live_writer_that_is_killed(tmp_path):
    path = tmp_path / 'metrics.db'
    writer = write_in_another_process(path)
    writer.stdout.readline()
    one, two, seen = MetricsHistory(path), MetricsHistory(path), 0
    longest, deadline = 0.0, time.monotonic() + 20
    for _ in range(60):
        begun = time.monotonic()
        for history in (one, two):
            a, b = history.window(last=50)
            assert a.steps[-1] % 50 == 0 and len(a.steps) == 50 and a.steps[-1] >= seen, 'half of a transaction was seen'
            seen = int(min(a.steps[-1], b.steps[-1]))
        longest = max(longest, time.monotonic() - begun)
        if time.monotonic() > deadline: break
    writer.send_signal(signal.SIGKILL)
    said = max(int(x) for x in writer.stdout.read().split() if x)
    assert writer.wait() == -signal.SIGKILL and longest < 2
    assert one.latest()['t000/g001']['a'][0] >= said  # what was said to be kept is kept
    store, complaints = MetricsStore(path, say=lambda text: complaints.append(text)), []
    store.append('t000/g001', [dict(step=10 ** 6, time=1.0, a=1.0)])
    assert not complaints and one.latest()['t000/g001']['a'] == (10 ** 6, 1.0)
    store.close()


def test_a_watcher_that_was_killed_goes_on_where_the_store_ends(tmp_path):
    folder = study(tmp_path, last=300)
    store, told = MetricsStore(folder / 'metrics.db'), []
    stream = folder / 't000' / 'g001' / 'metrics.jsonl'
    for first in (301, 401):
        with open(stream, 'a') as f: f.write(''.join(row(s) for s in range(first, first + 100)))
        watcher = LogWatcher(store)
        for source in sources_of(folder): watcher.add(source)
        told += [steps(news) for news in watcher.poll().values()]
        store = MetricsStore(folder / 'metrics.db')  # the one before was never closed
    assert told == [list(range(301, 401)), list(range(401, 501))] and len(rows_of(store.path)) == 500
    rewind(stream, 450)  # while nobody watched
    with open(stream, 'a') as f: f.write(row(451, loss=9.0))
    watcher = LogWatcher(store)
    for source in sources_of(folder): watcher.add(source)
    watcher.poll()
    kept = rows_of(store.path)
    assert max(kept) == 451 and kept[451] == 9.0 and len(kept) == 451


def test_a_full_disk_costs_time_only(tmp_path):
    said = []
    store = MetricsStore(study(tmp_path) / 'metrics.db', say=said.append)
    (pages,) = store._tables.db.execute('PRAGMA page_count').fetchone()
    store._tables.db.execute(f'PRAGMA max_page_count = {pages}')
    for first in range(21, 4000, 100):
        store.append('t000/g001', [dict(step=s, time=1.0, other=1.0, loss=2.0) for s in range(first, first + 100)])
    assert len(said) == 1 and 'cannot be written for now (database or disk is full)' in said[0] and len(rows_of(store.path)) < 1000
    store._tables.db.execute('PRAGMA max_page_count = 100000')
    store.append('t000/g001', [dict(step=5000, time=1.0, loss=2.0)])
    assert len(said) == 2 and len(rows_of(store.path)) == 20 + 4000 + 1 and len(rows_of(store.path, name='other')) == 4000
    store.close()


def test_points_that_are_too_many_to_wait_are_read_again_from_the_run_folders(tmp_path):
    store, said = MetricsStore(study(tmp_path, last=100) / 'metrics.db', say=lambda text: said.append(text)), []
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute('BEGIN IMMEDIATE')  # somebody holds the file
    with open(tmp_path / 't000/g001/metrics.jsonl', 'a') as f: f.write(''.join(row(s) for s in range(101, 201)))
    store.take([('t000/g001', [News(None, [('loss', s, 1.0, 1.0) for s in range(101, 201)] + [('gone', s, 0.0, 0.0) for s in range(MOST)])], '')])
    assert 'locked' in said[0] and not store._waiting
    begun = time.monotonic()
    for step in range(3): store.append('t000/g001', [dict(step=300 + step, time=1.0, loss=0.0)])
    assert time.monotonic() - begun < 2 and len(said) == 1 and len(store._waiting) == 3
    other.execute('ROLLBACK')
    store.append('t000/g001', [dict(step=201, time=1.0, loss=0.0)])
    assert list(rows_of(store.path)) == [*range(1, 202), 300, 301, 302]
    store.close()


def test_a_process_that_may_not_write_more_keeps_its_points(tmp_path):
    "The system's own limit instead of SQLite's"
    code = f'''
import resource, signal
from tts_tuner.tuner.metrics_store import MetricsStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = MetricsStore({str(tmp_path / "metrics.db")!r})
store.append('t', [dict(step=1, time=0.0, loss=1.0)])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
store.append('t', [dict(step=s, time=0.0, loss=1.0) for s in range(2, 20_000)])
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
store.append('t', [dict(step=20_000, time=0.0, loss=1.0)])
store.close()
'''
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count('cannot be written for now') == 1 and out.stdout.count('is written again') == 1
    assert len(rows_of(tmp_path / 'metrics.db', 't')) == 20_000


@pytest.mark.parametrize('damage', ['words', 'hole', 'empty pages', 'another', 'earlier'])
def test_a_damaged_file_is_set_aside_and_built_again(tmp_path, damage):
    path, said = study(tmp_path, runs=3, last=2000) / 'metrics.db', []
    MetricsStore(path).close()
    whole = path.read_bytes()
    if damage == 'words': path.write_text('nothing to see here\n' * 500)
    if damage == 'hole': path.write_bytes(whole[:4096] + os.urandom(8192) + whole[12288:])
    if damage == 'empty pages': path.write_bytes(whole[:len(whole) // 2])
    if damage in ('another', 'earlier'):
        db = sqlite3.connect(path)
        db.execute('PRAGMA application_id = 1' if damage == 'another' else 'PRAGMA user_version = 0')
        db.close()
    store = MetricsStore(path, say=said.append)
    assert len(said) == 1 and 'is damaged' in said[0] and 'metrics.db.damaged-1' in said[0] and (tmp_path / 'metrics.db.damaged-1').exists()
    assert [len(rows_of(path, f't{k:03d}/g001')) for k in range(3)] == [2000] * 3
    store.close()


def test_a_file_damaged_or_deleted_while_it_is_written_is_built_again(tmp_path):
    path, said = study(tmp_path, last=3000) / 'metrics.db', []
    store = MetricsStore(path, say=said.append)
    history = MetricsHistory(path)
    for end in ('', '-wal', '-shm'): Path(f'{path}{end}').unlink(missing_ok=True)
    store.append('t000/g001', [dict(step=3001, time=1.0, loss=1.0)])
    assert len(rows_of(path)) == 3001 and history.latest()['t000/g001']['loss'][0] == 3001  # a reader goes over to the new file
    store.close()
    history.close()
    store = MetricsStore(path, say=said.append)
    store._tables.db.execute('PRAGMA cache_size = 0')
    whole = path.read_bytes()
    with open(path, 'r+b') as f:
        f.seek(8192)
        f.write(os.urandom(len(whole) - 8192))
    store.append('t000/g001', [dict(step=s, time=1.0, loss=2.0) for s in range(1, 3000, 7)])
    assert any('is damaged' in text for text in said) and set(rows_of(path)) == set(range(1, 3001))
    store.close()


def test_a_newer_file_is_refused_and_an_absent_one_named(tmp_path):
    path = tmp_path / 'metrics.db'
    for _ in ('absent', 'empty'):
        with pytest.raises(UserError, match='no history of metrics'): MetricsHistory(path).names()
        path.touch()
    MetricsStore(path).close()
    db = sqlite3.connect(path)
    db.execute('PRAGMA user_version = 99')
    db.close()
    for ask in (lambda: MetricsStore(path), MetricsHistory(path).names):
        with pytest.raises(UserError, match='newer tts_tuner'): ask()
    (tmp_path / 'bad.db').write_text('x' * 5000)
    with pytest.raises(TTSTunerError, match='cannot be read'): MetricsHistory(tmp_path / 'bad.db').names()


def test_a_finished_study_can_be_read_where_nobody_may_write(tmp_path):
    store = MetricsStore(study(tmp_path / 'study') / 'metrics.db')
    store.close()
    assert sorted(p.name for p in (tmp_path / 'study').glob('metrics.db*')) == ['metrics.db']
    code = f'from tts_tuner.tuner.metrics_store import MetricsHistory as H; print(H({str(store.path)!r}).latest())'
    os.chmod(tmp_path / 'study', 0o555)
    os.chmod(store.path, 0o444)
    somebody = dict(user=65534, extra_groups=[]) if os.getuid() == 0 else {}
    try:
        for p in (tmp_path, *tmp_path.parents):
            if somebody and not p.stat().st_mode & 0o001: somebody = {}  # another user could not come here
        out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60, **somebody)
    finally: os.chmod(tmp_path / 'study', 0o755)
    assert out.stdout.strip() == "{'t000/g001': {'loss': (20, 0.05)}}", out.stderr


# Watcher


def test_a_clock_that_jumps_spoils_no_lag_and_loses_no_point(tmp_path):
    class Clock:
        wall, steady = 1e9, 50.0
    sink = tmp_path / 'metrics.jsonl'
    watcher = LogWatcher(clock=lambda: Clock.wall, steady=lambda: Clock.steady)
    watcher.add(JsonlSource('t', sink))
    told = []
    for k, jump in enumerate([0, 0, 3600, 0, -7200, 0, 0]):
        Clock.wall, Clock.steady = Clock.wall + 1 + jump, Clock.steady + 1
        with open(sink, 'a') as f: f.write(json.dumps(dict(step=k + 1, time=Clock.wall - 0.25 - jump, loss=1.0)) + '\n')
        told += [s for news in watcher.poll().values() for s in steps(news)]
    assert told == list(range(1, 8)) and watcher.lag.jumps == 2 and watcher.lag.points == 7
    assert watcher.lag.worst == pytest.approx(0.25, abs=1e-6) and watcher.lag.median == pytest.approx(0.25, abs=1e-6)


def test_a_source_that_fails_is_named_once_and_the_others_go_on(tmp_path):
    now, said = [0.0], []
    (tmp_path / 'bad').mkdir()
    (tmp_path / 'good.jsonl').write_text(row(1))
    watcher = LogWatcher(say=said.append, steady=lambda: now[0], clock=lambda: now[0])
    watcher.add(JsonlSource('bad', tmp_path / 'bad'))  # a folder
    watcher.add(JsonlSource('good', tmp_path / 'good.jsonl'))
    watcher.add(JsonlSource('good', tmp_path / 'other.jsonl'))  # is watched already
    assert list(watcher.poll()) == ['good']
    for _ in range(20):
        now[0] += 0.5
        watcher.poll()
    assert len(said) == 1 and 'bad is not watched for now' in said[0]
    (tmp_path / 'bad').rmdir()
    (tmp_path / 'bad').write_text(row(1))
    now[0] += 60
    assert list(watcher.poll()) == ['bad'] and said[1] == 'bad can be read again.'


def test_a_live_trainer_that_is_killed_and_resumed_is_followed_to_the_end(tmp_path):
    fake = Path(__file__).with_name('fake_trainer.py')
    run = tmp_path / 't000' / 'g001'
    command = [sys.executable, str(fake), '--run-dir', str(run), '--hparams', 'max_steps=120']
    store = MetricsStore(tmp_path / 'metrics.db')
    watcher, kept = LogWatcher(store), {}
    watcher.add(JsonlSource('t000/g001', run / 'metrics.jsonl'))
    for resume in ([], ['--resume'], ['--resume']):
        trainer = subprocess.Popen([*command, *resume], env={**os.environ, 'FAKE_PACE': '0.004', 'FAKE_CRASH': 't000@50'})
        begun = time.monotonic()
        while trainer.poll() is None:
            for news in watcher.poll().values(): source_suite.settle(kept, news)
            if resume and time.monotonic() - begun > 0.35 and trainer.poll() is None and not (run / 'once').exists():
                (run / 'once').touch()
                trainer.kill()
            time.sleep(0.005)
    for news in watcher.poll().values(): source_suite.settle(kept, news)
    wanted = {(k, r['step']): r[k] for r in read_metrics(run / 'metrics.jsonl') for k in r.keys() - {'step', 'time'}}
    assert max(s for _, s in kept) == 120 and kept == wanted
    assert rows_of(store.path, name='train_loss') == {s: v for (name, s), v in wanted.items() if name == 'train_loss'}
    store.close()


# Sinks


def mlflow_read(folder):
    found = {}
    for file in folder.rglob('mlflow_run.json'):
        note = json.loads(file.read_text())
        for news in MlflowFileSource('t', note['uri'], note['run_id']).poll():
            for name, step, value, _ in news.points: found.setdefault(name, []).append((step, value))
    return found


@pytest.mark.parametrize('check', sink_suite.CHECKS, ids=lambda c: c.__name__)
def test_mlflow_keeps_what_every_sink_keeps(check, mlflow_uri, tmp_path):
    check(lambda folder: MLflowSink(folder, mlflow_uri, 'watched', run_name=folder.name), mlflow_read, tmp_path)


def wandb_records(file):
    "What an offline run has written: records in blocks of 32 KiB, as LevelDB's log has them"
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, part = file.read_bytes(), 7, b''
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7: at += 32768 - at % 32768
        _, length, kind = struct.unpack_from('<IHB', data, at)
        part += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (2, 3): continue
        yield Record.FromString(part)
        part = b''


def wandb_read(folder):
    "Numbers of all offline runs, once the package's own process has written their ends"
    found, files = {}, sorted(folder.glob('wandb/offline-run-*/*.wandb'))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not all(any(r.HasField('exit') for r in wandb_records(file)) for file in files): time.sleep(0.02)
    for file in files:
        for record in wandb_records(file):
            items = {(i.key or '/'.join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            for name, value in items.items():
                if isinstance(value, (int, float)) and not name.startswith('_') and name != 'step': found.setdefault(name, []).append((items['step'], value))
    return found


@pytest.mark.parametrize('check', sink_suite.CHECKS, ids=lambda c: c.__name__)
def test_weights_and_biases_offline_keeps_what_every_sink_keeps(check, tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    from tts_tuner.training.wandb_sink import WandbSink
    monkeypatch.setenv('WANDB_API_KEY', 'canary0' * 6)
    check(lambda folder: WandbSink(folder, every=1 if 'arrive' in check.__name__ else 10), wandb_read, tmp_path)
    for file in tmp_path.rglob('*'):
        if not file.is_file() or file.is_symlink(): continue
        raw = file.read_bytes()
        assert b'canary0' not in raw, f'the key is in {file.name}'


def test_weights_and_biases_without_a_key_or_the_package_is_off_with_a_sentence(tmp_path, monkeypatch):
    from tts_tuner.training.wandb_sink import WandbSink
    monkeypatch.delenv('WANDB_API_KEY', raising=False)
    said = []
    WandbSink(tmp_path, mode='online', say=said.append).close()
    monkeypatch.setitem(sys.modules, 'wandb', None)
    WandbSink(tmp_path, say=said.append).close()
    assert 'WANDB_API_KEY is not set' in said[0] and 'wandb' in said[1] and all(text.endswith('training goes on.') for text in said)
    with pytest.raises(UserError, match='offline or online'): WandbSink(tmp_path, mode='cloud')


def test_the_suites_find_what_is_wrong(tmp_path):
    class Late(JsonlSink):
        def log(self, step, metrics):
            time.sleep(0.003)
            super().log(step, metrics)

    read = lambda folder: {k: [(r['step'], r[k]) for r in read_metrics(folder / 'x') if k in r] for k in ('metric_11',)}
    with pytest.raises(AssertionError, match='give the work to a thread'): sink_suite.nobody_waits(lambda folder: Late(folder / 'x'), read, tmp_path)

    class Twice(JsonlSource):
        def poll(self):
            news = super().poll()
            return news + news

    stream = lambda folder, resumed: JsonlSink(folder / 'metrics.jsonl')
    with pytest.raises(AssertionError, match='train_loss was logged at'):
        source_suite.each_point_once_in_order(stream, lambda folder: Twice('t', folder / 'metrics.jsonl'), tmp_path)


def test_many_watched_runs_take_little_memory(tmp_path):
    import tracemalloc
    (tmp_path / 'metrics.jsonl').write_text(''.join(row(s) for s in range(1, 51)))
    watcher = LogWatcher()
    tracemalloc.start()
    for k in range(200): watcher.add(JsonlSource(f't{k:04d}/g001', tmp_path / 'metrics.jsonl'))
    told = sum(len(steps(news)) for news in watcher.poll().values())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert told == 10_000 and held < 200 * 4000, f'{held / 1e6:.1f} MB'
