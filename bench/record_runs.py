"""Records short Tacotron 2 runs of mixed quality, so that verdicts about runs can be fitted and tested on real ones.

    python bench/record_runs.py --demo DIR --digits DIR --parts /tmp/parts [--only NAME ...]
    python bench/record_runs.py --parts /tmp/parts --pack bench/curves/tacotron2.jsonl.gz

DIR are corpora in the LJSpeech layout: the demonstration's (`tts-tune demo`'s `data/demo`) and the digits of `bench/digits.py`. Good settings, poor ones,
every kind of attention, wrong labels, stop gates that learn nothing, kicks, learning rates that explode. Thirty validations a run. A run that is
recorded already is skipped, so the command may be stopped and given again. The list of runs is drawn from a fixed seed; nothing in it depends on outcomes.
"""
import argparse
import dataclasses
import gzip
import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from tts_tuner.config.files import write_atomic
from tts_tuner.config.hparams import create_hparams, differences
from tts_tuner.data.corpus import read_corpus
from tts_tuner.data.features import build_features
from tts_tuner.data.loader import BatchStream, TTSDataset, split
from tts_tuner.training.evaluate import Evaluator, anchors
from tts_tuner.training.guard import NonFinite
from tts_tuner.training.learner import Learner, prepare_machine

VALIDATIONS = 30
DIGITS = dict(frontend='characters', sample_rate=8000, n_fft=512, hop_length=100, win_length=512, n_mels=40, mel_fmax=4000, trim_db=0)
ALWAYS = dict(device='cpu', threads=1, n_validation=36, n_free_running=16)
ATTENTIONS = ('location', 'forward', 'dynamic', 'stepwise')
STEP = ('train_loss', 'mel_loss', 'gate_loss', 'guided_loss', 'grad_norm')
EVALUATED = ('val_', 'gate_acc', 'token_', 'alignment', 'attention', 'free_', 'success', 'stop_rate', 'duration', 'mcd', 'distance', 'score')


class Disturbed(Learner):
    "A learner that somebody meddles with"
    kicks: tuple[int, ...] = ()  # steps whose gradient is replaced by a random one thirty times as long
    jump: tuple[int, float] = (1 << 60, 1.0)  # from this step on, the learning rate times this

    def learn(self, batch: Any) -> dict[str, Any]:
        if self.step == self.jump[0]: self.hp = dataclasses.replace(self.hp, learning_rate=self.hp.learning_rate * self.jump[1], grad_clip_thresh=0.0)
        return super().learn(batch)

    def clip(self) -> Any:
        if self.step in self.kicks:
            draw = torch.Generator().manual_seed(self.step)
            grads = [w.grad for w in self.model.parameters() if w.grad is not None]
            noise = [torch.randn(g.shape, generator=draw) for g in grads]
            length = lambda many: torch.stack([x.norm() for x in many]).norm()
            scale = 30 * length(grads) / length(noise)
            for g, n in zip(grads, noise): g.copy_(n * scale)
        return super().clip()


def plan() -> list[dict[str, Any]]:
    "Name, corpus, fault and settings of every run"
    draw, runs = random.Random(20), []
    for corpus, lengths in (('demo', (240, 300, 360)), ('digits', (120, 150, 210))):
        def add(name: str, fault: str = '', corpus: str = corpus, lengths: tuple[int, ...] = lengths, **hp: Any) -> None:
            runs.append(dict(name=f'{corpus}_{name}', corpus=corpus, fault=fault, hp=dict(max_steps=draw.choice(lengths), seed=draw.randrange(1000), **hp)))
        for a in ATTENTIONS:
            add(f'{a}_good', attention=a, learning_rate=draw.uniform(5e-3, 1.5e-2))
            add(f'{a}_unguided', attention=a, guided_attention_weight=0.0, learning_rate=draw.uniform(2e-3, 1.2e-2))
            add(f'{a}_slow', attention=a, learning_rate=10 ** draw.uniform(-4.3, -3.2))
            add(f'{a}_wrong_labels', 'wrong labels', attention=a, learning_rate=draw.uniform(5e-3, 1.2e-2))
        for i in range(10):
            add(f'random{i}', attention=draw.choice(ATTENTIONS), learning_rate=10 ** draw.uniform(-3.5, -1.3),
                guided_attention_weight=draw.choice((0.0, 0.5, 2.0, 5.0, 20.0)), prenet_dropout=draw.choice((0.1, 0.3, 0.5, 0.8)),
                n_frames_per_step=draw.choice((2, 3, 4, 5)), batch_size=draw.choice((8, 16)),
                encoder_dropout=draw.choice((0.1, 0.5)), grad_clip_thresh=draw.choice((0.3, 1.0, 5.0)))
        add('gate_unweighted', 'silent gate', gate_loss_weight=0.0)
        add('gate_faint', 'silent gate', gate_loss_weight=1.0, gate_positive_weight=0.002, attention='forward')
        add('gate_late', 'silent gate', gate_threshold=0.99, gate_positive_weight=0.3)
        add('some_wrong_labels', 'third wrong labels', attention='forward')
        add('many_wrong_labels', 'two thirds wrong labels')
        add('kicks', 'kicks', attention='forward')
        add('kicks_location', 'kicks')
        add('kicks_unclipped', 'kicks', grad_clip_thresh=0.0)
        add('hot', 'hot', learning_rate=0.1, grad_clip_thresh=5.0)
        add('explodes', 'hot', learning_rate=0.7, grad_clip_thresh=0.0)
        for i, k in enumerate((10, 30, 100, 1000)): add(f'jump{k}', 'jump', attention=ATTENTIONS[i % 2], jump=k)
    return sorted(runs + doubtful(), key=lambda r: hash_of(r['name']))  # so that any first part of the list is a mixture


def doubtful() -> list[dict[str, Any]]:
    "More runs that are likely to fail, since most of the others speak"
    draw, runs = random.Random(21), []
    for corpus, lengths in (('demo', (240, 300, 360)), ('digits', (120, 150, 210))):
        def add(name: str, fault: str = '', corpus: str = corpus, lengths: tuple[int, ...] = lengths, **hp: Any) -> None:
            runs.append(dict(name=f'{corpus}_{name}', corpus=corpus, fault=fault, hp=dict(max_steps=draw.choice(lengths), seed=draw.randrange(1000), **hp)))
        for a in ATTENTIONS: add(f'{a}_cold', attention=a, learning_rate=10 ** draw.uniform(-4.8, -4.0))
        add('location_unguided_hot', attention='location', guided_attention_weight=0.0, learning_rate=draw.uniform(1.5e-2, 3e-2))
        add('forward_unguided_cold', attention='forward', guided_attention_weight=0.0, learning_rate=10 ** draw.uniform(-3.8, -3.2), n_frames_per_step=2)
        add('dynamic_unguided_cold', attention='dynamic', guided_attention_weight=0.0, learning_rate=10 ** draw.uniform(-4.0, -3.4))
        add('gate_weak', 'silent gate', attention='location', gate_loss_weight=0.02)
        add('gate_biased', 'silent gate', attention='dynamic', gate_positive_weight=0.02)
        add('half_wrong_labels', 'half wrong labels', attention='location', guided_attention_weight=1.0)
        for a, k in (('dynamic', 50), ('stepwise', 200), ('forward', 500)): add(f'{a}_jump{k}', 'jump', attention=a, jump=k)
    return runs


def hash_of(name: str) -> int: return int.from_bytes(__import__('hashlib').sha256(name.encode()).digest()[:4])


def with_faulty_labels(corpus: Path, share: float, root: Path) -> Path:
    "A copy of a corpus in which a share of the clips carry each other's text"
    if root.exists(): return root
    rows = [line.split('|') for line in (corpus / 'metadata.csv').read_text().splitlines()]
    draw = random.Random(7)
    wrong = draw.sample(range(len(rows)), round(share * len(rows)))
    texts = [rows[i][1:] for i in wrong]
    for i, text in zip(wrong, texts[1:] + texts[:1]): rows[i] = [rows[i][0], *text]
    part = root.with_name(root.name + '.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / 'wavs').symlink_to((corpus / 'wavs').resolve())
    if (corpus / 'held_out.txt').exists(): shutil.copy(corpus / 'held_out.txt', part)
    (part / 'metadata.csv').write_text(''.join('|'.join(r) + '\n' for r in rows))
    part.rename(root)
    return root


def record(run: dict[str, Any], corpora: dict[str, Path], parts: Path, cache: Path) -> dict[str, Any]:
    "One run from start to end; its curve"
    hp_of = dict(run['hp'])
    jump = hp_of.pop('jump', None)
    hp_of |= {} if run['corpus'] == 'demo' else DIGITS
    hp_of['eval_every'] = hp_of['max_steps'] // VALIDATIONS
    small = create_hparams('small', ALWAYS)
    hp = create_hparams('small', {**ALWAYS, **hp_of})
    share = {'wrong labels': 1.0, 'third wrong labels': 1 / 3, 'half wrong labels': 0.5, 'two thirds wrong labels': 2 / 3}.get(run['fault'], 0.0)
    where = with_faulty_labels(corpora[run['corpus']], share, parts / f'corpus_{run["corpus"]}_{share:.2f}') if share else corpora[run['corpus']]
    features = build_features(read_corpus(where, hp), hp, cache)
    hp = dataclasses.replace(hp, n_symbols=len(features.table))
    prepare_machine(hp)
    learner, (train, held) = Disturbed(hp), split(features, hp)
    third = hp.max_steps // 3
    if run['fault'] == 'kicks': learner.kicks = tuple(range(third, third + hp.max_steps // 6, 3))
    if jump: learner.jump = (hp.max_steps // 2, float(jump))
    stream = BatchStream(TTSDataset(features, train, hp), hp)
    anchor = anchors(features, train, list(held)[-hp.n_free_running:], hp, cache, n_copies=0)
    evaluator = Evaluator(features, held, hp, anchor=anchor)
    steps: list[list[float | None]] = []
    rows, status = [], 'done'
    start, spent = time.process_time(), 0.0
    for _ in range(hp.max_steps):
        try: numbers = learner.learn(next(stream))
        except NonFinite as e:
            status = f'not finite at step {learner.step}: {e}'[:200]
            break
        steps.append([rounded(float(numbers[k])) for k in STEP])
        if learner.step % hp.eval_every: continue
        begun = time.process_time()
        found = evaluator.run(learner.model, learner.step).metrics
        spent += time.process_time() - begun
        rows.append({'step': learner.step, 'learning_rate': rounded(float(numbers['learning_rate'])),
                     **{k: rounded(v) for k, v in found.items() if k.startswith(EVALUATED)}})
    names = sorted({k for r in rows for k in r} - {'step'}) if rows else []
    changed = {k: v for k, (_, v) in differences(small, hp).items() if k not in ('n_symbols', 'seed')}
    return dict(name=run['name'], corpus=run['corpus'], fault=run['fault'], status=status, budget=hp.max_steps, seed=hp.seed, jump=jump, settings=changed,
                cpu_seconds=round(time.process_time() - start - spent, 1), evaluation_seconds=round(spent, 1), step=[r['step'] for r in rows],
                validation={k: [r.get(k) for r in rows] for k in names}, each_step={k: [s[i] for s in steps] for i, k in enumerate(STEP)})


def rounded(v: float) -> float | None:
    "Four digits; None where it is not a finite number"
    return float(f'{v:.4g}') if math.isfinite(v) else None


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--demo', type=Path, help="the demonstration's corpus")
    ap.add_argument('--digits', type=Path, help='the corpus of bench/digits.py')
    ap.add_argument('--parts', type=Path, required=True, help='folder of one file a run')
    ap.add_argument('--cache', type=Path, default=Path('data/cache'), help='features')
    ap.add_argument('--only', nargs='*', help='names of runs')
    ap.add_argument('--pack', type=Path, help='put what is recorded into this file, and record nothing')
    a = ap.parse_args()
    runs = plan()
    if a.pack:
        done = [json.loads(p.read_text()) for r in runs if (p := a.parts / f'{r["name"]}.json').exists()]
        a.pack.parent.mkdir(parents=True, exist_ok=True)
        text = ''.join(json.dumps(r, separators=(',', ':')) + '\n' for r in sorted(done, key=lambda r: r['name']))
        write_atomic(a.pack, gzip.compress(text.encode(), mtime=0))
        print(f'{len(done)} of {len(runs)} runs in {a.pack}, {a.pack.stat().st_size / 1024:.0f} KiB')
        return
    if not a.demo or not a.digits: ap.error('--demo and --digits name the two corpora')
    begun, made, todo = time.monotonic(), 0, [r for r in runs if not (a.parts / f'{r["name"]}.json').exists() and (not a.only or r['name'] in a.only)]
    for i, run in enumerate(todo):
        if (a.parts / f'{run["name"]}.json').exists(): continue  # by another process, in the meantime
        found = record(run, dict(demo=a.demo, digits=a.digits), a.parts, a.cache)
        write_atomic(a.parts / f'{run["name"]}.json', json.dumps(found))
        made += 1
        left = (time.monotonic() - begun) / made * (len(todo) - made)
        success, diagonality = ((found['validation'].get(k) or [None])[-1] for k in ('success', 'alignment_score'))
        print(f'{i + 1}/{len(todo)} {run["name"]:28} {found["status"][:30]:30} success {success}  diagonality {diagonality}  '
              f'{found["cpu_seconds"]:.0f} + {found["evaluation_seconds"]:.0f} s, {left / 60:.0f} min left', flush=True)


if __name__ == '__main__': main()
