"Series, whitening, CUSUM, Page-Hinkley, Mann-Kendall, trend: published tables, other libraries, and what must not change an answer"
import math, warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau, theilslopes

from tts_tuner.signals.cusum import CusumDesign, CusumState, cusum, cusum_step, design_for, run_length, siegmund, watch
from tts_tuner.signals.mann_kendall import inversions, mann_kendall, sen_slope, ties, two_sided
from tts_tuner.signals.page_hinkley import PageHinkleyDesign, page_hinkley
from tts_tuner.signals.series import Abstention, as_series, finite_or_abstain
from tts_tuner.signals.streaming import SortedBag, StreamingMannKendall
from tts_tuner.signals.trend import hamed_rao, prewhitened, statistics_opinion, trend, trend_free_prewhitened, yue_wang
from tts_tuner.signals.whitening import block_means, carried_noise, carried_over, line_through, reference, robust_sigma, without_spikes

FEW = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def series(draw, least=10, most=60, tied=True):
    "Noise with some of it carried over, some trend, at times rounded"
    rng, n = np.random.default_rng(draw(seeds)), draw(st.integers(least, most))
    x = carried_noise(draw(st.floats(-0.5, 0.95)), (n,), rng) + draw(st.floats(-0.2, 0.2)) * np.arange(n)
    return np.round(x, 1) + 0.0 if tied and draw(st.booleans()) else x


def p_of(found): return found if isinstance(found, float) else found.p


# ---- what is wrong is refused, what is too little is abstained from

DETECTORS = dict(mann_kendall=mann_kendall, trend=trend, hamed_rao=hamed_rao, yue_wang=yue_wang, prewhitened=prewhitened, tfpw=trend_free_prewhitened,
                 sen_slope=sen_slope, line=line_through, carried_over=carried_over, reference=reference, watch=watch, opinion=statistics_opinion)


@pytest.mark.parametrize('name', DETECTORS)
def test_poor_data_ends_in_an_abstention(name):
    for poor in ([], [1.0], [1.0, 2.0, 3.0], [2.5] * 80, [np.nan] * 80, [*range(79), np.inf], [1e308, -1e308] * 40):
        found = DETECTORS[name](poor)
        assert isinstance(found, Abstention) and found.reason, (name, poor, found)


@pytest.mark.parametrize('name', DETECTORS)
def test_what_is_no_series_is_refused_by_name_and_shape(name):
    with pytest.raises(ValueError, match=r'values.*\(2, 40\)'): DETECTORS[name](np.ones((2, 40)))


@pytest.mark.parametrize('call', [trend, sen_slope, line_through, watch, statistics_opinion])
def test_steps_that_do_not_fit_or_rise_are_refused(call):
    y = np.random.default_rng(0).standard_normal(60)
    for steps in (np.arange(59), np.r_[np.arange(59), 58], np.arange(60)[::-1], np.full(60, np.nan)):
        with pytest.raises(ValueError, match='steps of shape'): call(y, steps)


def test_streams_refuse_what_is_not_finite():
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match='not finite'): cusum_step(CusumState.start(CusumDesign()), bad)
        with pytest.raises(ValueError, match='not finite'): page_hinkley([1.0, bad])
        with pytest.raises(ValueError, match='not finite'): StreamingMannKendall().append(bad)
    with pytest.raises(ValueError, match='not in the bag'): SortedBag().remove(1.0)


def test_settings_that_mean_nothing_are_refused():
    y = np.random.default_rng(0).standard_normal(60)
    for call in (lambda: trend(y, confidence=1.0), lambda: sen_slope(y, confidence=0), lambda: block_means(y, 0), lambda: without_spikes(y, 0), lambda: design_for(3),
                 lambda: run_length(CusumDesign(0.5, -1)), lambda: carried_noise(1.0, (5,), np.random.default_rng(0)), lambda: StreamingMannKendall(2),
                 lambda: robust_sigma([]), lambda: page_hinkley(y, PageHinkleyDesign(forget=0)), lambda: statistics_opinion(y, window=3), lambda: without_spikes([np.nan] * 30)):
        with pytest.raises(ValueError): call()


def test_series():
    t, y = as_series([1, 2], [10, 30])
    assert t.dtype == y.dtype == np.float64 and finite_or_abstain(y, 2) is y
    assert finite_or_abstain(y, 3, 'losses').reason == '2 losses are fewer than the 3 this needs'


# ---- Mann-Kendall

@FEW
@given(series(least=4, most=60))
def test_mann_kendall_is_kendalls_tau(x):
    found = mann_kendall(x)
    if isinstance(found, Abstention): return
    n, pairs = len(x), len(x) * (len(x) - 1) / 2
    tied_pairs = sum(t * (t - 1) / 2 for t in found.tied)
    assert found.s == sum(int(np.sign(x[j] - x[i])) for i in range(n) for j in range(i + 1, n))
    other = kendalltau(np.arange(n), x, method='exact' if not found.tied else 'asymptotic')
    np.testing.assert_allclose(other.statistic * math.sqrt(pairs * (pairs - tied_pairs)), found.s, atol=1e-6)
    if not found.tied and n <= 30: np.testing.assert_allclose(found.p, other.pvalue, rtol=1e-9)


def test_variants_agree_with_the_usual_package():
    mk = pytest.importorskip('pymannkendall')
    rng = np.random.default_rng(3)
    for phi, n, tied in ((0, 40, False), (0.5, 80, False), (0.8, 120, False), (0.3, 60, True)):
        x = carried_noise(phi, (n,), rng) + 0.01 * np.arange(n)
        if tied: x = np.round(x, 1)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            plain, slope = mk.original_test(x), mk.sens_slope(x)
            usual = (plain.p, mk.hamed_rao_modification_test(x, lag=10).p, mk.yue_wang_modification_test(x, lag=1).p,
                     mk.pre_whitening_modification_test(x).p, mk.trend_free_pre_whitening_modification_test(x).p)
        ours = (mann_kendall(x).p, hamed_rao(x), yue_wang(x), prewhitened(x), trend_free_prewhitened(x))
        np.testing.assert_allclose(ours, usual, rtol=1e-5)
        assert mann_kendall(x).s == plain.s and abs(mann_kendall(x).tau - plain.Tau) < 1e-12 and abs(sen_slope(x).slope - slope.slope) < 1e-12


@FEW
@given(series(least=5, most=80), seeds)
def test_sen_slope_is_that_of_theil(x, seed):
    t = np.cumsum(np.random.default_rng(seed).integers(1, 5, len(x))).astype(float)
    found = sen_slope(x, t)
    if isinstance(found, Abstention): return
    other = theilslopes(x, t)
    np.testing.assert_allclose(found.slope, other.slope, atol=1e-12)
    assert found.low <= found.slope <= found.high
    if not ties(x): np.testing.assert_allclose((found.low, found.high), (other.low_slope, other.high_slope), atol=2 * np.ptp(x) / 4)


def test_published_probabilities():
    "One-sided probabilities of S as printed in tables of Kendall's exact distribution (Hollander and Wolfe; Gilbert 1987, table A18)"
    for n, s, printed in ((4, 6, 0.042), (5, 8, 0.042), (5, 10, 0.0083), (8, 16, 0.031), (9, 18, 0.038), (10, 21, 0.036)):
        assert abs(two_sided(s, n) / 2 - printed) < 6e-4, (n, s, two_sided(s, n) / 2)


def test_large_counts_stay_exact():
    n = 70_000  # more pairs than 32 bits hold
    assert inversions(np.arange(n)[::-1]) == n * (n - 1) // 2 and mann_kendall(np.arange(n)).s == n * (n - 1) // 2


@FEW
@given(series())
def test_order_is_all_that_counts(x):
    found = mann_kendall(x)
    if isinstance(found, Abstention): return
    assert mann_kendall(np.arctan(x / 3)).s == found.s == -mann_kendall(x[::-1]).s == -mann_kendall(-x).s
    assert mann_kendall(x * 1e-3 + 5).p == found.p


@FEW
@given(series(least=4), st.one_of(st.none(), st.integers(4, 30)))
def test_stream_equals_test_of_the_window(x, window):
    stream = StreamingMannKendall(window)
    for i, v in enumerate(x):
        stream.append(v)
        assert stream.result() == mann_kendall(x[max(0, i + 1 - (window or len(x))):i + 1])


def test_a_long_stream_with_ties_and_splits():
    rng = np.random.default_rng(0)
    x = np.round(np.cumsum(rng.standard_normal(5000)), 1) + 0.0
    all_of_it, window = StreamingMannKendall(), StreamingMannKendall(1500)
    for v in x.tolist(): all_of_it.append(v), window.append(v)
    assert all_of_it.result() == mann_kendall(x) and window.result() == mann_kendall(x[-1500:])
    same = StreamingMannKendall()
    for _ in range(1200): same.append(1.0)
    assert isinstance(same.result(), Abstention)


# ---- trend

@FEW
@given(series(tied=False), st.floats(0.01, 100), st.floats(-50, 50))
def test_trend_knows_no_units(x, scale, level):
    found, other = trend(x), trend(x * scale + level, np.arange(len(x)) * 250.0)
    np.testing.assert_allclose(other.slope * 250, found.slope * scale, rtol=1e-6, atol=1e-9 * scale)
    assert other.phi == found.phi and abs(other.p - found.p) < 1e-6 and other.spikes == found.spikes


@FEW
@given(series(tied=False))
def test_trend_backwards_and_upside_down(x):
    found, back, down = trend(x), trend(x[::-1]), trend(-x)
    for other in (back, down):
        np.testing.assert_allclose((other.slope, other.low, other.high), (-found.slope, -found.high, -found.low), rtol=1e-6, atol=1e-9)
        assert abs(other.p - found.p) < 1e-6 and abs(other.p_falling + found.p_falling - 1) < 1e-6


def test_line_agrees_with_least_squares_of_statsmodels():
    sm = pytest.importorskip('statsmodels.api')
    x = carried_noise(0.6, (80,), np.random.default_rng(5)) + 0.03 * np.arange(80)
    line = line_through(x)
    cov = line.phi ** np.abs(np.subtract.outer(np.arange(80), np.arange(80)))
    other = sm.GLS(x, sm.add_constant(np.arange(80.0)), sigma=cov).fit()
    np.testing.assert_allclose((line.slope, line.error), (other.params[1], other.bse[1]), rtol=1e-8)


def test_trend_keeps_its_promises():
    "False alarms and power of the test in use: slope 0.01 sigma a step, 200 points"
    rng = np.random.default_rng(11)
    for phi, alarms, power in ((0.5, 0.1, 0.9), (0.9, 0.15, 0.45)):  # 0.54 is the power at 0.9; 300 series can miss by 0.08
        noise = carried_noise(phi, (300, 200), rng)
        assert np.mean([trend(x).p <= 0.05 for x in noise]) <= alarms
        assert np.mean([trend(x + 0.01 * np.arange(200)).p <= 0.05 for x in noise]) >= power


def test_trend_says_what_it_saw():
    x = 2 - 0.05 * np.arange(40) + 0.1 * np.random.default_rng(0).standard_normal(40)
    evidence = trend(x, 100 + np.arange(40) * 10).evidence()
    assert evidence.verdict == 'falling' and evidence.since_step == 100 and evidence.confidence > 0.99 and 'falling' in evidence.words
    assert trend(np.arange(20.0)).direction == 'rising' and trend(np.arange(20.0)).p < 1e-6


def test_spikes_leave_the_trend_as_it_was():
    x = 0.2 * np.random.default_rng(1).standard_normal(50) - 0.05 * np.arange(50)
    spiked = x.copy()
    spiked[[7, 30]] += (40, -60)
    found = trend(spiked)
    assert found.spikes == 2 and abs(found.slope / trend(x).slope - 1) < 0.1


def test_opinion_of_a_falling_a_flat_and_a_rising_run():
    rng = np.random.default_rng(2)
    noise = 0.001 * carried_noise(0.3, (40,), rng)
    falling, flat, rising = (statistics_opinion(1 + slope * np.arange(40) + noise, np.arange(40) * 100, horizon=1000) for slope in (-0.01, 0, 0.01))
    assert (falling.says, flat.says, rising.says) == ('continue', 'stop', 'stop') and rising.worse and not flat.worse and falling.since_best == 0
    assert falling.low <= falling.gain <= falling.high and abs(falling.gain - 0.1) < 0.02 and falling.p_improving > 0.99 > 0.01 > rising.p_improving
    mirrored = statistics_opinion(-(1 - 0.01 * np.arange(40) + noise), np.arange(40) * 100, horizon=1000, lower_is_better=False)
    np.testing.assert_allclose((mirrored.gain, mirrored.low, mirrored.high), (falling.gain, falling.low, falling.high))
    assert (mirrored.says, mirrored.since_best) == (falling.says, falling.since_best)


# ---- whitening

def test_reference_is_frozen_and_robust():
    rng = np.random.default_rng(0)
    x = 5 + carried_noise(0.6, (4000,), rng)
    usual = reference(x[:1000])
    z = usual.innovations(x[1000:], x[999])
    assert abs(usual.phi - 0.6) < 0.08 and abs(z.std() - 1) < 0.08 and abs(carried_over(z)) < 0.08
    assert replace(usual, n=3).innovations([usual.level]).tolist() == [0.0]
    assert np.isnan(usual.innovations([5.0, np.nan, 5.0, 5.0])).tolist() == [False, True, True, False]


@FEW
@given(series(least=30), st.floats(0.01, 100), st.floats(-10, 10))
def test_whitening_knows_no_units(x, scale, level):
    found, other = reference(x), reference(x * scale + level)
    if isinstance(found, Abstention) or robust_sigma(x) < 0.05: return
    np.testing.assert_allclose((other.phi, other.level, other.sigma), (found.phi, found.level * scale + level, found.sigma * scale), rtol=1e-6, atol=1e-7 * scale)


def test_a_reference_of_few_levels_has_a_sigma():
    for x in ([0.0, 1.0] * 30, [0.0] * 30 + [1.0] + [0.0] * 30):
        found = reference(x)
        assert isinstance(found, Abstention) or found.sigma > 1e-3


# ---- CUSUM and Page-Hinkley

def test_run_lengths_of_the_literature():
    "Two sums, k = 0.5: Montgomery chapter 9 and Lucas and Crosier 1982 (headstart h/2); Siegmund's formula"
    assert [round(run_length(CusumDesign(0.5, h))) for h in (4, 5)] == [168, 465]
    assert round(run_length(CusumDesign(0.5, 5, 0.5))) == 430 and abs(run_length(CusumDesign(0.5, 5, 0.5), 1) - 6.35) < 0.005
    for every, limit in ((200, 4.171), (500, 5.071), (1000, 5.757), (2000, 6.447), (5000, 7.361), (10_000, 8.053)): assert abs(design_for(every).limit - limit) < 1e-3
    for shift in (0, 0.5, 1): assert abs(siegmund(CusumDesign(0.5, 5), shift) / run_length(CusumDesign(0.5, 5), shift) - 1) < 0.01


def test_a_batch_of_streams_lives_as_long_as_designed():
    rng, design = np.random.default_rng(4), design_for(50, headstart=0.5)
    lives = [cusum(rng.standard_normal(600), design).at + 1 for _ in range(400)]
    assert abs(np.mean(lives) - 50) < 3 * np.std(lives) / 20


@FEW
@given(seeds, st.floats(0.3, 2))
def test_detectors_upside_down(seed, shift):
    z = np.random.default_rng(seed).standard_normal(150)
    z[60:] += shift
    turn = {'up': 'down', 'down': 'up'}
    up, down = cusum(z), cusum(-z)
    assert (up is None) == (down is None) and (up is None or (down.direction, down.at, down.since, -down.shift) == (turn[up.direction], *up[1:]))
    up, down = page_hinkley(z), page_hinkley(-z)
    assert (up is None) == (down is None) and (up is None or (down.direction, *down[1:]) == (turn[up.direction], *up[1:]))


@FEW
@given(seeds)
def test_page_hinkley_with_a_level_that_stays_is_a_cusum(seed):
    "With so much weight on a level of 0 that 100 points do not move it"
    from tts_tuner.signals.page_hinkley import PageHinkleyState, page_hinkley_step
    z = np.random.default_rng(seed).standard_normal(100) + 0.4
    state, found = PageHinkleyState(mean=0.0, weight=1e15), None
    for v in z:
        state, found = page_hinkley_step(state, float(v), PageHinkleyDesign(0.5, 5.0, least=1))
        if found: break
    other = cusum(z, CusumDesign(0.5, 5.0))
    assert (found is None) == (other is None) and (found is None or tuple(found) == (other.direction, other.at, other.since))


@FEW
@given(seeds)
def test_a_higher_limit_is_never_earlier(seed):
    z = np.random.default_rng(seed).standard_normal(200) + 0.3
    at = [a.at if (a := cusum(z, CusumDesign(0.5, h))) else 999 for h in (3, 4, 5, 6)]
    assert at == sorted(at)


def test_watch_dates_a_change_in_steps():
    rng = np.random.default_rng(0)
    x = 1 + 0.01 * carried_noise(0.3, (200,), rng)
    assert watch(x[:120], np.arange(120) * 50, design=design_for(20_000)).verdict == 'quiet'
    x[120:] += 0.03
    found = watch(x, np.arange(200) * 50, design=design_for(20_000))
    assert found.verdict == 'up' and 5700 <= found.since_step <= 6300 and found.at_step <= 6600
    evidence = found.evidence()
    assert evidence.since_step == found.since_step and 'up' in evidence.words


@pytest.mark.parametrize('values', [np.ones(9) * 1j, ['a'] * 9, np.ones((3, 3))])
def test_what_is_no_series_of_numbers_is_named(values):
    for call in (trend, mann_kendall, inversions, ties, line_through):
        with pytest.raises(ValueError, match='values'): call(values)


def test_no_order_without_finite_values():
    for call in (inversions, ties):
        with pytest.raises(ValueError, match='not all finite'): call([1.0, np.nan, 2.0])


def test_values_next_to_nothing_do_not_divide_by_zero():
    assert isinstance(trend(5e-323 * np.arange(1, 31)), Abstention) and isinstance(line_through(5e-323 * np.arange(1, 31)), Abstention)


def test_sen_slope_of_values_far_from_zero_by_both_ways():
    x = np.round(np.random.default_rng(0).standard_normal(300)) + 1e12
    few, many = sen_slope(x), sen_slope(x, direct=10)
    np.testing.assert_allclose((many.slope, many.low, many.high), (few.slope, few.low, few.high), atol=1e-9)


def test_settings_that_make_no_sense_are_refused():
    x = np.exp(-np.arange(40) / 9)
    for call in (lambda: run_length(CusumDesign(0.5, 500, 0)), lambda: cusum([1, 2, 30], CusumDesign(0.5, math.nan, 0)), lambda: cusum([1, 2], CusumDesign(0.5, -1, 0)),
                 lambda: watch(x, calm=-3), lambda: statistics_opinion(x, horizon=math.nan), lambda: statistics_opinion(x, horizon=-5),
                 lambda: statistics_opinion(x, worth=math.nan), lambda: hamed_rao(x, lags=0)):
        with pytest.raises(ValueError): call()
