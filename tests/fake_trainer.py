"""A stand-in for `tts-tune train` that keeps its contract and learns nothing: status, metrics, checkpoints, pause, resume, signals.

Run as `python fake_trainer.py --run-dir DIR --hparams ... [--until N] [--resume]`. Behaviour on demand, by environment:
FAKE_PACE seconds a step; FAKE_CRASH "t002@25": kill oneself once at that step; FAKE_NAN "t003@30": end as failed there;
FAKE_EXPLODE "t001@60": a held-out loss that grows threefold a validation from there on;
FAKE_FULL "t000@50": once, find the disk full when that step is to be saved, its numbers being written already; FAKE_DEAF "1": do not answer SIGINT and SIGTERM;
FAKE_HANG "t000@30": once, do nothing any more from there on, deaf, while the heart beats on; FAKE_FREEZE "t000@30": once, stop oneself as `kill -STOP` does;
FAKE_BEAT seconds between beats; FAKE_CLOCK "7200": from step 30 on the clock is so many seconds behind;
FAKE_MEMORY "t002@9000": so many MB of memory at its peak;
FAKE_HARM "t000/g002": half of what was learnt does not show. Where a trial is named, t000/g002 names one of its generations alone."""
import argparse
import json
import math
import os
import pathlib
import signal
import sys
import time

from tts_tuner.training.heartbeat import Heart


def write(path: pathlib.Path, text: str) -> None:
    temp = path.with_name(f'.{path.name}.{os.getpid()}')
    temp.write_text(text)
    os.replace(temp, path)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ('--run-dir', '--hparams', '--corpus', '--preset', '--tracking', '--cache-dir', '--checkpoint-path'): parser.add_argument(name, default='')
    parser.add_argument('--until', type=int)
    parser.add_argument('--resume', action='store_true')
    a = parser.parse_args()
    h = dict(word.split('=') for word in a.hparams.split(',') if word)
    folder, end = pathlib.Path(a.run_dir), int(h.get('max_steps', 1000))
    trial, until = folder.parent.name, a.until or end
    names = {trial, f'{trial}/{folder.name}'}
    pace = float(os.environ.get('FAKE_PACE', 0))
    fate = {k: os.environ.get(f'FAKE_{k}', '').partition('@')[::2] for k in ('CRASH', 'NAN', 'FULL', 'EXPLODE', 'HANG', 'FREEZE', 'HARM', 'MEMORY')}
    happens = lambda kind, step: fate[kind][0] in names and fate[kind][1] == str(step)
    (folder / 'checkpoints').mkdir(parents=True, exist_ok=True)
    log, last, marker = folder / 'metrics.jsonl', folder / 'checkpoints' / 'last.pt', folder / 'crashed'

    heart, behind = Heart(folder, float(os.environ.get('FAKE_BEAT', 2))), float(os.environ.get('FAKE_CLOCK', 0))

    def now() -> float: return time.time() - (behind if heart.step >= 30 else 0)

    def status(state: str, step: int, reason: str = '') -> None:
        write(folder / 'status.json', json.dumps(dict(state=state, step=step, reason=reason, pid=os.getpid(), time=now())))

    def checkpoint(step: int) -> None:
        for path in (folder / 'checkpoints' / f'step_{step:08d}.pt', last): write(path, f'{learnt(step)!r} {step}')
        for path in sorted(folder.glob('checkpoints/step_*.pt'))[:-3]: path.unlink()

    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, lambda n, _: None if os.environ.get('FAKE_DEAF') else stop.append(n))
    *_, learned, origin = ('0', *pathlib.Path(a.checkpoint_path).read_text().split()) if a.checkpoint_path else ('0', '0')
    start = int(last.read_text().split()[-1]) if a.resume and last.exists() else int(origin)
    if log.exists():
        kept = [line for line in log.read_text().splitlines() if line.endswith('}') and json.loads(line)['step'] <= start]
        write(log, ''.join(f'{line}\n' for line in kept))
    with open(folder / 'starts', 'a') as f: f.write(f'{start}\n')
    rate = (float(h.get('learning_rate', 1e-2)) / 1e-2) ** 0.5 / 40
    if float(h.get('guided_attention_weight', 5)) == 0: rate = 1e-4

    def learnt(step: int) -> float: return float(learned) + rate * (step - int(origin))

    best = 0.6 * (1 - math.exp(-float(learned)))**2 if a.checkpoint_path else -1.0
    status('running', start)
    with heart, open(log, 'a', buffering=1) as f:
        for step in range(start + 1, until + 1):
            if pace: time.sleep(pace)
            row = dict(step=step, time=now(), train_loss=3 / step)
            if step % 20 == 0 or step == until:
                level = (1 - math.exp(-learnt(step))) * (0.5 if fate['HARM'][0] in names else 1)
                row |= dict(alignment_score=level, attention_focus=level, attention_monotonicity=level, attention_coverage=level,
                            success=level, distance_ratio=1 - 0.6 * level, score=0.6 * level**2, val_loss=2 - level)
                if fate['MEMORY'][0] in names: row['system_memory_peak_mb'] = float(fate['MEMORY'][1])
                if fate['EXPLODE'][0] in names and step >= int(fate['EXPLODE'][1]): row['val_loss'] = 2 * 3 ** (1 + (step - int(fate['EXPLODE'][1])) // 20)
            f.write(json.dumps(row) + '\n')
            heart.did(step)
            for kind in ('HANG', 'FREEZE'):
                if happens(kind, step) and not marker.exists():
                    marker.touch()
                    if kind == 'FREEZE': os.kill(os.getpid(), signal.SIGSTOP)
                    while kind == 'HANG': time.sleep(1)
            if happens('FULL', step) and not marker.exists():
                marker.touch()
                write(folder / 'status.json', json.dumps(dict(state='failed', step=step, saved=start, reason='No space left.', pid=os.getpid(), time=now())))
                return 1
            if 'score' in row:
                checkpoint(step)
                status('running', step)
                if row['score'] > best: write(folder / 'checkpoints' / 'best.pt', f'{trial} {learnt(step)!r} {step}')
                best = max(best, row['score'])
            if happens('CRASH', step) and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if happens('NAN', step):
                status('failed', step, f'NaN in the loss at step {step}')
                return 1
            if stop:
                checkpoint(step)
                status('stopped', step)
                return 0
    checkpoint(until)
    status('finished' if until >= end else 'paused', until)
    return 0


if __name__ == '__main__': sys.exit(main())
