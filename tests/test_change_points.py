"Change points: published case, a second search as oracle, what must not move them, bad input"
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.config.errors import UserError
from tts_tuner.signals.change_points import _line_search, change_points, line_costs
from tts_tuner.signals.series import Abstention
from tts_tuner.signals.whitening import carried_noise

ruptures = pytest.importorskip('ruptures')
FEW = settings(max_examples=12, deadline=None)


@st.composite
def stairs(draw):
    "Three levels or lines with noise that carries over"
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    edges = np.cumsum([0, *rng.integers(15, 30, 3)])
    y = carried_noise(draw(st.sampled_from([0.0, 0.5, 0.8])), (edges[-1],), rng)
    for a, b in zip(edges, edges[1:]): y[a:b] += rng.normal(0, 6) + rng.normal(0, 0.1) * np.arange(b - a)
    return y


@FEW
@given(stairs(), st.sampled_from(['level', 'line']), st.floats(-50, 50), st.floats(0.01, 100))
def test_unit_and_zero_move_nothing(y, kind, zero, unit):
    found, moved = change_points(y, kind=kind), change_points(zero + unit * y, kind=kind)
    assert moved.indices == found.indices and moved.phi == found.phi
    np.testing.assert_allclose(moved.sigma, unit * found.sigma, rtol=1e-6)
    np.testing.assert_allclose(moved.penalty, unit**2 * found.penalty, rtol=1e-6)


@FEW
@given(stairs(), st.sampled_from(['level', 'line']))
def test_backwards_the_same_places(y, kind):
    found, back = change_points(y, kind=kind), change_points(y[::-1], kind=kind)
    assert tuple(len(y) - i for i in back.indices[::-1]) == found.indices and back.phi == found.phi
    np.testing.assert_allclose(back.before[::-1], found.after, atol=1e-8)


@FEW
@given(stairs())
def test_steps_only_name_the_places(y):
    t = 500 + 100 * np.arange(len(y))
    found = change_points(y, t)
    assert found.steps == tuple(float(t[i]) for i in found.indices) and found.indices == change_points(y).indices
    assert found.evidence().verdict == ('changed' if found.steps else 'steady') and found.evidence().numbers['changes'] == len(found.steps)


@FEW
@given(stairs(), st.floats(0.5, 50))
def test_lines_are_searched_as_ruptures_does(y, penalty):
    t = np.arange(len(y), dtype=float)
    theirs = ruptures.Pelt('linear', min_size=5, jump=1).fit(np.column_stack([y, t, np.ones(len(y))])).predict(pen=penalty)[:-1]
    cost = line_costs(y, t)
    total = lambda cuts: sum(cost[a, b] + penalty for a, b in zip([0, *cuts], [*cuts, len(y)]))
    assert total(_line_search(y, t, 5)(penalty)) <= total(theirs) + 1e-8


def test_the_nile_fell_once():
    nile = pytest.importorskip('statsmodels.datasets.nile').load().data
    found = change_points(nile['volume'].to_numpy(), nile['year'].to_numpy())
    assert found.indices == (28,) and found.steps == (1899.0,)
    np.testing.assert_allclose((found.before[0], found.after[0]), (1097.75, 849.9722), atol=1e-3)  # means of 1871 to 1898 and 1899 to 1970


def test_false_alarms_are_rare_where_noise_carries_over():
    rng = np.random.default_rng(1)
    for phi in (0.0, 0.5, 0.9, 0.98): assert np.mean([bool(change_points(y).indices) for y in carried_noise(phi, (30, 100), rng)]) <= 0.15


def test_bad_input():
    for poor in ([], [1.0] * 40, np.arange(19.0), [np.nan] * 40, [*range(30), np.inf]): assert isinstance(change_points(poor), Abstention)
    rng = np.random.default_rng(0).normal(size=30)
    for wrong, words in ((dict(values=rng[None]), r'\(1, 30\)'), (dict(values=rng, steps=range(29)), r'\(29,\)'), (dict(values=rng, steps=[0] * 30), 'rise'),
                         (dict(values=rng, kind='mean'), 'mean'), (dict(values=rng, strength=0), 'strength'), (dict(values=rng, least=2, kind='line'), 'least')):
        with pytest.raises(ValueError, match=words): change_points(**wrong)


def test_without_ruptures_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ruptures', None)
    with pytest.raises(UserError, match=r'tts_tuner\[signals\]'): change_points(np.random.default_rng(0).normal(size=30))
    assert change_points(np.random.default_rng(0).normal(size=30), kind='line').indices == ()
