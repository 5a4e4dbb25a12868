"""Patience, Prechelt, the vote and the rule that stops one run: properties, rivals, recorded runs."""

import gzip
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.config.contracts import from_json, to_json
from tts_tuner.signals.patience import RUN, STUDY, PatienceRule, PlateauState, curriculum_patience, gains_too_little, patience, plateau, progress_phase, relative_gain
from tts_tuner.signals.prechelt import PrecheltRule, generalisation_loss, prechelt, training_progress
from tts_tuner.signals.series import Abstention
from tts_tuner.signals.stopping import REASONS, RULES, StoppingRule, reasons, signs, stopping
from tts_tuner.signals.vote import LEVELS, SAYS, WEIGHTS, Switches, Vote, asked_voters, attention_vote, decide, patience_vote, tally, two_thirds

curves = st.lists(st.floats(0.01, 100), min_size=1, max_size=40).map(np.array)
with_holes = st.lists(st.one_of(st.floats(0.01, 100), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=40).map(np.array)
said = st.sampled_from(SAYS)
STANDARD = (0.0, RULES['standard'].min_delta)


@given(x=with_holes, p=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_patience_is_the_rule_written_out(x, p):
    best = np.minimum.accumulate(np.where(np.isfinite(x), x, np.inf))
    found = patience(x, rule=PatienceRule(p, 0.0))
    if not np.isfinite(x).any(): assert isinstance(found, Abstention)
    elif np.isfinite(best).all(): assert found.stop == (len(x) > p and best[-1] >= best[-1 - p])


@given(x=curves, c=st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_relative_patience_has_no_unit_and_mode_is_a_mirror(x, c):
    rule = PatienceRule(4, 0.125, relative=True)
    power = 2.0 ** round(math.log2(c))  # exact in floating point
    assert patience(x, rule=rule).waited == patience(power * x, rule=rule).waited
    assert patience(x, rule=PatienceRule(4, 0.1)).best_index == patience(-x, rule=PatienceRule(4, 0.1, 'max')).best_index


def test_patience_defaults_and_refusals():
    assert (RUN.patience, RUN.min_delta, RUN.mode, RUN.restore_best) == (6, 0.001, 'min', True) and (STUDY.patience, STUDY.min_delta, STUDY.mode) == (5, 0.005, 'max')
    for wrong in (dict(patience=0), dict(min_delta=-1), dict(min_delta=math.nan), dict(mode='least')):
        with pytest.raises(ValueError, match=next(iter(wrong))): PatienceRule(**wrong)
    with pytest.raises(ValueError, match='steps of shape'): patience([1, 2], [3, 3])
    assert [curriculum_patience(e) for e in (0, 20, 120)] == [8, 5, 4] and progress_phase(0.7, 1).min_delta == 0.0005
    with pytest.raises(ValueError): progress_phase(1, 0)


@pytest.mark.parametrize('factor, bearable, threshold, cooldown', [(0.5, 4, 1e-4, 2), (0.1, 0, 0.1, 0), (0.7, 3, 0.0, 5)])
def test_plateau_is_torchs(factor, bearable, threshold, cooldown):
    import torch

    from tts_tuner.signals.patience import PlateauRule
    rng = np.random.default_rng(1)
    for _ in range(5):
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
        theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, 'min', factor, bearable, threshold, cooldown=cooldown)
        state = PlateauState(1.0)
        for v in np.where(rng.random(80) < 0.05, np.nan, np.exp(rng.standard_normal(80).cumsum() * 0.02)):
            theirs.step(v)
            state = plateau(state, v, PlateauRule(factor, bearable, threshold, cooldown))
            assert state.learning_rate == optimiser.param_groups[0]['lr']


def test_gain_over_a_window():
    assert relative_gain(np.linspace(1, 0.9, 11)) == pytest.approx(0.1) and gains_too_little(np.full(11, 2.0)) is True
    assert isinstance(relative_gain([0.0] * 12), Abstention) and isinstance(relative_gain([math.inf] * 12), Abstention)
    with pytest.raises(ValueError, match='window'): relative_gain([1.0], 0)


@given(e=curves, c=st.integers(-3, 3))
@settings(max_examples=40, deadline=None)
def test_prechelt_has_no_unit(e, c):
    tr = e[::-1]
    np.testing.assert_allclose(generalisation_loss(e * 2.0 ** c), generalisation_loss(e))
    for rule in (PrecheltRule('GL', 3), PrecheltRule('PQ', 0.5, 2), PrecheltRule('UP', 2, 2)):
        assert prechelt(e * 2.0 ** c, tr * 2.0 ** c, rule) == prechelt(e, tr, rule)
    assert generalisation_loss(np.sort(e)[::-1]).max() == 0 and not prechelt(np.sort(e)[::-1], tr)


def test_prechelt_refuses():
    with pytest.raises(ValueError, match='training'): prechelt([1.0, 2.0])
    with pytest.raises(ValueError, match='training of shape'): prechelt([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match='kind'): PrecheltRule('XY')
    assert isinstance(prechelt([1.0, math.nan], rule=PrecheltRule('GL')), Abstention) and isinstance(training_progress([1.0], 5), Abstention)


@given(says=st.tuples(said, said, said), order=st.permutations(range(3)))
@settings(max_examples=40, deadline=None)
def test_no_voter_alone_any_two(says, order):
    votes = [Vote(v, s) for v, s in zip(WEIGHTS, says)]
    found = tally([votes[i] for i in order])
    assert found.stop == (says.count('stop') >= 2) and found == tally(votes)
    for i, s in enumerate(says):  # one more voice for stopping never keeps a run going
        if s != 'stop': assert tally([*votes[:i], Vote(votes[i].voter, 'stop'), *votes[i + 1:]]).stop >= found.stop
    for e in found.evidence(): assert from_json(to_json(e)) == e


@given(says=st.lists(said, min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_two_thirds_in_whole_numbers(says):
    assert two_thirds([Vote(str(i), s) for i, s in enumerate(says)]).stop == (3 * says.count('stop') >= 2 * len(says))


def test_one_faulty_voter_of_three_is_masked():
    rng = np.random.default_rng(0)
    for honest in SAYS[:2]:
        for faulty in range(3):
            for _ in range(50):
                votes = [Vote(v, honest if i != faulty else str(rng.choice(SAYS))) for i, v in enumerate(WEIGHTS)]
                assert tally(votes).stop == two_thirds(votes).stop == (honest == 'stop')


def test_switches_change_their_own_vote():
    everything = ('patience', 'statistics', 'bayesian', 'attention')
    for level, says in itertools.product(LEVELS, itertools.product(SAYS, repeat=4)):
        votes = [Vote(v, s) for v, s in zip(everything, says)]
        whole = decide(votes, Switches(level=level))
        assert not decide(votes, Switches(level=level, early_stopping=False)).stop
        for name in ('statistics', 'bayesian', 'attention'):
            less = decide(votes, Switches(level=level, **{name: False}))
            assert {a.voter for a, b in zip(whole.votes, less.votes) if a != b} <= {name}
            assert name not in asked_voters(Switches(level=level, **{name: False}))
    with pytest.raises(ValueError, match='level'): Switches(level=4)
    with pytest.raises(ValueError, match='says'): Vote('x', 'maybe')


def test_votes_of_detectors_abstain():
    assert patience_vote(Abstention('nothing yet')) == Vote('patience', 'abstain', 'nothing yet')
    assert patience_vote(stopping([math.nan] * 3)).says == 'stop' and attention_vote([math.nan] * 9).says == 'abstain'
    with pytest.raises(ValueError, match='scores'): attention_vote([[0.1]])


@given(x=with_holes, loss=st.booleans(), c=st.integers(-6, 6))
@settings(max_examples=60, deadline=None)
def test_stopping_looks_back_only_and_has_no_unit(x, loss, c):
    other = x[::-1] if loss else None
    for name, rule in RULES.items():
        whole = reasons(signs(x, other, other, (0.0, rule.min_delta)), rule)
        for n in {1, len(x) // 2 or 1, len(x)}:
            part = None if other is None else other[:n]
            found = stopping(x[:n], None, part, part, rule)
            assert REASONS[whole[n - 1]] == found.why, name
            assert from_json(to_json(found.evidence())).verdict == (found.why or 'going on')
        scaled = None if other is None else 4.0 * other
        assert (reasons(signs(x * 2.0 ** c, scaled, scaled, (0.0, rule.min_delta)), rule) == whole).mean() > 0.9  # logarithms round at a bound


def test_stopping_by_reason():
    t = np.arange(60)
    falls = 0.3 + np.exp(-t / 8)
    assert all(stopping(falls[:n], None, falls[:n]).why in ('', 'still') for n in range(1, 61)) and not stopping(falls[:20], None, falls[:20]).stop
    assert stopping(np.r_[falls[:9], [np.nan] * 3]).why == 'broken' and not stopping(np.r_[falls[:9], [np.nan] * 2]).stop
    assert stopping(np.r_[falls[:9], [2.0] * 8]).why == 'collapsed' and stopping(np.r_[falls[:9], [2.0] * 8]).best_index == 8
    assert stopping(np.full(8, 0.9), None, np.linspace(6, 5, 8)).why == ''  # an error rate at rest while the loss still falls
    assert stopping(np.full(30, 0.9), None, np.linspace(6, 5, 30)).why == 'waited'
    assert stopping([]).stop is False and math.isnan(stopping([math.inf]).best_step)
    with pytest.raises(ValueError, match='training of shape'): stopping([1.0, 2.0], training=[1.0])
    with pytest.raises(ValueError, match='below 0'): stopping([-1.0])


def test_more_jitter_is_waited_for_longer():
    rng = np.random.default_rng(0)
    waits = []
    for jitter in (0.002, 0.01, 0.03):
        curve = (0.3 + np.exp(-np.arange(200) / 5)) * np.exp(jitter * rng.standard_normal(200))
        waits.append(stopping(curve[:40]).numbers['needed'])
    assert waits == sorted(waits) and waits[0] < 1.5 * StoppingRule().patience


def test_stopping_on_recorded_runs(shared_data):
    "The shipped rule saves more than every patience with as few false stops (its numbers were fitted with these runs among others)"
    with gzip.open(shared_data / 'curves/librispeech_runs.jsonl.gz', 'rt') as f: recorded = [json.loads(line) for line in f][::2]
    saved, oracle, false = {}, [], {}
    rules = {**{p: None for p in range(3, 26)}, **{n: r for n, r in RULES.items()}}
    for r in recorded:
        v, s = np.array(r['valid_wer'], float), np.array(r['step'], float)
        if np.isfinite(v).sum() < 10: continue
        f = np.where(np.isfinite(v), v, np.inf)
        oracle.append(1 - s[np.argmax(f <= f.min() * 1.005)] / s[-1])
        look = signs(v, r['valid_loss'], r['train_loss'], (0.0, *{x.min_delta for x in RULES.values()}))
        for name, rule in rules.items():
            stop = look.since[0.0] >= name if rule is None else reasons(look, rule) > 0
            at = stop.argmax() if stop.any() else len(v) - 1
            saved.setdefault(name, []).append(1 - s[at] / s[-1])
            false.setdefault(name, []).append(f[:at + 1].min() > f.min() * 1.005)
    for name in RULES:
        careful = [p for p in range(3, 26) if np.mean(false[p]) <= np.mean(false[name])]
        assert np.sum(saved[name]) > max((np.sum(saved[p]) for p in careful), default=0.0), name
    assert np.mean(false['standard']) < 0.04 and np.sum(saved['standard']) > 0.45 * np.sum(oracle)


def test_attention_that_was_lost_is_not_in_place():
    lost = attention_vote([0.3, 0.9, 0.9, 0.9, 0.9] + [0.1] * 6)
    assert lost.says == 'continue' and 'fell from 0.90 to 0.10' in lost.words
    with pytest.raises(ValueError, match='scores'): attention_vote([0.5] * 8 + [7.0])
