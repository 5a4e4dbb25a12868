"""The four kinds of attention beside each other: what a step costs, and what they learn.

    python bench/attention.py                                     costs at full size, about 2 minutes on one core
    python bench/attention.py --train 1000 --corpus DIR           and each trained so many steps on a corpus (the demo corpus when no DIR is given)
    python bench/attention.py --quick                             small and short, to see that it runs; writes nothing

`time` is a step of attention alone and its way back, by automatic differentiation, 8 utterances of up to 115 symbols, as a share of
location-sensitive attention's; `time, 32 x 150` the same for 32 utterances of 150. `training step` is a whole step of the small preset
(forward, loss, backward, clipping, Adam) on the fastest path that the kind has. `operations` and `operations, training` are what
torch is asked to compute in a step, views not counted. Seconds are processor time of this process, the least of the repeats, all kinds
turn by turn. With --train, `success` and `distance_ratio` are those of the run's best checkpoint on held-out sentences, the small preset
otherwise unchanged, median of the seeds.
"""
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import results
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import make_batch, spread

from tts_tuner.config.hparams import create_hparams
from tts_tuner.model.attention_family import ATTENTIONS, create_attention
from tts_tuner.model.layers import length_mask
from tts_tuner.training.learner import Learner


class Count(TorchDispatchMode):
    "Counts the operations that compute something"

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))


def attention_steps(kind: str, rows: int, symbols: int, steps: int) -> Callable[[], None]:
    "A function that walks `steps` steps forwards and back at full size"
    torch.manual_seed(0)
    hp = create_hparams('default', f'attention={kind}')
    attention = create_attention(hp)
    values = torch.randn(rows, symbols, hp.encoder_embedding_dim, requires_grad=True)
    mask = length_mask(torch.tensor(spread(symbols // 2, symbols, rows)), symbols)
    queries = torch.randn(steps, rows, hp.attention_rnn_dim, requires_grad=True)

    def walk() -> None:
        memory = attention.prepare(values, mask)
        state, contexts = attention.start(memory), []
        for query in queries.unbind(0):
            state = attention(query, state, memory)
            contexts.append(state.context)
        torch.stack(contexts).sum().backward()
    return walk


def training_step(kind: str, short: bool) -> Callable[[], None]:
    "A function that makes a training step of the small preset"
    hp = create_hparams('small', f'attention={kind},device=cpu,threads=1')
    torch.manual_seed(0)
    learner = Learner(hp)
    batch = make_batch(hp, spread(8, 12, 8), spread(40, 80, 8)) if short else make_batch(hp, spread(20, 40, 8), spread(120, 240, 8))

    def step() -> None: learner.learn(batch)
    return step


def shares(make: Callable[[str], Callable[[], None]], repeats: int) -> dict[str, float]:
    "Processor time of each kind, as a share of location-sensitive attention's; the least of the repeats, turn by turn"
    work = {kind: make(kind) for kind in ATTENTIONS}
    for function in work.values(): function()
    seconds: dict[str, list[float]] = {kind: [] for kind in work}
    for _ in range(repeats):
        for kind, function in work.items():
            begun = time.process_time()
            function()
            seconds[kind].append(time.process_time() - begun)
    return {kind: min(s) / min(seconds['location']) for kind, s in seconds.items()}


def operations(kind: str, steps: int = 10) -> tuple[int, int]:
    "Operations of a step, and of a step with its way back"
    hp = create_hparams('default', f'attention={kind}')
    attention = create_attention(hp)
    memory = attention.prepare(torch.randn(2, 30, hp.encoder_embedding_dim), torch.ones(2, 30, dtype=torch.bool))
    query = torch.randn(2, hp.attention_rnn_dim, requires_grad=True)
    state = attention(query, attention.start(memory), memory)  # the first step has no past to send gradients to
    with Count() as there:
        for _ in range(steps): state = attention(query, state, memory)
    with Count() as back: (state.context.sum() + state.weights.sum()).backward()
    return there.n // steps, there.n // steps + round(back.n / (steps + 1))


def learned(kind: str, corpus: Path, folder: Path, steps: int, seed: int) -> dict[str, float]:
    "Success and distance on held-out sentences after training"
    from tts_tuner.training.trainer import train
    hp = create_hparams('small', dict(attention=kind, max_steps=steps, seed=seed, device='cpu', threads=1))
    train(corpus, folder / f'{kind}-{seed}', hp)
    numbers = results.run_metrics(folder / f'{kind}-{seed}')
    best = max((m for m in numbers if 'score' in m), key=lambda m: m['score'])
    print(f'{kind:9s} seed {seed}: best at step {best["step"]:.0f}, success {best["success"]:.2f}, distance {best["distance_ratio"]:.2f} '
          'of the mean frame\'s', flush=True)
    return {k: float(best[k]) for k in ('success', 'distance_ratio', 'score')}


def train_all(corpus: Path | None, steps: int, seeds: int) -> dict[str, float]:
    "Median of the seeds for each kind"
    from tts_tuner.data.demo import make_demo_corpus
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        if corpus is None: make_demo_corpus(corpus := Path(folder) / 'corpus')
        for kind in ATTENTIONS:
            runs = [learned(kind, corpus, Path(folder), steps, seed) for seed in range(1, seeds + 1)]
            metrics |= {f'{kind}: {k}': round(statistics.median(r[k] for r in runs), 3) for k in runs[0]}
    return metrics


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--train', type=int, default=0, metavar='STEPS', help='train each kind so many steps, too')
    ap.add_argument('--corpus', type=Path, help='folder in the LJSpeech layout; the demo corpus when not given')
    ap.add_argument('--seeds', type=int, default=1, help='runs of each kind')
    ap.add_argument('--repeats', type=int, default=7)
    ap.add_argument('--quick', action='store_true', help='few steps, two repeats, writes nothing')
    a = ap.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    steps, repeats = (5, 2) if a.quick else (60, a.repeats)
    metrics: dict[str, float] = {}
    found = {'time': shares(lambda kind: attention_steps(kind, 8, 115, steps), repeats),
             'time, 32 x 150': shares(lambda kind: attention_steps(kind, 32, 150, steps), repeats),
             'training step': shares(lambda kind: training_step(kind, a.quick), repeats)}
    for kind in ATTENTIONS:
        one, both = operations(kind)
        metrics |= {f'{kind}: {name}': round(share[kind], 3) for name, share in found.items()}
        metrics |= {f'{kind}: operations': one, f'{kind}: operations, training': both}
        print(f'{kind:9s} ' + ', '.join(f'{name} {share[kind]:.2f}' for name, share in found.items()) + f', operations {one}, in training {both}', flush=True)
    if a.train: metrics |= {'training steps': a.train, 'seeds': a.seeds, **train_all(a.corpus, a.train, a.seeds)}
    if not a.quick: results.save('attention', metrics)


if __name__ == '__main__': main()
