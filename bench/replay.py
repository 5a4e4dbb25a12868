"""What policies of a study and rules of a single run save and lose on recorded curves.

    python bench/replay.py --curves DIR [--picture pareto.png]   # studies
    python bench/replay.py --curves DIR --single                 # single runs

DIR holds taskset_*.npz (`valid_loss` [trials, epochs], `hp` [trials, d]: TaskSet, Metz and others 2020, as redistributed by
DyHPO, Apache-2.0) and librispeech_runs.jsonl.gz (runs of AlgoPerf submissions with step, valid_wer, valid_loss, train_loss).
Draw d of task t takes 100 trials, seeded by (t, d), the same for every policy. The product's own
recorded runs in bench/curves are played too. Intervals of 95 % by bootstrap over tasks and draws; in the comparison with the
best fixed rungs also with whole tasks drawn first. The numbers of the stopping rule were fitted on LibriSpeech runs, these among
them; bench/stop.py has the figures for workloads it was not fitted on.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import results
from rich.console import Console

from tts_tuner.tuner.histories import read_jsonl, read_npz
from tts_tuner.tuner.policies import BESIDE, policy_of, rule_of
from tts_tuner.tuner.replay import Result, Task, front, interval, name_of, paired, picture, play, replay, table
from tts_tuner.tuner.replay_runs import RuleResult, replay_runs, rule_table

FIXED = ('halving:3', 'rungs:1>33,3>11,9>4,27>1', 'top:1,5', 'top:3,5', 'top:5,3', 'top:5,5', 'top:5,10', 'top:8,5', 'rungs:2>30,4>8,16>3', 'rungs:3>25,9>5',
         'rungs:3>20,8>6,20>3', 'rungs:4>30,10>10')
OTHERS = ('none', 'patience:3', 'patience:10', 'median:5,5', 'percentile:25', 'hyperband:3')
SLOW = ('stopping:standard', 'vote:3')  # each trial by itself, asked after every epoch; played on a tenth of the draws
OURS = ('promotion:0.08', 'promotion:0.13', 'promotion:0.2', 'promotion:0.3')
RULES = ('never', *(f'patience:{p}' for p in (3, 5, 8, 10, 12, 15, 18, 22)), 'patience:5,0.005', 'patience:10,0.005', 'prechelt:GL,5', 'prechelt:PQ,0.5',
         'prechelt:UP,3', 'stopping:careful', 'stopping:standard', 'stopping:brisk', 'stopping:bold', 'vote:2', 'vote:3')
OWN = Path(__file__).resolve().parent / 'curves' / 'tacotron2.jsonl.gz'


def study_figures(r: Result) -> dict[str, float]:
    "Metrics of a policy"
    low, high = interval(r.regret, np.random.default_rng(0))
    values = dict(compute=float(r.compute.mean()), regret=float(r.regret.mean()), low=low, high=high, found=r.found(), worst=r.worst())
    return {f'{r.name}: {k}': v for k, v in values.items()}


def rule_figures(r: RuleResult, data: str) -> dict[str, float]:
    "Metrics of a rule"
    low, high = interval(r.false, np.random.default_rng(0))
    values = dict(saved=float(r.saved.mean()), oracle=float(r.oracle.mean()), share=r.share, false=float(r.false.mean()), low=low, high=high)
    return {f'{data}, {r.name}: {k}': v for k, v in values.items()}


def studies(tasks: list[Task], draws: int, n: int, drawing: Path | None) -> dict[str, float]:
    "Play all policies; the table, and how ours compares with the best fixed rungs that cost no more"
    made = {text: policy_of(text) for text in (*FIXED, *OTHERS, *OURS)}
    begun = time.monotonic()
    def said(done: int, of: int) -> None:
        if done % (of // 20 or 1) == 0: print(f'\r{100 * done // of} %, {time.monotonic() - begun:.0f} s', end='', file=sys.stderr, flush=True)
    found = dict(zip(made, replay(list(made.values()), tasks, draws, n, said)))
    print(file=sys.stderr)
    everything = list(found.values())
    Console(width=150).print(table(everything, np.random.default_rng(0)))
    few = max(1, draws // 10)
    slow = replay([policy_of(t) for t in SLOW], tasks, few, n)
    print(f'{few} draws of each task:', flush=True)
    Console(width=150).print(table(slow, np.random.default_rng(0)))
    print('Pareto front:', ', '.join(r.name for r in front(everything)))
    metrics: dict[str, float] = {}
    for r in (*everything, *slow): metrics |= study_figures(r)
    for text in OURS:
        ours = found[text]
        within = [found[t] for t in FIXED if found[t].compute.mean() <= ours.compute.mean() + 0.002]
        if not within: continue
        rival = min(within, key=lambda r: float(r.regret.mean()))
        flat, whole = paired(ours, rival, np.random.default_rng(0)), paired(ours, rival, np.random.default_rng(0), by_task=True)
        print(f'{ours.name} minus {rival.name}: {flat[0]:+.4f} ({flat[1]:+.4f} to {flat[2]:+.4f}), whole tasks drawn ({whole[1]:+.4f} to {whole[2]:+.4f})')
        at = f'{ours.name} minus fixed rungs'
        metrics |= {f'{at}: regret': flat[0], f'{at}: low': flat[1], f'{at}: high': flat[2], f'{at}: tasks low': whole[1], f'{at}: tasks high': whole[2]}
    if drawing: picture(everything, np.random.default_rng(0), drawing)
    return metrics


def speed(task: Task) -> dict[str, float]:
    "Processor seconds for one study of 100 trials by 50 epochs, the slowest policy and the median one"
    part, spent = Task(task.name, task.loss[:100, :50], None if task.hp is None else task.hp[:100]), {}
    for text in (*FIXED, *OTHERS, *SLOW, *OURS):
        policy, times = policy_of(text), []
        for _ in range(1 if text in SLOW else 3):
            begun = time.process_time()
            play(policy, part)
            times.append(time.process_time() - begun)
        spent[name_of(policy)] = float(np.median(times))
    slowest = max(spent, key=spent.__getitem__)
    print(f'100 trials x 50 epochs: {slowest} takes {spent[slowest]:.2f} s of the processor, the median policy {np.median(list(spent.values())):.4f} s')
    return {'100 x 50, slowest policy, processor seconds': spent[slowest], '100 x 50, median policy, processor seconds': float(np.median(list(spent.values())))}


def single(path: Path, metric: str, data: str) -> dict[str, float]:
    "Play all rules on the runs of a file that finished with ten values or more"
    runs = [r for r in read_jsonl(path, metric, BESIDE) if r.status == 'finished' and np.isfinite(r.values).sum() >= 10]
    found = replay_runs([rule_of(t) for t in RULES], runs)
    print(f'\n{data}: {len(runs)} runs, {metric}')
    Console(width=120).print(rule_table(found, np.random.default_rng(0)))
    return {k: v for r in found for k, v in rule_figures(r, data).items()}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--curves', type=Path, required=True, help='folder with taskset_*.npz and librispeech_runs.jsonl.gz')
    ap.add_argument('--draws', type=int, default=20)
    ap.add_argument('--n', type=int, default=100, help='trials a draw')
    ap.add_argument('--picture', type=Path, help='file of the Pareto picture')
    ap.add_argument('--single', action='store_true', help='rules of single runs instead of policies of studies')
    a = ap.parse_args()
    if a.single:
        given = a.curves / 'librispeech_runs.jsonl.gz'
        if not given.is_file(): sys.exit(f'no librispeech_runs.jsonl.gz in {a.curves}')
        metrics = single(given, 'valid_wer', 'LibriSpeech')
        if OWN.is_file(): metrics |= single(OWN, 'val_loss', 'Tacotron 2')
        results.save('replay_runs', metrics)
        return
    files = sorted(a.curves.glob('taskset_*.npz'))
    if not files: sys.exit(f'no taskset_*.npz in {a.curves}')
    tasks = [read_npz(f) for f in files]
    metrics = studies(tasks, a.draws, a.n, a.picture) | speed(tasks[0])
    results.save('replay', metrics, tasks=[f.stem for f in files], draws=a.draws, n=a.n)


if __name__ == '__main__': main()
