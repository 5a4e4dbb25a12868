"Rulers of sound against closed forms, the packages that everybody uses, real speech, and what must not change them"
import math
import socket
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tts_tuner.audio.wav import load_wav, resample
from tts_tuner.config.errors import UserError
from tts_tuner.quality.gates import GateLimits, monitor_gate, release_gate, sanity_gate
from tts_tuner.quality.health import HEALTH_PARTS, HEALTH_WEIGHTS, Health, HealthPart, health, with_ratios
from tts_tuner.quality.opinions import PredictedOpinion, Rating, mean_opinion, opinion_difference, parse_ratings, predict_opinion
from tts_tuner.quality.perceptual import PerceptualScores, clock, clock_trouble, perceptual_scores, pesq_score, stoi_score
from tts_tuner.quality.pitch import PitchTrack, pitch_errors, track_pitch
from tts_tuner.quality.speech import (CepstralRuler, cepstral_distance, copy_synthesis_distance, duration_ratio, mean_frame, mean_frame_distance,
    mel_spectral_distance, stop_rate, warping_path)
from tts_tuner.signals.series import Abstention

few = settings(max_examples=25, deadline=None)
RATE = 22050
logmel = st.integers(2, 12).flatmap(lambda T: arrays(np.float64, (T, 20), elements=st.floats(-12, 3, width=32)))


@pytest.fixture(scope='module')
def clips(shared_data):
    "Three recordings of a few seconds, and the first of them sent through the vocoder"
    from tts_tuner.audio.griffin_lim import vocode
    from tts_tuner.audio.mel import MelSpectrogram
    from tts_tuner.config.hparams import create_hparams
    hp, files = create_hparams('default'), sorted((shared_data / 'ljspeech-mini/wavs').glob('*.flac'))
    sounds = [load_wav(files[i], RATE)[:4 * RATE] for i in (0, 4, 8)]
    analyse = MelSpectrogram(hp)
    return sounds, vocode(analyse(sounds[0]), hp), analyse


# --- cepstral and spectral distance -------------------------------------------------------------------------------------

def by_the_book(a, b, D, warped):
    import librosa, scipy.fft
    ca, cb = (scipy.fft.dct(x, norm='ortho')[:, 1:D + 1] for x in (a, b))
    C = np.linalg.norm(ca[:, None] - cb[None], axis=2) / np.sqrt(a.shape[1] / 2)
    path = librosa.sequence.dtw(C=C)[1] if warped else np.stack([np.arange(len(a))] * 2, 1)
    return 10 * np.sqrt(2) / np.log(10) * C[path[:, 0], path[:, 1]].mean()


@pytest.mark.parametrize('D', [13, 24])
@pytest.mark.parametrize('warped', [True, False])
def test_cepstral_distance_is_the_textbooks_on_real_speech(clips, D, warped):
    sounds, copy, analyse = clips
    a, b = analyse(sounds[0])[:200], analyse(copy)[:200]
    assert cepstral_distance(a, b, CepstralRuler(D=D, warped=warped)) == pytest.approx(by_the_book(a.astype(float), b.astype(float), D, warped), abs=1e-9)


def test_what_the_distances_say_of_real_speech(clips):
    "A copy is near, another sentence is far, and the mean frame lies between"
    sounds, copy, analyse = clips
    mels = [analyse(x) for x in sounds]
    d = copy_synthesis_distance([mels[0]], [analyse(copy)])
    assert d < 4 < mean_frame_distance(mels, mean_frame(mels)) < 16
    assert d < cepstral_distance(mels[0], mels[1]) and mel_spectral_distance(mels[0], analyse(copy)) < mel_spectral_distance(mels[0], mels[1])


@few
@given(logmel, st.floats(-20, 20), st.integers(1, 3))
def test_cepstral_distance_knows_neither_level_nor_pace(x, gain, times):
    assert cepstral_distance(x, x + gain) < 1e-9 and cepstral_distance(x, np.repeat(x, times, axis=0)) == 0


@few
@given(logmel, logmel)
def test_distances_are_symmetric_and_not_negative(x, y):
    for f in (cepstral_distance, mel_spectral_distance):
        there, back = f(x, y), f(y, x)
        assert there >= 0 and there == pytest.approx(back, rel=0.2, abs=1e-9)  # among walks of one cost the shorter differs
    C = [cepstral_distance(x, y, CepstralRuler(D=D)) for D in (5, 13, 19)]
    assert 0 <= min(C)


@few
@given(st.integers(2, 12).flatmap(lambda T: st.tuples(*[arrays(np.float64, (T, 20), elements=st.floats(-12, 3, width=32))] * 3)))
def test_frame_by_frame_they_are_metrics_and_obey_parseval(three):
    a, b, c = three
    for f in (lambda p, q: mel_spectral_distance(p, q, warped=False), lambda p, q: cepstral_distance(p, q, CepstralRuler(warped=False))):
        assert f(a, a) == 0 and f(a, b) == pytest.approx(f(b, a), abs=1e-9) and f(a, c) <= f(a, b) + f(b, c) + 1e-9
    for p, q in zip(a, b):
        loud = 20 / math.log(10) * (p.mean() - q.mean())
        whole = cepstral_distance(p[None], q[None], CepstralRuler(D=19)) ** 2 + loud ** 2
        assert mel_spectral_distance(p[None], q[None]) ** 2 == pytest.approx(whole, rel=1e-9, abs=1e-9)


@few
@given(logmel, st.floats(-40, 40))
def test_a_gain_in_decibels_is_the_spectral_distance(x, g):
    assert mel_spectral_distance(x, x + g * math.log(10) / 20, warped=False) == pytest.approx(abs(g), abs=1e-9)


def test_distances_refuse_what_they_cannot_measure():
    x = np.zeros((5, 20))
    assert math.isnan(cepstral_distance(x, x * np.nan)) and math.isnan(mel_spectral_distance(x + np.inf, x))
    for f in (cepstral_distance, mel_spectral_distance, warping_path):
        with pytest.raises(ValueError, match=r'\(20,\)'): f(x, x[0])
        with pytest.raises(ValueError, match='bands'): f(x, x[:, :9])
    with pytest.raises(ValueError, match='5 and 4 frames'): mel_spectral_distance(x, x[:4], warped=False)
    with pytest.raises(ValueError, match='NaN'): mean_frame([x * np.nan])
    with pytest.raises(ValueError, match='NaN'): mean_frame_distance([x], x[0] * np.nan)


@few
@given(st.lists(st.booleans(), min_size=1), st.randoms())
def test_stop_rate_counts(stopped, shuffle):
    rate = stop_rate(stopped)
    shuffle.shuffle(stopped)
    assert rate == stop_rate(stopped) == sum(stopped) / len(stopped)


@pytest.mark.parametrize('bad', [lambda: stop_rate([]), lambda: stop_rate([0.5]), lambda: stop_rate([[True]]), lambda: duration_ratio(1, 0), lambda: duration_ratio(1, math.nan),
    lambda: duration_ratio(-1, 2), lambda: duration_ratio(math.inf, 2)])
def test_counts_refuse_what_is_none(bad):
    with pytest.raises(ValueError): bad()


# --- PESQ and STOI ------------------------------------------------------------------------------------------------------

def test_scores_are_those_of_the_packages(clips):
    pesq, pystoi = pytest.importorskip('pesq'), pytest.importorskip('pystoi')
    sounds, copy, _ = clips
    a, b = sounds[0][:len(copy)].astype(np.float64), copy.astype(np.float64)
    found = perceptual_scores(sounds[0], copy, RATE, 'copy_synthesis')
    assert isinstance(found, PerceptualScores)
    assert found.pesq == pytest.approx(pesq.pesq(16000, resample(a, RATE, 16000), resample(b, RATE, 16000), 'wb'), abs=1e-6)
    assert found.stoi == pytest.approx(pystoi.stoi(a, b, RATE), abs=1e-9) and found.estoi == pytest.approx(pystoi.stoi(a, b, RATE, extended=True), abs=1e-6)
    assert 3.5 < found.pesq < 4.3 and found.stoi > 0.95 and found.stoi == stoi_score(sounds[0], copy, RATE, 'teacher_forced')
    assert set(found.as_metrics()) == {'pesq', 'stoi', 'estoi'}


def test_scales_end_where_the_standards_say(clips):
    pytest.importorskip('pesq'), pytest.importorskip('pystoi')
    x = clips[0][0][:2 * RATE]
    assert pesq_score(x, x, RATE, 'copy_synthesis') == pytest.approx(0.999 + 4 / (1 + math.exp(-1.3669 * 4.5 + 3.8224)), abs=1e-3)  # P.862.2
    assert pesq_score(x, x, RATE, 'copy_synthesis', 'narrow') == pytest.approx(0.999 + 4 / (1 + math.exp(-1.4945 * 4.5 + 4.6607)), abs=1e-3)  # P.862.1
    assert stoi_score(x, x, RATE, 'copy_synthesis') == pytest.approx(1) and stoi_score(x, x, RATE, 'copy_synthesis', extended=True) == pytest.approx(1)


def test_real_sounds_that_share_no_clock_are_refused(clips):
    import librosa
    sounds, copy, _ = clips
    x, rng = sounds[0], np.random.default_rng(0)
    shared = dict(copy=copy, quieter=0.1 * copy, noisy=x + x.std() * rng.normal(size=len(x)))
    apart = dict(late=np.roll(x, RATE // 20), other=sounds[1], longer=np.concatenate([x, x[:RATE]]), slower=librosa.effects.time_stretch(x, rate=0.97)[:len(x)],
        paused=np.concatenate([x[:2 * RATE], np.zeros(RATE // 8), x[2 * RATE:-RATE // 8]]))
    for name, y in shared.items(): assert clock_trouble(x, y, RATE, 'copy_synthesis') is None, name
    for name, y in apart.items():
        refused = perceptual_scores(x, y, RATE, 'teacher_forced')
        assert isinstance(refused, Abstention) and 'share a clock' in refused.reason, name
    for f in (pesq_score, stoi_score, perceptual_scores): assert 'pace of its own' in f(x, x, RATE, 'free_running').reason


def bursts(seed, n=2 * RATE):
    "Noise bursts of random colour and length: cheap, and every half second different"
    rng = np.random.default_rng(seed)
    x, at = np.zeros(n), 0
    while at < n:
        length = int(rng.uniform(0.04, 0.2) * RATE)
        piece = np.convolve(rng.normal(size=length), [1, rng.uniform(-1, 1)], 'same') * rng.choice([0, 0.3, 1])
        x[at:at + length] = piece[:n - at]
        at += length
    return x


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(-40, 40), st.floats(1e-3, 10), st.floats(1e-3, 10))
def test_a_delay_is_found_at_any_level(seed, hops, gain, other):
    shift, x = hops * 110, bursts(seed)
    late = np.roll(x, shift)
    found, loud = clock(x, late, RATE), clock(gain * x, other * late, RATE)
    assert found.lag == pytest.approx(hops * 0.005, abs=0.0051) and (found.late > 0.5) == (abs(hops) > 4)
    assert loud.lag == found.lag and loud.late == found.late and loud.likeness == pytest.approx(found.likeness, abs=1e-6)


@pytest.mark.parametrize('a, b, why', [(np.nan, 1, 'not finite'), (1, np.inf, 'not finite'), (0, 1, 'silent'), (1, 0, 'silent')])
def test_no_score_without_sound(a, b, why):
    x = bursts(1)
    with np.errstate(invalid='ignore'): found = perceptual_scores(a * x, b * np.abs(x) if b == np.inf else b * x, RATE, 'copy_synthesis')
    assert isinstance(found, Abstention) and why in found.reason


def test_wrong_calls_are_named():
    x = bursts(2)
    with pytest.raises(ValueError, match=r'reference .* \(1, 44100\)'): perceptual_scores(x[None], x, RATE, 'copy_synthesis')
    with pytest.raises(ValueError, match=r'heard .* \(1, 44100\)'): stoi_score(x, x[None], RATE, 'copy_synthesis')
    with pytest.raises(ValueError, match='origin'): pesq_score(x, x, RATE, 'somewhere')
    with pytest.raises(ValueError, match='rate'): pesq_score(x, x, -1, 'copy_synthesis')
    assert isinstance(perceptual_scores(x[:99], x[:99], RATE, 'copy_synthesis'), Abstention) and isinstance(perceptual_scores([], x, RATE, 'copy_synthesis'), Abstention)


@pytest.mark.parametrize('package, extra, ask', [('pesq', 'quality', lambda x: pesq_score(x, x, RATE, 'copy_synthesis')),
    ('pystoi', 'quality', lambda x: stoi_score(x, x, RATE, 'copy_synthesis')), ('speechmos', 'mos', lambda x: predict_opinion(0.1 * x, RATE))])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, extra, ask):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'tts_tuner\[{extra}\]'): ask(bursts(3) / 10)


# --- pitch --------------------------------------------------------------------------------------------------------------

@few
@example(454.0, 1.0, 1)
@example(495.0, 1.0, 1)
@given(st.floats(70, 495), st.floats(1e-4, 1e3), st.integers(1, 8))
def test_a_tone_has_its_pitch(f, level, harmonics):
    t = np.arange(RATE // 3) / RATE
    found = track_pitch(level * sum(np.sin(2 * np.pi * f * k * t) / k for k in range(1, harmonics + 1)), RATE).f0[4:-5]
    assert np.all(np.abs(1200 * np.log2(found / f)) < 3)


def test_pitch_agrees_with_the_usual_tracker_on_real_speech(clips):
    import librosa
    x = clips[0][0][:3 * RATE]
    ours, theirs = track_pitch(x, RATE), librosa.pyin(x, fmin=65, fmax=500, sr=RATE, frame_length=2048, hop_length=256)[0]
    e = pitch_errors(PitchTrack(theirs, 256 / RATE), ours)
    assert len(ours.f0) == len(theirs) and e.gross < 0.03 and abs(e.shift_cents) < 15 and e.voicing < 0.3
    both = ours.voiced & ~np.isnan(theirs)
    assert np.median(np.abs(1200 * np.log2(ours.f0[both] / theirs[both]))) < 40


def test_a_copy_keeps_its_melody_and_a_transposed_one_is_off_by_as_much(clips):
    import librosa
    sounds, copy, analyse = clips
    original = track_pitch(sounds[0], RATE)
    n = len(track_pitch(copy, RATE).f0)
    again = pitch_errors(PitchTrack(original.f0[:n], original.hop_seconds), track_pitch(copy, RATE))
    assert again.frame < 0.2 and abs(again.shift_cents) < 10
    higher = librosa.effects.pitch_shift(sounds[0], sr=RATE, n_steps=2)
    e = pitch_errors(original, track_pitch(higher, RATE), warping_path(analyse(sounds[0]), analyse(higher)))
    assert e.shift_cents == pytest.approx(200, abs=30)


tracks = st.integers(12, 60).flatmap(lambda n: arrays(np.float64, n, elements=st.floats(60, 500)))


@few
@given(tracks, st.floats(-24, 24), st.integers(0, 1))
def test_pitch_errors_have_closed_forms(f0, semitones, gap):
    f0[3:5] = np.nan if gap else f0[3:5]
    a, b = PitchTrack(f0, 0.01), PitchTrack(f0 * 2 ** (semitones / 12), 0.01)
    e, back = pitch_errors(a, b), pitch_errors(b, a)
    assert e.rmse_cents == pytest.approx(100 * abs(semitones), abs=1e-6) == pytest.approx(back.rmse_cents, abs=1e-6) and e.shift_cents == pytest.approx(100 * semitones, abs=1e-6)
    assert e.voicing == 0 and pitch_errors(a, a).frame == 0
    straight = np.stack([np.arange(len(f0))] * 2, 1)
    assert pitch_errors(a, b, straight) == e
    doubled = PitchTrack(np.repeat(b.f0, 2), 0.01)  # said at half the pace, along the walk that says so
    assert pitch_errors(a, doubled, np.stack([np.repeat(straight[:, 0], 2), np.arange(2 * len(f0))], 1)).rmse_cents == pytest.approx(e.rmse_cents, abs=1e-6)


def test_pitch_refuses_and_abstains():
    t, x = PitchTrack(np.full(30, 100.0), 0.01), np.sin(np.arange(9000) / 30)
    assert isinstance(pitch_errors(t, PitchTrack(np.full(30, np.nan), 0.01)), Abstention)
    for bad in (x * np.nan, x[:50], 0 * x, []): assert isinstance(track_pitch(bad, RATE), Abstention)
    with pytest.raises(ValueError, match=r'\(9000, 1\)'): track_pitch(x[:, None], RATE)
    with pytest.raises(ValueError, match='need a path'): pitch_errors(t, PitchTrack(t.f0[:9], 0.01))
    with pytest.raises(ValueError, match='positive'): pitch_errors(t, PitchTrack(-t.f0, 0.01))
    for path in ([[0, 30]], [[-1, 0]], [0, 1], np.zeros((0, 2))):
        with pytest.raises(ValueError, match='path'): pitch_errors(t, t, path)


# --- opinions -----------------------------------------------------------------------------------------------------------

def test_the_predictor_is_the_packages_own_and_calls_nobody(clips, monkeypatch):
    dnsmos = pytest.importorskip('speechmos.dnsmos')

    def no_network(*args, **more): raise AssertionError('the predictor reached for the network')

    monkeypatch.setattr(socket.socket, 'connect', no_network)
    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    x = clips[0][0][:int(2.2 * RATE)]
    found = predict_opinion(x, RATE)
    theirs = dnsmos.run(np.resize(np.clip(resample(x, RATE, 16000), -1, 1), int(9.01 * 16000)), 16000)
    assert isinstance(found, PredictedOpinion) and 'DNSMOS' in found.predictor
    assert [found.overall, found.signal, found.background, found.p808] == pytest.approx([theirs[k] for k in ('ovrl_mos', 'sig_mos', 'bak_mos', 'p808_mos')], abs=1e-5)
    noisy = x + x.std() * np.random.default_rng(0).normal(size=len(x))
    worse = predict_opinion(0.9 * noisy / np.abs(noisy).max(), RATE)
    assert worse.overall < found.overall and worse.background < found.background and 1 <= worse.overall <= 5


def test_no_prediction_without_sound():
    x = bursts(4) / 10
    for bad in (x * np.nan, 0 * x, x[:9000]): assert isinstance(predict_opinion(bad, RATE), Abstention)
    with pytest.raises(ValueError, match='peak'): predict_opinion(x / np.abs(x).max() * 1.1, RATE)
    with pytest.raises(ValueError, match=r'\(1, 44100\)'): predict_opinion(x[None], RATE)


def panel(seed, L=6, S=5, systems=('a', 'b'), keep=0.8):
    rng = np.random.default_rng(seed)
    return [Rating(v, f's{s}', f'l{k}', float(rng.integers(1, 6))) for v in systems for k in range(L) for s in range(S) if rng.random() < keep]


@few
@given(st.integers(0, 10**6))
def test_intervals_are_those_of_cluster_robust_regression(seed):
    "An intercept alone in statsmodels, with clusters in one way and in two"
    sm = pytest.importorskip('statsmodels.api')
    import scipy.stats
    own = [r for r in panel(seed) if r.system == 'a']
    x, L, S = np.array([r.value for r in own]), np.unique([r.listener for r in own], return_inverse=True)[1], np.unique([r.sample for r in own], return_inverse=True)[1]
    if np.ptp(x) == 0 or L.max() < 1 or S.max() < 1: return
    variance = lambda groups: sm.OLS(x, np.ones(len(x))).fit(cov_type='cluster', cov_kwds=dict(groups=groups)).cov_params()[0, 0]
    one, other, each = variance(L), variance(S), variance(np.arange(len(x)))
    for kind, v, groups in (('listeners', one, L.max() + 1), ('both', max(one, other, one + other - each), min(L.max(), S.max()) + 1), ('ratings', each, len(x))):
        half = scipy.stats.t.ppf(0.975, groups - 1) * math.sqrt(v)
        assert mean_opinion(own, 'a', kind).interval == pytest.approx((x.mean() - half, x.mean() + half), abs=1e-9)


@few
@given(st.integers(0, 10**6), st.randoms())
def test_opinions_do_not_depend_on_the_order_of_rows_or_on_names(seed, shuffle):
    rows = panel(seed)
    here, diff = mean_opinion(rows, 'a'), opinion_difference(rows, 'a', 'b')
    shuffle.shuffle(rows)
    renamed = [Rating(r.system, r.sample, f'{hash(r.listener) % 997}{r.listener}', r.value) for r in rows]
    for other in (rows, renamed):
        again, minus = mean_opinion(other, 'a'), opinion_difference(other, 'b', 'a')
        assert again.mean == pytest.approx(here.mean) and again.interval == pytest.approx(here.interval) if isinstance(here.interval, tuple) else True
        if isinstance(diff, Abstention): assert isinstance(minus, Abstention)
        else: assert minus.mean == pytest.approx(-diff.mean)
    text = 'Listener;Rating;system;sample;age\n' + ''.join(f'{r.listener};{r.value};{r.system};{r.sample};{7}\n' for r in rows)
    assert parse_ratings(text) == rows


def test_bootstrap_draws_listeners():
    rows = panel(3, L=20, S=6)
    one, two = (mean_opinion(rows, 'a', 'bootstrap', rng=np.random.default_rng(7)) for _ in range(2))
    student = mean_opinion(rows, 'a', 'listeners').interval
    assert one == two and one.interval == pytest.approx(student, abs=0.1)
    with pytest.raises(ValueError, match='rng'): mean_opinion(rows, 'a', 'bootstrap')


def test_where_no_interval_can_be_given_the_reason_is():
    assert 'one listener' in mean_opinion(panel(1, L=1), 'a').interval.reason and 'one sample' in mean_opinion(panel(1, S=1), 'a').interval.reason
    same = [Rating('a', f's{s}', f'l{k}', 5.0) for s in range(3) for k in range(3)]
    assert mean_opinion(same, 'a').mean == 5 and 'the same' in mean_opinion(same, 'a').interval.reason
    assert isinstance(mean_opinion(same, 'b'), Abstention) and isinstance(opinion_difference(same, 'a', 'b'), Abstention)
    for kwargs in (dict(kind='magic'), dict(level=1.0)):
        with pytest.raises(ValueError): mean_opinion(same, 'a', **kwargs)
    with pytest.raises(ValueError, match='finite'): mean_opinion([Rating('a', 's', 'l', math.nan)], 'a')


@pytest.mark.parametrize('row, why', [('a,s,l,7', 'scale'), ('a,s,l,x', 'not a number'), ('a,s,l,inf', 'scale'), ('a,s', 'columns'), (',s,l,3', 'names no'), ('a,s,m,3\na,s,m,4', 'before')])
def test_the_first_fault_in_a_table_is_named_with_its_line(row, why):
    with pytest.raises(UserError, match=rf'Line {3 if "before" != why else 4} .*{why}'): parse_ratings(f'system,sample,listener,rating\na,s,k,4\n{row}\n')


# --- health and gates ---------------------------------------------------------------------------------------------------

measured = st.fixed_dictionaries({}, optional={p.metric: st.floats(-1e3, 1e3) | st.sampled_from([math.nan, math.inf]) for p in HEALTH_PARTS})


@settings(max_examples=100, deadline=None)
@given(measured, st.sampled_from(HEALTH_PARTS), st.floats(0, 100))
def test_health_is_bounded_and_monotone(metrics, part, step):
    h = health(metrics)
    if not metrics: assert isinstance(h, Abstention); return
    assert isinstance(h, Health) and 0 <= h.low <= h.index + 1e-12 and h.index <= h.high + 1e-12 <= 1 + 1e-9
    assert set(h.missing) | set(metrics) == {p.metric for p in HEALTH_PARTS} and not set(h.missing) & set(metrics)
    assert health(dict(reversed(metrics.items()))) == h and 0 <= h.evidence().confidence <= 1
    x = metrics.get(part.metric)
    if x is None or not math.isfinite(x): return
    better = x + step if part.good > part.bad else x - step
    assert health({**metrics, part.metric: better}).index >= h.index - 1e-12


def test_health_is_the_published_formula():
    assert dict(HEALTH_WEIGHTS) == dict(loss=0.30, audio=0.25, training=0.20, attention=0.15, system=0.10)
    h = health(dict(val_loss=30.0, success=0.5, stop_rate=1.0, alignment_score=0.85))
    assert h.groups == dict(loss=0, audio=0.75, attention=1) and h.index == pytest.approx((0.25 * 0.75 + 0.15) / 0.7) and h.low == pytest.approx(0.3375) and h.high == pytest.approx(0.6375)
    assert health({p.metric: p.good for p in HEALTH_PARTS}).index == pytest.approx(1) and health({p.metric: p.bad for p in HEALTH_PARTS}).index == 0
    assert with_ratios(dict(pesq=3.0, pesq_copy_synthesis=4.0))['pesq_ratio'] == 0.75 and math.isnan(with_ratios(dict(pesq=3.0, pesq_copy_synthesis=0.0))['pesq_ratio'])
    with pytest.raises(ValueError): HealthPart('loss', 'x', -1, 1, log=True)


DIRECTION = dict(val_loss=-1, alignment_score=1, gate_accuracy=1, pesq=1, dnsmos_overall=1)
gate_metrics = st.fixed_dictionaries({}, optional=dict(val_loss=st.floats(0, 40), alignment_score=st.floats(0, 1), gate_accuracy=st.floats(0, 1), pesq=st.floats(1, 4.6),
    dnsmos_overall=st.floats(1, 5)))


@settings(max_examples=100, deadline=None)
@given(gate_metrics, st.sampled_from(sorted(DIRECTION)), st.floats(0, 5), st.booleans())
def test_what_gets_better_never_closes_a_gate(metrics, name, step, absolute):
    copies = dict(pesq_copy_synthesis=3.9, dnsmos_overall_copy_synthesis=3.2)
    limits = GateLimits(audio_absolute=3.5 if absolute else None)
    for gate in (sanity_gate, monitor_gate, release_gate):
        here = gate({**metrics, **copies}, limits)
        assert here.passed == (not here.reasons) and here.evidence(3).since_step == 3
        if name in metrics: assert gate({**metrics, **copies, name: metrics[name] + DIRECTION[name] * step}, limits).passed >= here.passed
        for broken in (math.nan, Abstention('no sound')):
            if name in ('val_loss', 'alignment_score') and gate is release_gate: assert not gate({**metrics, **copies, name: broken}, limits).passed


def test_gates_have_the_limits_that_were_asked_for():
    g = GateLimits()
    assert (g.sanity_loss, g.sanity_alignment, g.sanity_gate_accuracy, g.monitor_alignment, g.release_loss, g.release_alignment) == (30, 0.4, 0.6, 0.8, 2, 0.85)
    voice = dict(val_loss=2.0, alignment_score=0.85, pesq=2.0, pesq_copy_synthesis=4.0)
    assert release_gate(voice).passed and not release_gate({**voice, 'pesq': 1.99}).passed and not release_gate({**voice, 'pesq': Abstention('another pace')}).passed
    assert 'another pace' in release_gate({**voice, 'pesq': Abstention('another pace')}).words and not release_gate(voice, GateLimits(audio_absolute=3.5)).passed
    with pytest.raises(ValueError, match='pesq'): release_gate({**voice, 'pesq': 'fine'})
    with pytest.raises(ValueError, match='copy'): release_gate({**voice, 'pesq_copy_synthesis': -1})


def test_inputs_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match='val_loss'): health({'val_loss': np.ones(3)})
    with pytest.raises(ValueError, match='val_loss'): sanity_gate({'val_loss': np.ones(2)})
    assert with_ratios({'pesq': Abstention('refused'), 'pesq_copy_synthesis': 2.0}).keys() == {'pesq', 'pesq_copy_synthesis'}
    assert np.isnan(with_ratios({'val_mel_loss': 3.0, 'mel_postnet_loss': -1.0})['generalisation_gap'])
    track = PitchTrack(np.full(20, 100.0), 0.01)
    with pytest.raises(ValueError, match='path'): pitch_errors(track, track, np.full((30, 2), 1.5))
    with pytest.raises(ValueError, match='step by'): pitch_errors(track, PitchTrack(np.full(20, 100.0), np.nan))
    with pytest.raises(ValueError, match='draws=0'): mean_opinion([Rating('a', 's', n, v) for n, v in (('x', 3.0), ('y', 4.0))], 'a', 'bootstrap', draws=0)
    assert isinstance(clock(np.full(44100, 1e200), np.full(44100, 1e200), 22050), Abstention)
