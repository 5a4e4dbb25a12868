"""Verdicts about runs: properties, oracles, and what they say of recorded runs."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.config.contracts import Evidence, from_json, to_json
from tts_tuner.signals.diverging import diverging, diverging_history
from tts_tuner.signals.never_stops import StopVerdict, never_stops, rate_interval
from tts_tuner.signals.series import Abstention
from tts_tuner.signals.will_it_align import FORCED_MODEL, FULL, FULL_MODEL, AlignVerdict, early_numbers, fit_model, rates, will_it_align

CURVES = Path(__file__).resolve().parents[1] / 'bench/curves/tacotron2.jsonl.gz'
losses = st.lists(st.floats(0.01, 100), min_size=8, max_size=40).map(np.array)
shares = st.floats(0, 1)


@given(n=st.integers(1, 200), data=st.data())
@settings(max_examples=40, deadline=None)
def test_interval_of_a_share_is_scipys(n, data):
    from scipy.stats import binomtest
    k = data.draw(st.integers(0, n))
    theirs = binomtest(k, n).proportion_ci(0.9, 'wilson')
    assert rate_interval(k / n, n, 1.6448536269514722) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def verdict_of(found): return found.verdict if isinstance(found, StopVerdict) else 'none'


@given(rates=st.lists(shares, min_size=8, max_size=20), lower=shares, n=st.integers(4, 60))
@settings(max_examples=60, deadline=None)
def test_fewer_sentences_that_end_never_help_the_gate(rates, lower, n):
    order, aligned = ('never stops', 'none', 'stops'), np.ones(len(rates))
    before, after = (verdict_of(never_stops(r, aligned, n)) for r in (np.array(rates), lower * np.array(rates)))
    assert order.index(after) <= order.index(before)


@given(early=st.lists(shares, max_size=10), late=st.lists(shares, min_size=8, max_size=8))
@settings(max_examples=40, deadline=None)
def test_only_the_last_evaluations_count_for_the_gate(early, late):
    rates = np.array(early + late)
    assert verdict_of(never_stops(rates, np.ones(len(rates)), 16)) == verdict_of(never_stops(late[::-1], np.ones(8), 16))


def test_gate_without_attention_on_the_text_is_not_judged():
    found = never_stops(np.zeros(12), np.r_[np.full(11, 0.9), 0.6], 16)
    assert isinstance(found, Abstention) and 'attention' in found.reason
    assert never_stops(np.ones(8), np.ones(8), 16, np.full(8, 0.1)).verdict == 'stops too early'


@given(y=losses, factor=st.floats(0.01, 100))
@settings(max_examples=60, deadline=None)
def test_divergence_does_not_depend_on_the_unit(y, factor):
    factor = 2.0 ** round(np.log2(factor))  # exact in floating point
    assert [v.verdict for v in diverging_history(y)] == [v.verdict for v in diverging_history(factor * y)]


@given(y=losses, n=st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_divergence_is_said_from_the_past_alone(y, n):
    n = min(n, len(y))
    assert diverging(y[:n]) == diverging_history(y)[n - 1]


@given(seed=st.integers(0, 10**6), at=st.integers(8, 30), height=st.floats(1, 1e6))
@settings(max_examples=60, deadline=None)
def test_one_spike_is_no_divergence(seed, at, height):
    t = np.arange(32)
    y = 2 * np.exp(-t / 6) + 1 + 0.001 * np.random.default_rng(seed).standard_normal(32)
    y[at] += height
    assert {v.verdict for v in diverging_history(y)} == {'calm'}


@given(seed=st.integers(0, 10**6), at=st.integers(6, 25), factor=st.floats(2, 1e6))
@settings(max_examples=60, deadline=None)
def test_a_jump_that_stays_is_said_at_its_second_evaluation(seed, at, factor):
    t = np.arange(at + 2)
    y = 2 * np.exp(-t / 6) + 1 + 0.001 * np.random.default_rng(seed).standard_normal(at + 2)
    y[at:] += factor
    assert [v.verdict for v in diverging_history(y, t)[at - 1:]] == ['calm', 'calm', 'diverging'] and diverging(y, t).since_step == at


@pytest.mark.parametrize('y', [[np.nan], [1, np.inf], [3, 2, np.nan, 1, 1]])
def test_a_loss_that_is_no_number_is_divergence(y):
    found = diverging(y)
    assert found.verdict == 'diverging' and found.statistic == np.inf and found.since_step == int(np.argmax(~np.isfinite(y)))
    assert from_json(to_json(found.evidence())) == found.evidence()


def test_too_little_and_wrong_input():
    assert isinstance(diverging([]), Abstention) and isinstance(diverging([1.0]), Abstention)
    assert diverging(np.zeros(20)).verdict == diverging(np.full(20, 3.0)).verdict == 'calm'
    for y, steps in (([1, 2, 3], [1, 2]), ([1, 2, 3], [1, 1, 2]), ([1, 2, 3], [3, 2, 1]), (np.ones((2, 2)), None)):
        with pytest.raises(ValueError, match='shape'): diverging(y, steps)
        with pytest.raises(ValueError, match='shape'): never_stops(y, y, 16, steps=steps)
    with pytest.raises(ValueError, match='stop_rates'): never_stops(np.full(8, 2.0), np.ones(8), 16)
    with pytest.raises(ValueError, match='duration_ratios'): never_stops(np.ones(8), np.ones(8), 16, np.ones(7))
    with pytest.raises(ValueError, match='free_alignment_score'): early_numbers(dict(alignment_score=np.ones(3), gate_accuracy=np.ones(3)))
    with pytest.raises(ValueError, match='alignment_score'): early_numbers(dict(alignment_score=[0, 1, 3]), ['alignment_score'])
    with pytest.raises(ValueError, match='shape'): fit_model(np.ones((3, 2)), [1, 0, 1])
    with pytest.raises(ValueError, match='both kinds'): fit_model(np.ones((3, 1)), [1, 1, 1], ['a'])
    with pytest.raises(ValueError, match='shape'): rates([0.5], [True, False], FULL_MODEL)


@given(x=st.lists(st.floats(-2, 2), min_size=4, max_size=4), more=st.floats(0, 2), which=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_better_numbers_never_lower_the_probability(x, more, which):
    x, better = np.array(x), np.array(x)
    better[which] += more
    assert FULL_MODEL.probability(better) >= FULL_MODEL.probability(x)


@given(seed=st.integers(0, 10**6), ridge=st.floats(0.1, 10))
@settings(max_examples=15, deadline=None)
def test_fit_is_the_minimum_and_does_not_mind_the_order(seed, ridge):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, 3))
    y = rng.random(50) < 1 / (1 + np.exp(-x @ [2, 1, 0]))
    if y.all() or not y.any(): return
    model, order = fit_model(x, y, 'abc', ridge), rng.permutation(50)
    again = fit_model(x[order], y[order], 'abc', ridge)
    assert np.allclose([model.bias, *model.weights], [again.bias, *again.weights], atol=1e-6) and min(model.weights) >= 0

    def cost(b, w): return np.logaddexp(0, -(2 * y - 1) * (b + x @ w)).sum() + ridge / 2 * (w @ w) + 1e-3 / 2 * b * b
    b, w = model.bias, np.array(model.weights)
    for move in 0.01 * rng.normal(size=(20, 4)): assert cost(b + move[0], np.maximum(w + move[1:], 0)) >= cost(b, w) - 1e-9


def test_verdict_about_a_run_that_is_too_young():
    run = dict(alignment_score=[0.9] * 4, gate_accuracy=[0.9] * 4, free_alignment_score=[0.9] * 4, success=[1.0] * 4)
    assert isinstance(will_it_align(run, [1, 2, 3, 4], 13), Abstention) and isinstance(will_it_align({k: v[:2] for k, v in run.items()}, [3, 4], 12), Abstention)
    found = will_it_align(run, [1, 2, 3, 4], 12)
    assert isinstance(found, AlignVerdict) and found.verdict == 'will speak' and isinstance(found.evidence(), Evidence)
    assert isinstance(will_it_align({k: [np.nan] * 4 for k in run}, [1, 2, 3, 4], 12), Abstention) and isinstance(will_it_align({k: [] for k in run}, [], 12), Abstention)
    with pytest.raises(ValueError, match='shape'): will_it_align(run, [1, 2, 3], 9)
    with pytest.raises(ValueError, match='rise'): will_it_align(run, [1, 2, 2, 4], 9)


@pytest.fixture(scope='module')
def recorded() -> list[dict]:
    "Recorded runs that validated at least once"
    runs = [json.loads(line) for line in gzip.decompress(CURVES.read_bytes()).decode().splitlines()]
    return [r for r in runs if r['step']]


def column(run, name, until=1.0):
    return np.array([np.nan if v is None else v for v in run['validation'][name]])[[s <= until * run['budget'] for s in run['step']]]


def table(runs, names, until=1 / 3):
    used = {n.removeprefix('best_') for n in names}
    found = [(early_numbers({n: column(r, n, until) for n in used}, names), column(r, 'success')[-1] >= 0.5) for r in runs]
    return [np.array(v) for v in zip(*((x, y) for x, y in found if not isinstance(x, Abstention)))]


def test_a_verdict_at_a_third_fitted_on_one_corpus_holds_on_the_other(recorded):
    early = [r for r in recorded if not r['jump'] and r['fault'] != 'kicks']
    p, y = [], []
    for fitted, tested in (('demo', 'digits'), ('digits', 'demo')):
        model = fit_model(*table([r for r in early if r['corpus'] == fitted], FULL), FULL)
        x, spoke = table([r for r in early if r['corpus'] == tested], FULL)
        p, y = np.r_[p, model.probability(x)], np.r_[y, spoke].astype(bool)
    found = rates(p, y, model)
    assert min(found['precision of "will fail"'], found['precision of "will speak"']) > 0.85 and found['no verdict'] <= 0.2
    assert min(found['recall of failures'], found['recall of speakers']) > 0.7 and np.mean((p - y) ** 2) < 0.13


@pytest.mark.parametrize('model', [FULL_MODEL, FORCED_MODEL])
def test_the_shipped_model_is_the_one_the_recorded_runs_give(recorded, model):
    again = fit_model(*table([r for r in recorded if not r['jump'] and r['fault'] != 'kicks'], model.names), model.names)
    assert np.allclose([again.bias, *again.weights], [model.bias, *model.weights], atol=0.05)


def test_recorded_runs_that_go_well_never_diverge_and_hundredfold_rates_do(recorded):
    for run in recorded:
        said = [n for n, v in enumerate(diverging_history(column(run, 'val_loss')), 1) if v.verdict == 'diverging']
        if not run['fault'] and column(run, 'success')[-1] >= 0.5: assert not said, run['name']
        if (run['jump'] or 0) >= 100:
            half = sum(s <= run['budget'] / 2 for s in run['step'])
            assert said and said[0] - half <= 3, run['name']


def test_rulers_of_the_gate_stay_in_their_ranges():
    fine = np.full(9, 0.9)
    for bad in (dict(diagonality=1e9 * fine), dict(duration_ratios=-fine), dict(sentences=0)):
        with pytest.raises(ValueError, match=next(iter(bad))): never_stops(**dict(stop_rates=fine, diagonality=fine, sentences=16) | bad)
    assert never_stops(fine, fine + 0.1 + 1e-12, 16).verdict == 'stops'
    assert not isinstance(early_numbers({n.removeprefix('best_'): np.full(4, 1 + 1e-12) for n in FULL}), Abstention)
