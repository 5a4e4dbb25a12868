"Rulers of attention: what must not change a score, one map against a batch, numpy against torch, oracles that are not ours"
from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.quality.alignment import AlignmentScores, is_healthy, score_alignment, token_accuracy, token_error, true_alignment
from tts_tuner.quality.attention_batch import (
    BatchScores, decoder_steps, distance_to_truth, pad_maps, positions, score_batch, score_maps, spans, token_readings)
from tts_tuner.quality.failure_maps import attention_evidence, failure_maps
from tts_tuner.quality.phases import RULE, PhaseState, TrainingPhase, follow, follow_phases, phase_of
from tts_tuner.signals.series import Abstention
from tts_tuner.training.attention_twin import scores_in_place, twin_positions, twin_scores

FEW = settings(max_examples=25, deadline=None)


@st.composite
def batches(draw, square=False):
    "Maps of different sizes, sharp and soft, with empty rows now and then"
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps = []
    for _ in range(draw(st.integers(1, 6))):
        T, N = rng.integers(1, 25, 2)
        A = rng.dirichlet(np.full(N, rng.choice([0.05, 0.5, 3])), N if square else T)
        if rng.random() < 0.2: A[rng.integers(len(A))] = 0
        maps.append(A)
    return maps, rng


def close(a: BatchScores, b: BatchScores, *names, order=slice(None)):
    for name in names or BatchScores.__dataclass_fields__: np.testing.assert_allclose(getattr(a, name), getattr(b, name)[order], atol=1e-12, err_msg=name)


@FEW
@given(batches(), st.integers(1, 5))
def test_a_batch_equals_its_maps_one_by_one(found, r):
    maps, _ = found
    np.testing.assert_allclose(np.stack(astuple(score_maps(maps, r)), 1), [astuple(score_alignment(m, r)) for m in maps], atol=1e-12)


@FEW
@given(batches())
def test_order_padding_and_scale_change_nothing(found):
    maps, rng = found
    A, steps, tokens = pad_maps(maps)
    s = score_batch(A, steps, tokens)
    order = rng.permutation(len(A))
    close(score_batch(A[order], steps[order], tokens[order]), s, order=order)
    outside = ~((np.arange(A.shape[1] + 7) < steps[:, None])[:, :, None] & (np.arange(A.shape[2] + 4) < tokens[:, None])[:, None])
    padded = np.where(outside, rng.choice([np.nan, np.inf, -1, 5], outside.shape), np.pad(A, ((0, 0), (0, 7), (0, 4))))
    close(score_batch(padded, steps, tokens), s)
    close(score_batch(A * rng.uniform(0.01, 50, A.shape[:2])[:, :, None], steps, tokens), s)
    for given_, same in zip(astuple(token_readings(padded, steps, tokens)), astuple(token_readings(A, steps, tokens))):
        assert np.array_equal(given_[:, :A.shape[2]], same) and not given_[:, A.shape[2]:].any()


@FEW
@given(batches(square=True))
def test_read_from_its_end_a_map_scores_the_same(found):
    maps, _ = found
    full = [m for m in maps if (m.sum(1) > 0).all()]
    if full: close(score_maps(m[::-1, ::-1] for m in full), score_maps(full), 'diagonality', 'focus', 'coverage', 'monotonicity', 'entropy')


@FEW
@given(batches(), st.floats(0.3, 4))
def test_a_rising_map_of_the_weights_moves_no_peak(found, power):
    "Jumps, passes and the steps a token is held depend on the order of the weights alone"
    maps, _ = found
    A, steps, tokens = pad_maps(maps)
    close(score_batch(A**power, steps, tokens), score_batch(A, steps, tokens), 'forward_jumps', 'backward_jumps')
    sharper, plain = token_readings(A**power, steps, tokens), token_readings(A, steps, tokens)
    assert np.array_equal(sharper.repeated, plain.repeated) and np.array_equal(sharper.held, plain.held)


@FEW
@given(batches())
def test_scores_keep_their_ranges(found):
    maps, _ = found
    s = score_maps(maps)
    for name in ('diagonality', 'focus', 'coverage', 'monotonicity', 'entropy'): assert ((getattr(s, name) >= 0) & (getattr(s, name) <= 1 + 1e-12)).all()
    assert (s.penalised() <= s.diagonality).all() and (s.diagonality - s.penalised() <= 0.1 * (1 - s.monotonicity) + 1e-12).all()
    assert s.mean() == AlignmentScores(*np.mean([astuple(x) for x in s], axis=0).tolist())


@FEW
@given(batches())
def test_tokens_by_position_agree_with_the_scores(found):
    maps, _ = found
    A, steps, tokens = pad_maps(maps)
    s, told = score_batch(A, steps, tokens), token_readings(A, steps, tokens)
    sound = s.broken == 0
    np.testing.assert_allclose((told.skipped.sum(1) / tokens)[sound], 1 - s.coverage[sound], atol=1e-12)
    assert np.array_equal(told.held.sum(1)[sound], steps[sound]) and not (told.repeated.any(1) & (s.backward_jumps == 0)).any()


def test_repeats_against_a_plain_count():
    rng = np.random.default_rng(0)
    for _ in range(50):
        N, walk = 9, rng.integers(0, 9, 25)
        passes, current = [], set()
        for a, b in zip([walk[0], *walk], walk):
            if b < a - 1:
                passes.append(current)
                current = set()
            current.add(int(b))
        expected = [max(0, sum(n in p for p in [*passes, current]) - 1) for n in range(N)]
        assert token_readings(np.eye(N)[walk][None]).repeated[0].tolist() == expected


def test_spans_give_the_mask_back():
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask, again = rng.random(20) < 0.5, np.zeros(20, bool)
        for a, b in spans(mask): again[a:b + 1] = True
        assert np.array_equal(mask, again)


@FEW
@given(batches(), st.integers(1, 5))
def test_the_twin_in_torch_agrees(found, r):
    maps, _ = found
    A, steps, tokens = pad_maps(maps)
    A[-1, 0, 0] = np.nan
    there = torch.from_numpy(A)
    close(twin_scores(there, steps, tokens, r).numpy(), score_batch(A, steps, tokens, r))
    close(scores_in_place(there, torch.from_numpy(steps), torch.from_numpy(tokens), r), score_batch(A, steps, tokens, r))
    for ours, theirs in zip(twin_positions(there, steps, tokens), positions(A, steps, tokens)): np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
def test_the_twin_agrees_on_a_gpu():
    rng = np.random.default_rng(0)
    A, steps, tokens = pad_maps(rng.dirichlet(np.full(int(n), 0.3), int(t)) for t, n in zip(rng.integers(1, 60, 20), rng.integers(1, 40, 20)))
    there = torch.from_numpy(A).cuda()
    close(twin_scores(there, steps, tokens, 2).numpy(), score_batch(A, steps, tokens, 2))
    close(scores_in_place(there, torch.from_numpy(steps).cuda(), tokens), score_batch(A, steps, tokens))
    for ours, theirs in zip(twin_positions(there, steps, tokens), positions(A, steps, tokens)): np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_the_twin_is_no_part_of_learning():
    A = torch.rand(2, 5, 4, requires_grad=True)
    assert not twin_scores(A).values.requires_grad
    half = twin_scores(A.half()).numpy()
    assert np.isfinite(np.stack(astuple(half))).all() and not half.broken.any()


@FEW
@given(st.integers(0, 2**32 - 1))
def test_distance_to_the_true_times(seed):
    rng = np.random.default_rng(seed)
    times = [np.concatenate([[0], np.cumsum(rng.gamma(2, 0.05, n - 1))]) for n in rng.integers(1, 20, 4)]
    steps = [int(t[-1] / 0.03) + 3 for t in times]
    maps = [rng.dirichlet(np.ones(len(t)), T) for t, T in zip(times, steps)]
    far = distance_to_truth(positions(*pad_maps(maps)), times, 0.03)
    np.testing.assert_allclose(far.accuracy, [token_accuracy(m, t, 0.03) for m, t in zip(maps, times)], atol=1e-12)
    np.testing.assert_allclose(far.tokens, [token_error(m, t, 0.03) for m, t in zip(maps, times)], atol=1e-12)
    right = distance_to_truth(positions(*pad_maps(true_alignment(t, T, 0.03) for t, T in zip(times, steps))), times, 0.03)
    assert (right.accuracy == 1).all() and (right.tokens == 0).all() and (right.seconds <= 0.03).all()


def test_what_is_no_batch_is_named():
    A = np.ones((2, 4, 3))
    for wrong, words in ((dict(A=A[0]), r'\(4, 3\)'), (dict(A=A[:, :0]), r'\(2, 0, 3\)'), (dict(A=A, steps=[1]), r'steps of shape \(1,\)'),
                         (dict(A=A, steps=[0, 4]), 'steps .* from 0'), (dict(A=A, tokens=[3, 4]), 'tokens .* to 4'), (dict(A=A, tokens=[1.0, 2.0]), 'whole numbers')):
        for ruler in (score_batch, token_readings, positions):
            with pytest.raises(ValueError, match=words): ruler(**wrong)
        with pytest.raises(ValueError, match=words): twin_scores(torch.from_numpy(wrong['A']), *(wrong.get(k) for k in ('steps', 'tokens')))
    with pytest.raises(ValueError, match='no maps'): pad_maps([])
    with pytest.raises(ValueError, match='times of shape'): distance_to_truth(positions(A), [[0, 1], [0, 1, 2]], 0.1)
    with pytest.raises(ValueError, match='r=0'): decoder_steps([3], 0)


def test_one_token_one_step_and_nothing_at_all():
    s = score_maps([[[0.3]], [[0.2, 0.8]], [[1.0], [0.0]], np.zeros((3, 2)), [[np.nan, 1]], [[np.inf, 1]], [[-1, 2]]])
    assert s.broken.tolist() == [0, 0, 0, 1, 1, 1, 1] and s.diagonality[0] == s.coverage[0] == s.focus[0] == 1 and s.entropy[0] == 0
    for broken in list(s)[3:]: assert broken == score_alignment([[np.nan]])
    told = token_readings(*pad_maps([np.zeros((3, 2)), [[1.0]]]))
    assert told.skipped.tolist() == [[True, True], [False, False]]


def test_no_failure_is_healthy_and_all_are_told():
    for r in (1, 2, 5):
        maps = failure_maps(90, 40, seed=r)
        for name, s in zip(maps, score_maps((m.A for m in maps.values()), r)):
            assert not is_healthy(s), name
            assert attention_evidence(maps[name].A, r=r).verdict != 'healthy'


unit = st.floats(0, 1)


@FEW
@given(st.lists(unit, min_size=1, max_size=40))
def test_phases_change_no_more_often_than_they_may(d):
    track = follow_phases(d)
    when = np.flatnonzero(np.diff(track.phases)) + 1
    assert len(when) == len(track.changes) and (np.diff([0, *when]) >= RULE.dwell).all()
    state = PhaseState()
    for i, x in enumerate(d): state, _ = follow(state, i, x)
    assert state == track.state and track.phase == state.phase
    assert state == follow(state, 99, float('nan'))[0]


@FEW
@given(unit, unit, st.integers(3, 30), st.integers(1, 2))
def test_fewer_bad_evaluations_than_the_dwell_change_nothing(level, bad, at, many):
    run = np.full(40, level)
    run[at:at + many] = bad
    assert set(follow_phases(run).phases) == {phase_of(level)}


@FEW
@given(st.lists(unit, min_size=2, max_size=40))
def test_a_run_that_never_falls_never_falls_back(d):
    assert (np.diff(follow_phases(np.sort(d)).phases) >= 0).all()


def test_phase_bounds_and_bad_input():
    assert [phase_of(x) for x in (0, np.nextafter(0.1, 0), 0.1, np.nextafter(0.5, 0), 0.5, np.nextafter(0.7, 0), 0.7, 1)] == [p for p in TrainingPhase for _ in (0, 1)]
    for wrong in (-0.1, 1.1, float('nan')):
        with pytest.raises(ValueError): phase_of(wrong)
    with pytest.raises(ValueError, match='shape'): follow_phases([[0.1]])
    with pytest.raises(ValueError, match='rise'): follow_phases([0.1, 0.2], [2, 2])
    with pytest.raises(ValueError, match='d=1.5'): follow_phases([1.5])
    assert isinstance(follow_phases([]), Abstention) and isinstance(follow_phases([0.1, np.nan]), Abstention)


def test_the_average_is_pandas_own():
    pd = pytest.importorskip('pandas')
    d = np.random.default_rng(0).random(50)
    np.testing.assert_allclose(follow_phases(d).smooth, pd.Series(d).ewm(span=5).mean())


@pytest.mark.parametrize('bad', [dict(r=0), dict(g=0.0), dict(g=np.nan)])
def test_rulers_without_a_width_or_a_step_say_so(bad):
    with pytest.raises(ValueError, match='r='): score_batch(np.full((2, 5, 4), 0.25), **bad)


@pytest.mark.parametrize('seconds', [0.0, -1.0, np.nan])
def test_distance_to_truth_needs_a_time_for_a_step(seconds):
    with pytest.raises(ValueError, match='seconds_per_step'): distance_to_truth(positions(np.full((1, 5, 4), 0.25)), [np.arange(4.0)], seconds)


@pytest.mark.parametrize('frames', [[-5], [2.7], [np.nan]])
def test_frames_are_whole_numbers(frames):
    with pytest.raises(ValueError, match='frames'): decoder_steps(frames, 2)
