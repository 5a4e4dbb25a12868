"Who gets how many steps: plans, the climb over them, and whole studies with a stand-in for the trainer under each pruner"
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as st

from tts_tuner.config.contracts import read_decisions
from tts_tuner.config.errors import TTSTunerError, UserError
from tts_tuner.config.settings import Rungs, load_settings, save_settings
from tts_tuner.tuner.account import account, account_of, account_text
from tts_tuner.tuner.budgets import PRUNERS, Ladder, budget_plan, extend, ladder_of, plan_from_json, plan_to_json
from tts_tuner.tuner.climb import as_policy, climb, decide_median
from tts_tuner.tuner.engines import open_engine
from tts_tuner.tuner.loop import Data, keep_facts, replay, run_study
from tts_tuner.tuner.replay import Task, halving, play
from tts_tuner.tuner.rungs import Standing
from tts_tuner.tuner.trials import PlainView, read_status

FAKE = (sys.executable, str(Path(__file__).with_name('fake_trainer.py')))
DRIVER = '''
import sys
from tts_tuner.config.settings import load_settings
from tts_tuner.tuner.loop import Data, run_study
run_study(load_settings(sys.argv[1]), trainer=sys.argv[2:], prepare=lambda s, say: Data('corpus', 'abc'), poll=0.02)
'''


class Silent(PlainView):
    def say(self, text): pass


def make(tmp_path, pruner, **flags):
    given = dict(study='s', runs=str(tmp_path / 'runs'), hparams='max_steps=200,device=cpu', trials=6, workers=2, tracking=dict(enabled=False),
                 rungs=dict(steps=[40, 120]))
    return load_settings(**given | dict(optimization=dict(pruner=pruner)) | flags)


def go(settings): return run_study(settings, Silent(), trainer=FAKE, prepare=lambda s, say: Data('corpus', 'abc'), poll=0.02)


def timeless(folder): return [replace(d, time=None) for d in read_decisions(folder / 'decisions.jsonl')]


def steps_of(folder):
    return {p.parents[1].name: [json.loads(line)['step'] for line in p.read_text().splitlines()] for p in sorted(folder.glob('t*/g001/metrics.jsonl'))}


def ladders():
    "Any ladder that is allowed"
    return st.builds(lambda steps, pruner, low, high, eta, cohort: Ladder(steps, Rungs(cohort=cohort), pruner, min(low, high), max(low, high), eta),
                     st.integers(60, 5000), st.sampled_from(PRUNERS), st.floats(0.1, 200), st.floats(0.1, 200), st.integers(2, 5), st.integers(2, 12))


def test_brackets_are_those_of_the_paper():
    "Li and others 2018, table 1"
    plan = extend(None, 143, Ladder(81, pruner='hyperband', max_resource=81))
    table = [[(n, r) for n, r in zip([b.size, *(s.keep for s in b.stages)], [*(s.step for s in b.stages), 81])] for b in plan.brackets]
    assert table == [[(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)], [(34, 3), (11, 9), (3, 27), (1, 81)], [(15, 9), (5, 27), (1, 81)], [(8, 27), (2, 81)], [(5, 81)]]
    twice = extend(plan, 286, Ladder(81, pruner='hyperband', max_resource=81))
    assert [b.size for b in twice.brackets] == [81, 34, 15, 8, 5] * 2 and twice.brackets[-1].round == 1


@pytest.mark.parametrize('low, high, eta', [(1, 81, 3), (1, 80, 3), (10, 100, 3), (1, 64, 4), (2, 32, 2)])
def test_brackets_are_those_of_optuna(low, high, eta):
    "Trials of each bracket, and the steps at which its pruners compare"
    import optuna
    pruner = optuna.pruners.HyperbandPruner(low, high, eta)
    study = optuna.create_study(pruner=pruner)
    pruner._try_initialization(study)
    rule = Ladder(high, pruner='hyperband', min_resource=low, max_resource=high, eta=eta)
    plan = extend(None, sum(pruner._trial_allocation_budgets), rule)
    assert [b.size for b in plan.brackets] == pruner._trial_allocation_budgets
    deepest = len(plan.brackets[0].stages)
    for k, b in enumerate(plan.brackets):
        theirs = [low * eta ** (k + i) for i in range(deepest - k)]  # they count up from the smallest budget, we down from the largest
        assert len(b.stages) == len(theirs) and all(t <= s.step <= eta * t for s, t in zip(b.stages, theirs))
        if low * eta**deepest == high: assert [s.step for s in b.stages] == theirs


@given(ladders(), st.integers(1, 150), st.integers(0, 60))
@effort(max_examples=60, deadline=None)
def test_plans_add_up_and_are_extended_at_the_end(rule, n, more):
    plan = extend(None, n, rule)
    later = extend(plan, n + more, rule)
    assert later.brackets[:len(plan.brackets)] == plan.brackets and [t for b in later.brackets for t in b.trials] == [f't{i:03}' for i in range(n + more)]
    assert plan_from_json(json.loads(json.dumps(plan_to_json(later)))) == later and extend(later, n, rule) == later
    for b in later.brackets:
        steps, kept = [s.step for s in b.stages], [s.keep for s in b.stages]
        assert all(a < b for a, b in zip([0, *steps], [*steps, rule.max_steps])) and min(kept, default=1) >= 1 and kept == sorted(kept, reverse=True)
    got = account(later, {t: rule.max_steps for b in later.brackets for t in b.trials})
    assert got.spent == got.everything == (n + more) * rule.max_steps and 0 < account(later, {}).planned <= got.everything
    assert str(got.everything) in account_text(got, each=True)


def walked(rule, n, rates, sick=(), order=None):
    "A study on invented curves; its final decision, all decisions, and the last step of each trial"
    seen, taken, work = {}, [], {}
    def measure(names, step, rung):
        for t in names:
            assert step > work.get(t, 0), 'paid twice'
            work[t], level = step, 1 - np.exp(-rates[int(t[1:])] * step / rule.max_steps)
            numbers = dict.fromkeys(('alignment_score', 'attention_focus', 'attention_monotonicity', 'attention_coverage', 'score'), level)
            if int(t[1:]) in sick: numbers['attention_focus'] = float('nan')
            seen[t] = Standing(t, step, numbers)
        return [seen[t] for t in (names if order is None else order.permutation(names))]
    plan = extend(None, n, rule)
    return climb(plan, rule.rungs, measure, lambda ds, rung: taken.extend(ds), lambda: list(seen.values())), taken, work


@given(ladders(), st.integers(1, 40), st.integers(0, 9))
@effort(max_examples=60, deadline=None)
def test_every_pruner_keeps_the_same_promises(rule, n, seed):
    "Nobody is trained twice, given up twice or promoted after that; a failure has one rule; the order of standings changes nothing"
    rng = np.random.default_rng(seed)
    rates, sick = rng.uniform(0, 6, n), set(np.flatnonzero(rng.uniform(size=n) < 0.2).tolist())
    final, taken, work = walked(rule, n, rates, sick)
    assert walked(rule, n, rates, sick, order=rng)[1] == taken
    given_up = set()
    for d in taken:
        failed = d.kind == 'stop' and d.evidence[0].source == 'trainer'
        if d.kind in ('promote', 'prune') or failed: assert d.subject not in given_up
        if d.kind == 'prune' or failed: given_up.add(d.subject)
        if failed: assert int(d.subject[1:]) in sick and 'has no usable attention_focus' in d.reason
    assert len({(d.subject, d.kind, d.reason) for d in taken}) == len(taken), 'a book writes equal decisions once'
    assert (final is None) == (len(sick) == n) or final.subject not in {f't{i:03}' for i in sick}
    if rule.pruner != 'none' and n > len(sick): assert work[final.subject] == rule.max_steps
    plan = extend(None, n, rule)
    got = account(plan, work)
    assert got.spent == sum(work.values()) and (sick or got.spent <= got.planned)


def test_earlier_means_of_a_smaller_number():
    "Whoever is first at a look does not matter, and neither do later trials"
    numbers = lambda v: dict.fromkeys(('alignment_score', 'attention_focus', 'attention_monotonicity', 'attention_coverage', 'score'), v)
    values = [0.5, 0.6, 0.7, 0.8, 0.9, 0.69, 0.71]
    stands = [Standing(f't{i:03}', 40, numbers(v)) for i, v in enumerate(values)]
    alone = {d.subject: d.kind for k in range(7) for d in decide_median([stands[k]], {s.trial: [s.score] for s in stands})}
    together = {d.subject: d.kind for d in decide_median(stands[::-1], {s.trial: [s.score] for s in stands})}
    assert alone == together and [t for t, kind in together.items() if kind == 'prune'] == ['t005']
    thousand = Standing('t1000', 40, numbers(0.1))
    assert decide_median([thousand], {s.trial: [s.score] for s in (*stands, thousand)})[0].kind == 'prune'  # by number, not by letters
    late_start = {'t000': [0.2], **{f't{i:03}': [0.1, 0.9] for i in range(1, 6)}, 't006': [0.45, 0.5]}
    assert decide_median([Standing('t006', 80, numbers(0.5))], late_start)[0].kind == 'promote'  # their means so far are 0.5, not 0.9


def test_halving_on_curves_is_the_halving_of_the_replay():
    rng = np.random.default_rng(0)
    task = Task('invented', rng.uniform(size=(27, 27)).cumsum(1)[:, ::-1])
    ours = as_policy(lambda T: Ladder(T, pruner='successive_halving', max_resource=T), 'ours')
    assert play(ours, task).epochs == play(halving(3), task).epochs


@pytest.mark.parametrize('wrong, words', [(dict(pruner='hyperbant'), 'Did you mean "hyperband"'), (dict(eta=1), 'reduction_factor=1'), (dict(min_resource=0), 'min_resource=0'),
                                          (dict(min_resource=9, max_resource=8), 'not above max_resource'), (dict(max_resource=float('inf')), 'max_resource'),
                                          (dict(max_steps=0), 'one step at least')])
def test_ladders_that_make_no_sense(wrong, words):
    with pytest.raises(UserError, match=words): Ladder(**dict(max_steps=1000) | wrong)


@pytest.mark.parametrize('spoil', [lambda p: p.pop('brackets'), lambda p: p.update(colour='red'), lambda p: p['brackets'][0].update(first=1),
                                   lambda p: p.update(pruner='magic'), lambda p: p['brackets'][0].update(stages=[dict(step=3)])])
def test_a_spoilt_plan_is_named(spoil):
    values = json.loads(json.dumps(plan_to_json(extend(None, 6, Ladder(1000, pruner='hyperband')))))
    spoil(values)
    with pytest.raises(TTSTunerError, match='study.json holds a plan that'): plan_from_json(values)


def same_when_killed(settings, undisturbed):
    "The tuner killed twice, its trainers once, and other trials side by side: the plan and the decisions are those of an undisturbed study"
    config = Path(settings.runs) / 'driver.yaml'
    save_settings(config, settings)
    for k in range(2):
        process = subprocess.Popen([sys.executable, '-c', DRIVER, str(config), *FAKE], env={**os.environ, 'FAKE_PACE': '0.004'}, stdout=subprocess.DEVNULL)
        begun, end = len(timeless(settings.folder)), time.monotonic() + 30
        while len(timeless(settings.folder)) < begun + 2 and process.poll() is None and time.monotonic() < end: time.sleep(0.01)
        process.kill()
        process.wait()
        assert budget_plan(settings.folder) == budget_plan(undisturbed.folder)
        for status in map(read_status, settings.folder.glob('t*/g001')) if k == 0 else ():
            if status.get('state') != 'running': continue
            with contextlib.suppress(ProcessLookupError): os.kill(status['pid'], signal.SIGKILL)
    go(settings)
    facts = lambda folder: [(d.kind, d.subject, d.step, d.reason) for d in timeless(folder) if d.kind != 'restart']
    assert facts(settings.folder) == facts(undisturbed.folder) and len(facts(settings.folder)) > 6
    for name, steps in steps_of(settings.folder).items(): assert steps == list(range(1, len(steps) + 1)), (name, steps)


@pytest.mark.parametrize('pruner', ['hyperband', 'successive_halving', 'median', 'promotion', 'none'])
def test_a_study_under_each_pruner(tmp_path, monkeypatch, pruner):
    "Trials pause and go on, nothing is trained twice, NaN is treated as everywhere, the record replays, a second start adds nothing"
    monkeypatch.setenv('FAKE_NAN', 't002@5')
    settings = make(tmp_path, pruner)
    result = go(settings)
    decisions = timeless(settings.folder)
    for name, steps in steps_of(settings.folder).items(): assert steps == list(range(1, len(steps) + 1)), (name, steps)
    assert [d.reason for d in decisions if d.subject == 't002'] == ['t002 cannot go on: NaN in the loss at step 5.'] and result.winner != 't002'
    assert replay(settings.folder) == decisions and result.decision.kind == 'final'
    states = {t.name: t.state for t in open_engine(settings, read_only=True).trials()}
    assert 'running' not in states.values() and states['t002'] == 'fail'
    ends = {r.trial for r in result.rows if r.step == 200}
    assert result.winner in ends and {r.trial for r in result.rows if r.state == 'pruned'} == {d.subject for d in decisions if d.kind == 'prune'}
    got = account_of(settings.folder)
    assert got.spent == sum(max(s) for s in steps_of(settings.folder).values()) and got.pruner == pruner
    if pruner == 'none': assert len(ends) == 5
    else: assert got.spent <= got.planned
    before = (settings.folder / 'decisions.jsonl').read_bytes()
    assert go(settings).winner == result.winner and (settings.folder / 'decisions.jsonl').read_bytes() == before
    if pruner in ('hyperband', 'median', 'promotion'): same_when_killed(make(tmp_path, pruner, runs=str(tmp_path / 'other'), workers=3), settings)


def test_more_trials_later_reshuffle_nobody(tmp_path, pruner='hyperband'):
    first = go(make(tmp_path, pruner, trials=4))
    before, plan = timeless(first.folder), budget_plan(first.folder)
    second = go(make(tmp_path, pruner, trials=9))
    assert timeless(first.folder)[:len(before)] == before and budget_plan(first.folder).brackets[:len(plan.brackets)] == plan.brackets
    assert len(second.rows) == 9 and budget_plan(first.folder).n_trials == 9 and account_of(first.folder).everything == 9 * 200


def test_the_plan_is_on_disk_before_the_first_trial(tmp_path):
    settings = make(tmp_path, 'hyperband', trials=20)
    plan = keep_facts(settings, Data('corpus', 'abc'))
    save_settings(settings.folder / 'config.yaml', settings)
    assert budget_plan(settings.folder) == plan and [b.size for b in plan.brackets] == [11, 5, 4] and not list(settings.folder.glob('t*'))
    with pytest.raises(UserError, match='begun with the pruner "hyperband" and cannot go on with "median"'):
        keep_facts(make(tmp_path, 'median', trials=20), Data('corpus', 'abc'))


def test_a_study_that_noted_its_cohorts_only_goes_on(tmp_path):
    settings = make(tmp_path, 'rungs', trials=3)
    go(settings)
    path = settings.folder / 'study.json'
    known, before = json.loads(path.read_text()), timeless(settings.folder)
    path.write_text(json.dumps({k: v for k, v in known.items() if k != 'plan'}))
    assert budget_plan(settings.folder) == plan_from_json(known['plan']) and replay(settings.folder) == before
    go(make(tmp_path, 'rungs', trials=5))
    assert json.loads(path.read_text())['cohorts'] == [3, 2] and timeless(settings.folder)[:len(before)] == before


def test_bohb_brings_its_own_budgets(tmp_path):
    rule = ladder_of(make(tmp_path, 'rungs', optimization=dict(sampler='bohb', bohb=dict(min_budget=10, max_budget=100))))
    assert rule == Ladder(200, Rungs(steps=(40, 120)), 'bohb', 10, 100, 3) and rule.depth == 2
    assert ladder_of(make(tmp_path, 'hyperband', optimization=dict(pruner='hyperband', hyperband=dict(reduction_factor=4)))).eta == 4


def test_a_small_grid_is_planned_as_small(tmp_path):
    "A grid of four points and the two fixed trials are six, however many are wanted"
    space = dict(guided_attention_weight=dict(type='loguniform', low=1.0, high=20.0), attention=dict(type='choice', choices=['forward', 'location']))
    space['guided_attention_weight'] |= dict(type='choice', choices=[2.0, 8.0], low=None, high=None)
    settings = make(tmp_path, 'hyperband', optimization=dict(sampler='grid', pruner='hyperband'), search_space=space, trials=50)
    assert len(go(settings).rows) == budget_plan(settings.folder).n_trials == 6
