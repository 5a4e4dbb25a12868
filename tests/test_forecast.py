"""The forecaster against textbook formulas, a well-known library and the invariances it claims; its rivals against scipy."""
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.signals.forecast import A0, B0, JITTER, RULE, Forecast, ForecastRule, Gain, Settings, decay_kernel, forecast, prior_settings, thinned, weigh
from tts_tuner.signals.rivals import Point, exponential, last_value, power_law
from tts_tuner.signals.series import Abstention

PLAIN = ForecastRule(early=0.0, widen=(1.0, 0.0), draws=20000, trust=1.0)


def curve(n: int = 20, seed: int = 0, noise: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    t = np.arange(1.0, n + 1) * 100
    return t, (0.4 + 1.5 * np.exp(-t / 600)) * np.exp(noise * np.random.default_rng(seed).standard_normal(n))


def one(*values: float, span: float) -> Settings:
    return Settings(np.log([values]), np.ones(1), span)


def test_kernel_is_the_mixture_of_decays():
    from scipy.stats import gamma
    for alpha, beta in ((0.5, 0.3), (1.0, 1.0), (3.2, 2.0)):
        for t, u in ((0.0, 0.0), (0.1, 0.4), (1.0, 3.0)):
            rates, d = np.linspace(0, 200, 40001)[1:], gamma(alpha, scale=1 / beta)
            shares = np.diff(d.cdf(np.concatenate([[0.0], rates])))  # of each small stretch of rates, so that a density without bound does no harm
            assert decay_kernel([t], [u], [alpha], [beta])[0, 0, 0] == pytest.approx(shares @ np.exp(-(rates - 2.5e-3) * (t + u)), rel=1e-3)


def test_futures_are_those_of_sklearn():
    "With decays that are over at once, level, wandering and noise are kernels that scikit-learn has"
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    t, y = curve()
    found = forecast(y, t, 3000, settings=one(300, 1e-2, 0.3, 0.7, 0.02, 4.0, span=t[-1]), rule=PLAIN)
    z = (np.log(y) - np.log(y[-1])) / np.log(y).std()
    kernel = ConstantKernel(4.0) + ConstantKernel(0.3) * Matern(0.7, nu=0.5) + WhiteKernel(0.02)
    oracle = GaussianProcessRegressor(kernel, optimizer=None, alpha=JITTER).fit(t[:, None] / t[-1], z)
    mean, sd = oracle.predict(found.steps[:, None] / t[-1], return_std=True)
    K = kernel(t[:, None] / t[-1]) + JITTER * np.eye(20)
    a, b = A0 + 10, B0 + 0.5 * z @ np.linalg.solve(K, z)
    drawn = (np.log(found.futures) - np.log(y[-1])) / np.log(y).std()
    assert drawn.mean(0) == pytest.approx(mean, abs=0.02)
    assert drawn.std(0) == pytest.approx(sd * np.sqrt(b / (a - 1)), rel=0.03)  # variance of Student's t with 2a degrees of freedom


def test_weights_are_marginal_likelihoods():
    from scipy.stats import multivariate_t
    t, y = curve()
    found = weigh(y, t, rule=PLAIN)
    assert isinstance(found, Settings) and found.weights.sum() == pytest.approx(1)
    z, x, score = (np.log(y) - np.log(y[-1])) / np.log(y).std(), t / t[-1], []
    for k in range(3):
        alpha, beta, omega, ell, nu, gamma = np.exp(found.logs[k])
        K = gamma + (beta / (x[:, None] + x + beta)) ** alpha + omega * np.exp(-abs(x[:, None] - x) / ell) + (nu + JITTER) * np.eye(20)
        score.append(multivariate_t.logpdf(z, np.zeros(20), B0 / A0 * K, 2 * A0))
    assert np.diff(np.log(found.weights[:3])) == pytest.approx(np.diff(score), abs=1e-5)


def test_prior_fills_its_ranges():
    from scipy.stats import kstest
    logs = (prior_settings() - np.log(RULE.centres)) / np.array(RULE.spreads)
    assert all(kstest(column, 'norm').pvalue > 0.5 for column in logs.T)
    assert np.abs(np.corrcoef(logs.T) - np.eye(6)).max() < 0.15


def test_bounds_on_the_end_hold_as_often_as_they_say():
    rng, hit, n = np.random.default_rng(5), 0, 50
    for _ in range(n):
        t = np.arange(1.0, 61)
        y = rng.uniform(0.2, 2) + np.exp(rng.uniform(-1, 1)) * np.exp(-t / rng.uniform(5, 40)) + np.exp(rng.uniform(-1, 0)) * t ** -rng.uniform(0.3, 1)
        y *= np.exp(rng.uniform(0.002, 0.03) * rng.standard_normal(60))
        low, high = forecast(y[:25], t[:25], 60).interval()
        hit += low[-1] <= y[-1] <= high[-1]
    assert 0.8 <= hit / n <= 1


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-4, 1e4), st.floats(1e-3, 1e5))
def test_units_do_not_matter(seed: int, unit: float, pace: float):
    t, y = curve(seed=seed)
    a, b = forecast(y, t, 3000), forecast(y * unit, t * pace, 3000 * pace)  # a rounding may give another setting to a future, so not every one is the same
    assert b.steps == pytest.approx(a.steps * pace)
    for share in (0.05, 0.5, 0.95): assert np.log(b.quantile(share) / unit) == pytest.approx(np.log(a.quantile(share)), abs=0.05)
    assert a.gain(0.005 * a.best).chance == pytest.approx(b.gain(0.005 * b.best).chance, abs=0.03)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6))
def test_higher_is_better_is_a_mirror(seed: int):
    t, y = curve(seed=seed)
    rule = ForecastRule(logs=False)
    down, up = forecast(y, t, 3000, rule=rule), forecast(-y, t, 3000, lower_is_better=False, rule=rule)
    assert up.futures == pytest.approx(-down.futures) and up.gain(0.01).chance == down.gain(0.01).chance and up.best == -down.best


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=6), st.integers(0, 100))
def test_chances_fall_with_what_is_asked(worths: list[float], seed: int):
    t, y = curve(seed=seed)
    found = forecast(y, t, 4000)
    chances = [found.gain(w).chance for w in sorted(worths)]
    assert all(0 <= c <= 1 for c in chances) and chances == sorted(chances, reverse=True)


def test_gain_counts_futures():
    found = Forecast(np.array([10.0, 20.0, 30.0]), np.array([[1.0, 0.8, 0.7], [1.0, 1.0, 0.85], [1.2, 1.1, 1.0], [1.0, 1.0, 0.95]]), 1.0, 5, True, one(1, 1, 1, 1, 1, 1, span=1))
    assert found.gain(0.1) == Gain(0.5, 25.0, 0.1, 1.0, 5, 30.0) and found.gain(2).by is None
    assert found.gain(0.1).evidence().verdict == 'improving' and found.gain(2).evidence().verdict == 'converged'
    with pytest.raises(ValueError, match='worth'): found.gain(float('nan'))


def test_runs_that_converged_and_runs_that_fall():
    t, y = curve(40, noise=0.002)
    assert forecast(y, t, 5000).gain(0.1 * y.min()).chance < 0.01
    assert forecast(y[:8], t[:8], 4000).gain(0.02 * y[7]).chance > 0.95


def test_settings_are_good_for_some_evaluations_more():
    t, y = curve(40)
    kept = weigh(y[:30], t[:30])
    old, new = forecast(y[:36], t[:36], 8000, settings=kept), forecast(y[:36], t[:36], 8000)
    assert old.settings is kept and old.median[-1] == pytest.approx(new.median[-1], rel=0.05)


@pytest.mark.parametrize(('values', 'words'), [([1.0] * 30, 'the same'), ([9.0, *[0.9] * 40], 'the same'), ([1.0, 0.9], 'fewer'), ([1.0] * 9 + [np.nan], 'not finite'),
                                               ([np.inf] * 9, 'not finite'), ([], 'fewer'), (-np.geomspace(1, 1e300, 30), 'too large')])
def test_abstains_with_a_reason(values: list[float], words: str):
    for call in (lambda: forecast(values, until=1000), lambda: weigh(values)):
        found = call()
        assert isinstance(found, Abstention) and words in found.reason


@pytest.mark.parametrize('wrong', [dict(values=[[1.0]]), dict(values=np.arange(9), steps=np.arange(8)), dict(values=np.arange(9), steps=[1] * 9),
                                   dict(values=np.arange(9.0), steps=np.arange(9) - 3.0), dict(values=np.arange(9.0), until=8), dict(values=np.arange(9.0), until=np.nan)])
def test_callers_that_are_wrong_are_told(wrong: dict):
    with pytest.raises(ValueError, match='shape|until'): forecast(**wrong)


def test_wild_values_give_finite_answers():
    for y in (np.exp(np.linspace(0, 300, 30)), np.r_[np.ones(15), np.full(15, 1e140)] * (1 + 1e-3 * np.arange(30)), -np.geomspace(1, 1e100, 30)):
        found = forecast(y, np.arange(1, 31), 60)
        assert np.isfinite(found.median).all() and 0 <= found.gain(1.0).chance <= 1


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5000), st.integers(2, 60))
def test_thinning_keeps_the_mean(n: int, most: int):
    t = np.arange(n, dtype=float)
    a, b, counts = thinned(t, t**2, most)
    assert len(a) <= max(most, 2) and counts.sum() == n and (np.diff(a) > 0).all() and (b * counts).sum() == pytest.approx((t**2).sum())


def test_is_quick():
    t, y = curve(100)
    kept = weigh(y, t)

    def ms(call) -> float:
        spent = []
        for _ in range(9):
            begun = time.process_time()
            call()
            spent.append(1000 * (time.process_time() - begun))
        return float(np.median(spent))
    assert ms(lambda: weigh(y, t)) < 100 and ms(lambda: forecast(y, t, 20000, settings=kept).gain(0.01)) < 20


def test_rivals_find_what_scipy_finds():
    from scipy.optimize import least_squares
    t, y = curve(30)
    x = t / t[-1]
    for rival, shape, start in ((power_law, lambda c: x**-c, (0.4, 0.5, -0.3)), (exponential, lambda c: np.exp(-c * x), (0.4, 1.0, 1.0))):
        fit = least_squares(lambda p, shape=shape: p[0] + p[1] * shape(np.exp(p[2])) - y, start, xtol=1e-12, ftol=1e-12)
        c = np.exp(fit.x[2])
        there = fit.x[0] + fit.x[1] * (2.0**-c if rival is power_law else np.exp(-2 * c))
        found = rival(y, t, 2 * t[-1])
        assert isinstance(found, Point) and found.value == pytest.approx(there, abs=1e-4) and found.low < found.value < found.high


def test_rivals_abstain_and_refuse():
    for rival in (last_value, power_law, exponential):
        assert isinstance(rival([1.0, 2.0], until=4), Abstention) and isinstance(rival([np.nan] * 9, until=20), Abstention)
        assert rival([0.7] * 12, until=30).value == pytest.approx(0.7)
        with pytest.raises(ValueError, match='until'): rival([1.0] * 9, until=8)


def test_beats_its_rivals_on_recorded_runs(shared_data):
    "A few of the runs that the figures are from"
    values = np.load(shared_data / 'curves' / 'taskset_imdb_patch32_IRNN64_relu_last_bs128.npz')['valid_loss'].astype(float)
    errors, hit = [], []
    for y in values[np.isfinite(values).all(1) & (np.ptp(values, 1) > 1e-6)][:60]:
        found = forecast(y[:13], np.arange(1.0, 14), 51)
        if isinstance(found, Abstention): continue
        low, high = found.interval()
        hit.append(low[-1] <= y[-1] <= high[-1])
        guesses = (found.median[-1], last_value(y[:13], np.arange(1.0, 14), 51).value, power_law(y[:13], np.arange(1.0, 14), 51).value)
        errors.append([min(abs(g / y[-1] - 1), 1) for g in guesses])
    ours, last, power = np.mean(errors, 0)
    assert ours < last and ours < power and 0.8 <= np.mean(hit) <= 1
