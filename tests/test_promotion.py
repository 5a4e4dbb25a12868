"Promotion: budgets kept, restarts, invariances, bad input, and recorded studies"
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.tuner.promotion import PromotionRule, budget, hopeless, level, movement, pace, plateau, promotion, turns
from tts_tuner.tuner.replay import Study, Task, play, rungs


USUAL = PromotionRule()


def carried_out(study, rule=USUAL, maximise=False, stop=None):
    "Epochs of each trial, after `stop` epochs at most"
    for turn in turns(study, rule, maximise):
        for i in turn.trials:
            if stop == 0: return [len(s) for s in study.seen]
            study.advance(i)
            stop = None if stop is None else stop - 1
    return [len(s) for s in study.seen]


@st.composite
def losses(draw):
    n, T, seed = draw(st.integers(1, 40)), draw(st.integers(1, 30)), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(n, 1)) + rng.normal(size=(n, T)).cumsum(1) / 5
    y[rng.random((n, T)) < 0.03] = np.inf
    if not np.isfinite(y).any(): y[0, 0] = 1.0
    return y


@settings(max_examples=40, deadline=None)
@given(losses(), st.floats(0.01, 1.0), st.integers(0, 400))
def test_budget_restart_and_invariances(y, share, stop):
    n, T = y.shape
    rule = PromotionRule(share=share)
    used = carried_out(Study(Task('x', y)), rule)
    assert min(used) >= 1 and sum(used) <= budget(n, T, share) <= n * T
    assert carried_out(Study(Task('x', y * 4)), rule) == used
    order = np.random.default_rng(stop).permutation(n)
    assert carried_out(Study(Task('x', y[order])), rule) == [used[i] for i in order]
    again = Study(Task('x', y))
    carried_out(again, rule, stop=stop)
    assert carried_out(again, rule) == used  # a tuner that was killed goes on where it was


def test_higher_is_better_is_the_mirror_image():
    y = np.random.default_rng(1).normal(size=(30, 20)).cumsum(1)
    assert carried_out(Study(Task('x', -y)), maximise=True) == carried_out(Study(Task('x', y)))


class Given:
    "A study that someone else trains"
    hp = None
    def __init__(self, n, T, seen): self.n, self.T, self.seen = n, T, seen


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_failed_trials_are_never_asked_for_again(bad):
    assert list(turns(Given(3, 5, [[bad], [bad], [bad]]))) == []
    study = Given(3, 5, [[], [], []])
    for turn in turns(study, PromotionRule(share=1.0)):
        for i in turn.trials: study.seen[i].append(bad if i == 1 else 1.0 / (i + 1 + len(study.seen[i])))
    assert len(study.seen[1]) == 1 and max(len(s) for s in study.seen) == 5


def test_constant_and_smallest_studies():
    assert carried_out(Study(Task('x', np.ones((1, 1))))) == [1]
    assert carried_out(Study(Task('x', np.ones((1, 9))))) == [9]  # a single trial is trained to the end
    assert carried_out(Study(Task('x', np.arange(5.0)[:, None]))) == [1] * 5
    assert sum(carried_out(Study(Task('x', np.ones((20, 30)))))) <= budget(20, 30, 0.13)
    for n, T in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match='nothing to share out'): next(turns(Given(n, T, [])))


def test_a_turn_that_was_not_carried_out_is_an_error():
    plan = turns(Given(2, 4, [[], []]))
    next(plan)
    with pytest.raises(ValueError, match='trial 0 has 0 losses after its turn for epoch 1'): next(plan)


@pytest.mark.parametrize('wrong', [dict(share=0), dict(share=1.1), dict(first=0), dict(low=2), dict(window=0), dict(company=0), dict(hope=-1), dict(optimism=float('nan'))])
def test_rule_names_what_is_wrong(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): PromotionRule(**wrong)


def test_parts():
    rule = PromotionRule()
    assert level([3.0, 1.0, 2.0], 0.5) == 1.5 and movement([3.0], 0.7) == 0 and movement([3.0, 1.0, 2.0], 1.0) == 1.5
    assert hopeless([1.0, 1.0, 1.0], 40, 0.5, rule) and not hopeless([1.0, 0.9, 0.8], 40, 0.5, rule)
    assert pace(10, 5, 20, 1000) == 10 and pace(10, 5, 20, 1) == 1 and 5 < pace(60, 5, 50, 400) < 60
    flat, width = plateau([0.7] * 10 + list(np.linspace(0.3, 2, 30)), rule)
    assert flat == 0.7 and 0 < width < 0.01 and plateau(list(np.linspace(0, 1, 40)), rule) is None and plateau([np.nan] * 5, rule) is None


def test_recorded_studies(shared_data):
    "At a fifth of the compute nearly nothing is lost, and less than by the usual few epochs and the best five"
    ours, theirs = [], []
    for f in sorted((shared_data / 'curves').glob('taskset_*.npz')):
        with np.load(f) as z: loss = z['valid_loss'].astype(float)
        for d in range(5):
            task = Task(f.stem, loss[np.random.default_rng([7, d]).choice(len(loss), 100, replace=False)])
            ours.append(play(promotion(0.2), task))
            theirs.append(play(rungs((5, 3)), task))
    assert max(o.compute for o in ours) <= 0.2 + 1e-9
    assert np.mean([o.regret for o in ours]) < 0.015 and np.mean([o.regret for o in ours]) <= np.mean([o.regret for o in theirs])
