"""What the specification promised about early training (M36 to M40), read off a finished study or run.

    python bench/promises.py runs/demo

The winner's metrics answer: is alignment above 0.4 within 1000 steps; where does the training loss go; does validation stay
under 30; is the stop gate right more often than 0.6 (balanced, so that guessing "never" gets 0.5); when does attention settle.
"""
import argparse
from pathlib import Path

import results


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('folder', type=Path, help='folder of a study (runs/NAME), or of one run')
    a = ap.parse_args()
    run = a.folder if (a.folder / 'metrics.jsonl').exists() else results.winner(a.folder)
    rows = results.run_metrics(run)
    series = lambda name: [(int(r['step']), float(r[name])) for r in rows if name in r]
    aligned, losses, valid, gate = series('alignment_score'), series('train_loss'), series('val_loss'), series('gate_accuracy')
    plain = [(int(r['step']), r['mel_loss'] + r['mel_postnet_loss'] + r['gate_loss']) for r in rows if 'mel_postnet_loss' in r]
    last = lambda pairs, n=20: sum(v for _, v in pairs[-n:]) / len(pairs[-n:])
    unsettled = [s for s, v in aligned if v < 0.7]
    after = [s for s, _ in aligned if not unsettled or s > unsettled[-1]]
    found = {
        'alignment_best_in_1000': max((v for s, v in aligned if s <= 1000), default=0.0),
        'alignment_first_step_above_0.4': min((s for s, v in aligned if v > 0.4), default=-1),
        'alignment_settled_step': after[0] if after else -1,
        'train_loss_first': losses[0][1], 'train_loss_last': last(losses), 'plain_loss_last': last(plain) if plain else last(losses),
        'val_loss_worst': max(v for _, v in valid), 'val_loss_last': valid[-1][1],
        'gate_accuracy_last': gate[-1][1], 'steps': losses[-1][0],
    }
    for name, value in found.items(): print(f'{name:34s} {value:g}')
    results.save('promises', {k: round(v, 4) for k, v in found.items()}, file=f'promises-{a.folder.name}')


if __name__ == '__main__': main()
