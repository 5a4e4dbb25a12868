"Alerts: which ones, once each, at real endpoints on loopback, and whatever is killed or hangs"
import email
import email.policy
import html
import http.server
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_tuner.config.contracts import Decision, Evidence
from tts_tuner.config.errors import TTSTunerError
from tts_tuner.config.masking import Masker
from tts_tuner.config.secrets import EnvironmentSecrets
from tts_tuner.config.surroundings import AlertRules, Alerts
from tts_tuner.tuner import alert_manager
from tts_tuner.tuner.alert_manager import AlertManager, CallNotifier, Courier, FileNotifier, NotSent, Outbox
from tts_tuner.tuner.alert_places import open_places
from tts_tuner.tuner.alerts import HOUR, Alert, Facts, Note, alert_of, alerts_of, judge, summaries
from tts_tuner.tuner.notifier_suite import NotifierCase, check_notifier

HOOK, ID, KEY = 'canaryCANARYcanary012345', '123456789012345678', 'canary_' + 'D' * 60
TOKENS = {
    'SLACK_WEBHOOK': f'https://hooks.slack.com/services/T0CANARY1/B0CANARY2/{HOOK}',
    'DISCORD_WEBHOOK': f'https://discord.com/api/webhooks/{ID}/{KEY}',
    'TELEGRAM_BOT_TOKEN': '123456789:CANARY' + 'e' * 29, 'TELEGRAM_CHAT_ID': '-1001234567890',
    'SMTP_USER': 'canary-user', 'SMTP_PASSWORD': 'canary-pass-word'}
CANARIES = (HOOK, 'T0CANARY1', KEY, 'CANARY' + 'e' * 29, 'canary-pass-word')


def restart(step, trial='t003', when=None):
    return Decision('restart', trial, step, f'{trial} is started again: its trainer died at step {step}.', (Evidence('process', 'died', step),), when)


# ----- which ones

def decision(kind, source='', verdict='', words='', subject='t001'):
    return Decision(kind, subject, 10, f'{subject}: {words or kind}.', (Evidence(source, verdict, 10, 1.0, words),) if source else ())


@pytest.mark.parametrize(('d', 'rule'), [
    (decision('stop', 'trainer', 'failed', 'The loss of step 12 is not finite (nan)'), 'nan'), (decision('alert', 'diverging', 'diverging', 'its loss explodes'), 'nan'),
    (decision('rollback', 'trainer', 'failed', 'NaN in the gradient'), 'nan'), (decision('restart', 'process', 'died', 'signal 9'), 'restart'),
    (decision('restart', 'trainer', 'failed', 'out of memory'), 'restart'), (decision('restart', 'generations', 'at a point', 'goal 0.1'), ''),
    (decision('rollback', 'generations', 'at equal steps', 'worse than its parent'), ''), (decision('stop', 'trainer', 'failed', 'memory ran out'), 'failed'),
    (decision('stop', 'patience', 'stop', 'no gain'), 'plateau'), (decision('stop', 'controller', 'no gain', '5 cycles brought no gain', 'study'), 'plateau'),
    (decision('stop', 'alignment', 'not the best', 'score 0.2'), ''), (decision('stop', 'clock', 'over', 'the time is over', 'study'), ''),
    (decision('alert', 'release gate', 'open', 'the release gate is open'), 'gate_passed'), (decision('alert', 'never_stops', 'never stops', 'the gate is silent'), 'detector'),
    (decision('final', 'alignment', 'best', 'score 0.8'), 'finished'), (decision('promote', 'registry', 'moves', 'champion moves', 'champion'), 'deployed'),
    (decision('continue', 'registry', 'stays', 'champion stays', 'champion'), ''), (decision('rollback', 'registry', 'goes back', 'under 0.9', 'production'), 'deployed'),
    (decision('promote', 'alignment', 'promising', 'place 1'), ''), (decision('prune', 'alignment', 'outranked', 'place 9, banana info'), ''), (decision('continue'), '')])
def test_which_decisions_are_worth_an_alert(d, rule):
    found = alert_of(d, AlertRules(), 'anna')
    assert (found.rule if found else '') == rule
    if found:
        assert found.text == d.reason and found.title.startswith('anna: ') and found == alert_of(replace(d, time=3.0), AlertRules(), 'anna')
        assert alert_of(d, AlertRules(**{rule: False}), 'anna') is None


def test_which_facts_are():
    rules = AlertRules(target_score=0.8, disk_low_gb=5)
    opened = Evidence('release gate', 'open', 5, 1.0, 'the release gate is open')
    facts = Facts('anna', score=0.8, best='t003', gates={'t003': opened, 't004': replace(opened, verdict='closed')}, free_bytes=4_999_999_999, failure='No winner.')
    assert [a.rule for a in alerts_of(facts, rules)] == ['target_reached', 'gate_passed', 'disk_low', 'failed']
    assert alerts_of(facts, AlertRules(target_reached=False, gate_passed=False, disk_low=False, failed=False)) == []
    assert alerts_of(Facts('anna', score=0.7999, free_bytes=5_000_000_000), rules) == [] == alerts_of(Facts(score=float('nan')), rules)
    assert alerts_of(Facts(score=0.9), AlertRules()) == []  # no target, none reached


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 3000), st.integers(0, 40)), max_size=80), st.integers(1, 5))
def test_nothing_twice_nothing_lost_not_too_often(events, per_hour):
    rules, notes, now = AlertRules(per_hour=per_hour), [], 0.0
    for wait, step in events:
        now += wait
        a = alert_of(restart(step), rules)
        if state := judge(a, notes, now, rules): notes.append(Note(a, now, state))
        notes += [Note(s, now, 'queued') for s in summaries(notes, now)]
    notes += [Note(s, now, 'queued') for s in summaries(notes, now, ending=True)]
    keys = [n.alert.key for n in notes]
    assert len(keys) == len(set(keys)) and len([n for n in notes if not n.alert.covers]) == len({s for _, s in events})
    covered = [k for n in notes for k in n.alert.covers]
    assert sorted(covered) == sorted(n.alert.key for n in notes if n.state == 'held')
    sent = [n.time for n in notes if n.state == 'queued' and not n.alert.covers]
    assert all(sum(t <= u < t + HOUR for u in sent) <= per_hour for t in sent)
    assert summaries(notes, now + 10 * HOUR, ending=True) == []


def test_a_disk_may_fill_again_and_what_is_old_is_not_told():
    rules, low = AlertRules(repeat_after='2h'), alerts_of(Facts(free_bytes=1), AlertRules())[0]
    notes = [Note(low, 0.0, 'queued')]
    assert [judge(low, notes, h * HOUR, rules) for h in (0, 1.9, 2.1)] == ['', '', 'queued']
    assert judge(alert_of(restart(1), rules), [], 1e6, rules, since=1e6 - 90_000) == 'old'
    assert judge(low, [Note(low, 1e6, 'queued')], 0.0, rules) == 'queued'  # a clock that was set back by days


# ----- the outbox and the threads

ONE = Alert('test', 'info', 'study', 'anna: a test', 'Only a test.', 'test/1')


def test_the_outbox_is_read_back_whatever_tore_it(tmp_path):
    box = Outbox(tmp_path / 'alerts.jsonl', clock=lambda: 5.0)
    for i in range(3): box.add(replace(ONE, key=f'test/{i}', covers=('a', 'b')), 'queued', ['slack'])
    box.mark('a0001', 'slack', 'sent')
    raw = box.path.read_bytes()
    for cut in range(0, len(raw), 7):
        box.path.write_bytes(raw[:cut])
        again = Outbox(box.path)
        again.add(replace(ONE, key='later'), 'queued', ['slack'])
        assert [a.key for _, a in Outbox(box.path).pending('slack')][-1] == 'later'
        assert len({name for name, _ in again.pending('slack')}) == len(again.pending('slack'))
    box.path.write_text('{"id": "x", "alert": 3}\nnot json\n[1]\n{}\n"alert"\n')
    assert Outbox(box.path).notes == []
    box.path.write_bytes(raw)
    assert [n for n, _ in Outbox(box.path).pending('slack')] == ['a0000', 'a0002'] and Outbox(box.path).pending('email') == []
    assert Outbox(box.path).notes == box.notes


class Answers:
    "A notifier that does what it is told, attempt by attempt; None takes the message"
    place = 'answers'

    def __init__(self, *plan): self.plan, self.seen = list(plan), []

    def send(self, alert):
        self.seen.append(alert)
        step = self.plan.pop(0) if self.plan else None
        if isinstance(step, threading.Event): step.wait()
        elif step is not None: raise step


def delivered(tmp_path, notifier, limit=0.2, waits=(0.01,) * 3, wait=5.0):
    "Marks, sentences and whether all was done, of one alert"
    box, said = Outbox(tmp_path / 'alerts.jsonl'), []
    courier = Courier(notifier, box, said.append, limit=limit, waits=waits)
    name = box.add(ONE, 'queued', [notifier.place])
    courier.take(name, ONE)
    done = courier.end(time.monotonic() + wait)
    return box.marks(name, notifier.place), said, done


def test_attempts(tmp_path):
    moody = Answers(NotSent('busy'), NotSent('busy'))
    assert delivered(tmp_path / 'a', moody) == (['trying', 'sent'], [], True) and len(moody.seen) == 3
    wrong = Answers(*[NotSent('no such channel', again=False)] * 9)
    marks, said, _ = delivered(tmp_path / 'b', wrong)
    assert marks == ['trying', 'failed'] and len(wrong.seen) == 1 and 'answers does not take alerts (no such channel)' in said[0] and len(said) == 1
    odd = Answers(ValueError('token canary'))
    marks, said, _ = delivered(tmp_path / 'c', odd)
    assert marks == ['trying', 'failed'] and 'ValueError' in said[0] and 'canary' not in said[0] + (tmp_path / 'c/alerts.jsonl').read_text()


def test_an_attempt_that_hangs_is_waited_for_and_not_repeated(tmp_path):
    gate = threading.Event()
    slow = Answers(gate)
    threading.Timer(0.3, gate.set).start()
    assert delivered(tmp_path / 'a', slow, limit=0.1, waits=(0.1,) * 5) == (['trying', 'sent'], [], True) and len(slow.seen) == 1
    never = Answers(threading.Event())
    began = time.monotonic()
    marks, said, done = delivered(tmp_path / 'b', never, limit=0.05, waits=(0.05,) * 2)
    assert marks == ['trying', 'failed'] and done and len(never.seen) == 1 and time.monotonic() - began < 3 and 'no answer' in said[0]


def test_three_starts_and_then_it_is_given_up(tmp_path):
    for start in range(5):
        notifier = Answers(*[NotSent('closed', again=False)] * 9)
        with AlertManager(tmp_path, notifiers=[notifier], say=lambda _: None) as m: m.see([restart(1)])
        assert len(notifier.seen) == (start < 3)
    late = Answers()
    with AlertManager(tmp_path, notifiers=[late]) as m: m.see([restart(1), restart(2)])
    assert [a.subject for a in late.seen] == ['t003'] and 'step 2' in late.seen[0].text


def test_what_a_kill_left_open_is_sent_again_and_says_so(tmp_path):
    box = Outbox(tmp_path / 'alerts.jsonl')
    box.mark(box.add(ONE, 'queued', ['answers']), 'answers', 'trying')
    box.add(replace(ONE, key='test/2'), 'queued', ['answers'])
    notifier = Answers()
    with AlertManager(tmp_path, notifiers=[notifier]): pass
    assert ['may have come before' in a.text for a in notifier.seen] == [True, False]
    with AlertManager(tmp_path, notifiers=[notifier]): pass
    assert len(notifier.seen) == 2


def test_closing_in_the_middle_of_waiting(tmp_path):
    notifier = Answers(NotSent('busy'))
    manager = AlertManager(tmp_path, notifiers=[notifier], waits=(30,))
    manager.see([restart(1)])
    while not notifier.seen: time.sleep(0.005)
    began = time.monotonic()
    assert manager.close(0.1) is False and time.monotonic() - began < 2
    time.sleep(0.1)
    with AlertManager(tmp_path, notifiers=[notifier]): pass
    assert [('again' in a.text and 'come before' in a.text) for a in notifier.seen] == [False, False]


def test_the_same_record_again_tells_nothing(tmp_path):
    record = [restart(i, when=time.time()) for i in range(20)] + [decision('final', 'alignment', 'best', 'score 0.8')]
    seen = []
    for _ in range(3):
        for part in (record[:5], record[:12], record):
            with AlertManager(tmp_path, notifiers=[CallNotifier(seen.append)], study='anna') as m:
                m.see(part, Facts('anna', score=0.9, free_bytes=1))
    assert len(seen) == len(set(seen)) == AlertRules().per_hour + 2
    with AlertManager(tmp_path, notifiers=[CallNotifier(seen.append)], study='anna') as m: assert len(m.see(record, ending=True)) == 1
    assert '14 more of the kind "restart"' in seen[-1]
    with AlertManager(tmp_path, notifiers=[CallNotifier(seen.append)], study='anna') as m: assert m.see(record, ending=True) == []


def test_a_study_of_last_week_tells_no_stories(tmp_path):
    seen = []
    with AlertManager(tmp_path, notifiers=[CallNotifier(seen.append)]) as m: assert m.see([restart(i, when=time.time() - 1e6) for i in range(9)]) == []
    assert seen == [] and len(Outbox(tmp_path / 'alerts.jsonl').notes) == 9


def test_a_place_that_is_new_hears_only_what_is_new(tmp_path):
    with AlertManager(tmp_path) as m: assert len(m.see([restart(1)])) == 1
    seen = []
    with AlertManager(tmp_path, notifiers=[CallNotifier(seen.append)]) as m: m.see([restart(1), restart(2)])
    assert len(seen) == 1 and 'step 2' in seen[0]


def test_a_full_disk_is_told_although_it_cannot_be_written_down(tmp_path, monkeypatch):
    def full(path, text): raise TTSTunerError('No space left to write alerts.jsonl.')
    monkeypatch.setattr(alert_manager, 'append_line', full)
    seen, said = [], []
    with AlertManager(tmp_path, notifiers=[CallNotifier(seen.append)], say=said.append) as m:
        for _ in range(3): m.see([restart(1)], Facts(free_bytes=0))
    assert len(seen) == 2 and said == ['Alerts are sent but not on record: No space left to write alerts.jsonl.']


def test_texts_are_masked_before_they_are_written(tmp_path):
    seen = []
    with AlertManager(tmp_path, notifiers=[CallNotifier(seen.append)], masker=Masker(names=['Jane Doe'], homes=True)) as m:
        m.see([Decision('stop', 't001', 3, 't001 cannot go on: /home/jane-d/x of Jane Doe is gone.', (Evidence('trainer', 'failed', 3),))])
    assert 'jane' not in (seen[0] + (tmp_path / 'alerts.jsonl').read_text()).lower()


# ----- real endpoints

class Web(http.server.ThreadingHTTPServer):
    "Slack, Discord and Telegram in one; what it got, and how it behaves"
    daemon_threads = True

    def __init__(self):
        self.got, self.mood, self.release = [], 'kind', threading.Event()
        super().__init__(('127.0.0.1', 0), Desk)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def base(self): return f'http://127.0.0.1:{self.server_port}'

    def texts(self, where):
        "Messages to a service, as a person reads them"
        out = []
        for path, body in list(self.got):
            if where not in path: continue
            if 'services' in path: out.append(' '.join(html.unescape(f"{a['title']} {a['text']}") for a in body['attachments']))
            elif 'webhooks' in path: out.append(body['content'])
            else: out.append(html.unescape(body['text'].replace('<b>', '').replace('</b>', '')))
        return out


class Desk(http.server.BaseHTTPRequestHandler):
    "Answers as the services do"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        if self.server.mood == 'deny': return self.answer(404, b'no_service')
        self.server.got.append((self.path, body))
        if self.server.mood == 'hang': self.server.release.wait(20)
        if self.server.mood == 'drip':
            self.send_response(200)
            self.end_headers()
            try:
                while not self.server.release.wait(0.2): self.wfile.write(b'o')
            except OSError: return None
        if 'services' in self.path: return self.answer(200, b'ok')
        if 'webhooks' in self.path: return self.answer(204, b'')
        return self.answer(200, b'{"ok": true, "result": {}}')

    def answer(self, status, body):
        self.send_response(status)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_): pass


@pytest.fixture
def web(monkeypatch):
    server = Web()
    monkeypatch.setattr('apprise.plugins.slack.NotifySlack.webhook_url', f'{server.base}/services')
    monkeypatch.setattr('apprise.plugins.discord.NotifyDiscord.notify_url', f'{server.base}/api/webhooks')
    monkeypatch.setattr('apprise.plugins.telegram.NotifyTelegram.notify_url', f'{server.base}/bot')
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


quiet = pytest.mark.filterwarnings('ignore:Requiring AUTH', 'ignore:.imghdr.')  # a mail server without TLS, on loopback; what apprise imports


class Mailbox:
    "An SMTP server that wants a password"

    def __init__(self):
        from aiosmtpd.controller import Controller
        from aiosmtpd.smtp import AuthResult
        self.got, self.logins, self.right = [], [], b'canary-pass-word'
        def authenticate(server, session, envelope, mechanism, data):
            self.logins.append(data.login)
            return AuthResult(success=data.password == self.right)
        with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
        self.controller = Controller(self, hostname='127.0.0.1', port=port, authenticator=authenticate, auth_required=True, auth_require_tls=False)
        self.controller.start()
        self.port = port

    async def handle_DATA(self, server, session, envelope):
        self.got.append((envelope.rcpt_tos, email.message_from_bytes(envelope.content, policy=email.policy.default)))
        return '250 taken'

    def texts(self): return [f"{m['subject']} {m.get_body().get_content()}" for _, m in list(self.got)]


@pytest.fixture
def mailbox():
    box = Mailbox()
    yield box
    box.controller.stop()


def opened(masker=None, environment=TOKENS, seconds=1.0, **blocks):
    on, said = open_places(Alerts(**blocks), EnvironmentSecrets(environment), masker or Masker(), seconds)
    return {n.place: n for n in on}, said


def mail_block(port): return dict(smtp_server='127.0.0.1', port=port, secure='none', recipients=['team@example.org', 'me@example.org'], sender='tuner@example.org')


@pytest.mark.parametrize(('place', 'where'), [('slack', 'services'), ('discord', 'webhooks'), ('telegram', 'sendMessage')])
def test_the_suite_on_web_services(web, place, where):
    def mood(word):
        def make():
            web.mood = word
            return opened()[0][place]
        return make
    case = NotifierCase(mood('kind'), lambda: web.texts(where), mood('deny'), mood('hang'), CANARIES, limit=5)
    check_notifier(case)
    assert all(not any(c in json.dumps(body) for c in CANARIES) for _, body in web.got)


@quiet
def test_the_suite_on_mail(mailbox):
    def wrong():
        return opened(environment={**TOKENS, 'SMTP_PASSWORD': 'canary-pass-WRONG'}, email=mail_block(mailbox.port))[0]['email']
    def once():  # a copy goes to each of two people
        return [t for (to, _), t in zip(list(mailbox.got), mailbox.texts()) if to == ['me@example.org']]
    make = lambda: opened(email=mail_block(mailbox.port))[0]['email']
    check_notifier(NotifierCase(make, once, wrong, None, (*CANARIES, 'canary-pass-WRONG')))
    assert len(mailbox.got) == 2 * len(once()) and mailbox.logins[0] == b'canary-user'
    assert {m['from'] for _, m in mailbox.got} == {'tts_tuner <tuner@example.org>'} and mailbox.got[0][1].get_content_type() == 'text/plain'


def test_the_suite_on_simple_ones(tmp_path):
    path = tmp_path / 'alerts.txt'
    check_notifier(NotifierCase(lambda: FileNotifier(path), lambda: path.read_text().splitlines() if path.exists() else [], lambda: FileNotifier(tmp_path)))


def test_a_suite_can_fail():
    class Lossy(CallNotifier):
        def send(self, alert): return None if '<' in alert.text else super().send(alert)
    class Telling(CallNotifier):
        def send(self, alert): logging.getLogger('urllib3').debug('POST /canary-4711')
    class Denying(CallNotifier):
        def send(self, alert): raise NotSent('')
    got = []
    for kind, words in ((Lossy, 'to arrive once and came 0 times'), (Telling, 'came 0 times')):
        with pytest.raises(AssertionError, match=words): check_notifier(NotifierCase(lambda kind=kind: kind(got.append), lambda: got))
    from tts_tuner.tuner.notifier_suite import check_no_secret_shows, check_refusal
    with pytest.raises(AssertionError, match='a secret shows in .urllib3 POST /<SECRET>'):
        check_no_secret_shows(NotifierCase(lambda: Telling(got.append), lambda: got, secrets=('canary-4711',)))
    with pytest.raises(AssertionError, match='needs words'): check_refusal(NotifierCase(lambda: Telling(got.append), lambda: got, lambda: Denying(got.append)))


@quiet
def test_each_alert_arrives_once_everywhere(web, mailbox, tmp_path):
    on, said = opened(email=mail_block(mailbox.port))
    assert set(on) == {'slack', 'discord', 'telegram', 'email'} and said == []
    record = [restart(5), decision('stop', 'trainer', 'failed', 'NaN in the loss'), decision('final', 'alignment', 'best', 'score 0.8')]
    for part in (record[:1], record, record):
        with AlertManager(tmp_path, AlertRules(target_score=0.5), list(on.values()), study='anna') as m: m.see(part, Facts('anna', 0.6, 't003'))
    titles = ['anna: t003 is started again', 'anna: The target is reached', 'anna: t001: NaN', 'anna: The study is finished']
    for texts in (web.texts('services'), web.texts('webhooks'), web.texts('sendMessage'), mailbox.texts()[::2]):
        assert len(texts) == 4 and all(any(t.startswith(title) for t in texts) for title in titles), texts
    everything = (tmp_path / 'alerts.jsonl').read_text()
    assert everything.count('"sent"') == 16 and not any(c in everything for c in CANARIES)


@quiet
@pytest.mark.parametrize('mood', ['hang', 'drip'])
def test_a_webhook_that_hangs_holds_nothing(web, mailbox, tmp_path, mood):
    web.mood = mood
    on, _ = opened(email=mail_block(mailbox.port))
    said = []
    manager = AlertManager(tmp_path, notifiers=list(on.values()), say=said.append, limit=0.3, waits=(0.1,))
    began = time.monotonic()
    manager.see([restart(i) for i in range(3)])
    assert time.monotonic() - began < 0.5
    while len(mailbox.got) < 6: time.sleep(0.02)  # the mail went out meanwhile
    began = time.monotonic()
    manager.close(0.2)
    assert time.monotonic() - began < 2
    assert len(web.texts('services')) <= 3  # none of them twice


def test_bot_tokens_write_to_channels(web, monkeypatch):
    monkeypatch.setattr('apprise.plugins.slack.NotifySlack.api_url', f'{web.base}/services/{{}}')
    monkeypatch.setattr(Desk, 'do_POST', lambda self: (self.server.got.append((self.path, json.loads(self.rfile.read(int(self.headers['content-length']))))),
                                                       self.answer(200, b'{"ok": true}')))
    on, _ = opened(environment={'SLACK_WEBHOOK': 'xoxb-1234567890-1234567890123-' + 'c' * 24}, slack=dict(channels=['#ml-alerts', '#tacotron-team']))
    on['slack'].send(ONE)
    assert [body['channel'] for _, body in web.got] == ['#ml-alerts', '#tacotron-team']


@pytest.mark.parametrize(('environment', 'blocks', 'words'), [
    ({}, {}, None), ({}, dict(slack=dict(webhook_url='${TEAM}')), 'Slack is off: TEAM is not set.'),
    ({'TEAM': 'https://example.org/canary'}, dict(slack=dict(webhook_url='${TEAM}')), 'Slack is off: the address is not one of'),
    ({'SLACK_WEBHOOK': 'xoxb-1-2-canary'}, {}, 'a bot token needs monitoring.alerts.slack.channels'),
    ({'SLACK_WEBHOOK': 'canar'}, {}, 'Slack is off: SLACK_WEBHOOK is too short'), ({'DISCORD_WEBHOOK': 'https://discord.com/canary'}, {}, 'Discord is off: the address'),
    ({'TELEGRAM_BOT_TOKEN': '1:canary'}, {}, 'Telegram is off: TELEGRAM_CHAT_ID is not set.'),
    ({'TELEGRAM_BOT_TOKEN': 'canary', 'TELEGRAM_CHAT_ID': '1'}, {}, 'Telegram is off: the token does not'),
    ({'TELEGRAM_BOT_TOKEN': '1:canary', 'TELEGRAM_CHAT_ID': 'a b'}, {}, 'Telegram is off: the chat'),
    ({}, dict(email=dict(smtp_server='mail.example.org')), 'E-mail is off: monitoring.alerts.email.recipients is missing.'),
    ({}, dict(email=dict(recipients=['a@example.org'])), 'E-mail is off: monitoring.alerts.email.smtp_server is missing.'),
    ({'SMTP_USER': 'me'}, dict(email=dict(smtp_server='m', recipients=['a@example.org'])), 'E-mail is off: SMTP_PASSWORD is not set.'),
    ({'SMTP_USER': 'me', 'SMTP_PASSWORD': 'canary'}, dict(email=dict(smtp_server='m', secure='none', recipients=['a@example.org'])), 'in the clear'),
    ({}, dict(email=dict(smtp_server='m', recipients=['nobody'])), 'E-mail is off: an address of it is none.')])
def test_a_place_without_what_it_needs_is_off_with_a_sentence(environment, blocks, words, caplog):
    caplog.set_level(1)
    on, said = opened(environment=environment, **blocks)
    assert on == {} and len(said) == (words is not None) and all(words in s for s in said)
    assert 'canar' not in ' '.join([*said, caplog.text])


def test_no_apprise_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'apprise', None)
    on, said = opened(environment={'SLACK_WEBHOOK': TOKENS['SLACK_WEBHOOK']})
    assert on == {} and said == ['Slack is off: the package "apprise" is not installed (pip install "tts_tuner[alerts]").']


# ----- processes

PROGRAM = textwrap.dedent('''
    import logging, os, pathlib, sys, time
    logging.basicConfig(level=1)
    from apprise.plugins.slack import NotifySlack
    NotifySlack.webhook_url = os.environ['BASE'] + '/services'
    from tts_tuner.config.contracts import Decision, Evidence
    from tts_tuner.config.masking import Masker
    from tts_tuner.config.secrets import EnvironmentSecrets
    from tts_tuner.config.surroundings import Alerts, AlertRules
    from tts_tuner.tuner.alert_manager import AlertManager
    from tts_tuner.tuner.alert_places import open_places
    on, said = open_places(Alerts(), EnvironmentSecrets(), Masker(), 2.0)
    manager = AlertManager(sys.argv[1], AlertRules(per_hour=1000), on, study='anna', waits=(0.05, 0.1), limit=float(os.environ.get('LIMIT', 5)))
    record = [Decision('restart', 't003', i, f'number {i:03} died.', (Evidence('process', 'died', i),)) for i in range(60)]
    for i in range(60):
        manager.see(record[:i + 1])
        time.sleep(float(os.environ.get('PACE', 0.004)))
    print('all seen', flush=True)
    manager.close(float(os.environ.get('CLOSE', 20)))
''')


def start(tmp_path, web, **environment):
    script = tmp_path / 'program.py'
    script.write_text(PROGRAM)
    return subprocess.Popen([sys.executable, str(script), str(tmp_path / 'study')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, **{k: TOKENS[k] for k in ('SLACK_WEBHOOK',)}, 'BASE': web.base, **environment})


def test_killed_again_and_again_every_alert_arrives_and_no_secret_shows(web, tmp_path):
    outputs = []
    for stop_at in (8, 25, 45, 99):
        process = start(tmp_path, web)
        while process.poll() is None and len(web.texts('services')) < stop_at: time.sleep(0.002)
        command = pathlib.Path(f'/proc/{process.pid}/cmdline')
        if command.exists(): outputs.append(command.read_text())
        if process.poll() is None and stop_at < 99: process.send_signal(signal.SIGKILL)
        outputs.append(process.communicate(timeout=60)[0])
    texts = web.texts('services')
    first = [t for t in texts if 'come before' not in t]
    counts = {i: sum(f'number {i:03}' in t for t in first) for i in range(60)}
    again = [t for t in texts if 'come before' in t]
    assert all(n <= 1 for n in counts.values()) and len(again) <= 3
    assert all(any(f'number {i:03}' in t for t in texts) for i in range(60))
    everything = ''.join([*outputs, *(p.read_text() for p in (tmp_path / 'study').rglob('*') if p.is_file())])
    assert not any(c in everything for c in CANARIES) and 'POST' in everything  # it was logged to the finest level


def test_a_hanging_receiver_does_not_keep_a_program_from_ending(web, tmp_path):
    web.mood = 'drip'
    process = start(tmp_path, web, LIMIT='0.5', CLOSE='0.3', PACE='0')
    while 'all seen' not in (line := process.stdout.readline()) and line: pass
    began = time.monotonic()
    process.communicate(timeout=30)
    assert process.returncode == 0 and time.monotonic() - began < 5


# ----- a study, and the verbs

def answer(line):
    import tts_tuner.cli_alerts  # noqa: F401  registers its verbs
    from tts_tuner.command import asked
    return asked(line)


def test_a_study_tells_what_happened_once_and_leaks_nothing(web, tmp_path, monkeypatch, caplog, capfd):
    "A whole study with a stand-in for the trainer, MLflow and everything it writes"
    from tts_tuner.config.settings import load_settings
    from tts_tuner.tuner.book import Book
    from tts_tuner.tuner.loop import Data, run_study
    from tts_tuner.tuner.study_alerts import study_alerts
    for name in TOKENS: monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TEAM_HOOK', TOKENS['SLACK_WEBHOOK'])
    monkeypatch.setenv('WANDB_API_KEY', CANARIES[2])
    monkeypatch.setenv('FAKE_CRASH', 't001@25')
    for logger in ('apprise', 'urllib3.connectionpool'): monkeypatch.setattr(logging.getLogger(logger), 'level', 1)
    caplog.set_level(1)
    config = tmp_path / 'study.yaml'
    config.write_text('monitoring: {alerts: {slack: {webhook_url: "${TEAM_HOOK}"}, rules: {target_score: 0.01}}}\n')
    settings = load_settings(config, study='anna', runs=str(tmp_path / 'runs'), hparams='max_steps=200,device=cpu', trials=2, workers=2,
                             tracking=dict(uri=f'sqlite:///{tmp_path}/mlflow.db'), rungs=dict(steps=[40, 120]))
    fake = (sys.executable, str(pathlib.Path(__file__).with_name('fake_trainer.py')))
    said = []
    result = run_study(settings, trainer=fake, prepare=lambda s, say: Data('corpus', 'abc'), poll=0.02)
    for _ in range(2):
        with study_alerts(settings, Book(settings.folder / 'decisions.jsonl'), said.append) as alerts:
            alerts.room = lambda folder: 10**12
            alerts.look(lambda: [(result.winner, result.metrics)], now=True)
    told = web.texts('services')
    for words in ('t001 is started again', 'The study is finished', 'The target is reached'): assert sum(words in t for t in told) == 1, (words, told)
    assert len(told) == len(set(told)) and 'Alerts go to slack.' in said
    code, out, _ = answer(f'alerts show {settings.folder}')
    assert code == 0 and out.count('slack: sent') == len(told)
    written = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert {'mlflow.db', 'config.yaml', 'alerts.jsonl', 'decisions.jsonl'} <= {p.name for p in written} and '${TEAM_HOOK}' in (settings.folder / 'config.yaml').read_text()
    everything = [p.read_bytes() for p in written] + [caplog.text.encode(), ''.join(capfd.readouterr()).encode(), ' '.join(said).encode()]
    assert 'POST' in caplog.text and not [c for c in CANARIES for text in everything if c.encode() in text]


def test_the_end_of_a_study_is_told(tmp_path):
    from tts_tuner.config.settings import load_settings
    from tts_tuner.tuner.book import Book, StudyStopped
    from tts_tuner.tuner.study_alerts import study_alerts
    settings, seen = load_settings(study='anna', runs=str(tmp_path)), []
    settings.folder.mkdir()
    for error in (TTSTunerError('The disk is full.'), KeyError('odd'), StudyStopped('asked to'), KeyboardInterrupt()):
        book, before = Book(settings.folder / 'decisions.jsonl'), len(seen)
        with pytest.raises(type(error)), study_alerts(settings, book, print, notifiers=[CallNotifier(seen.append)]): raise error
        assert len(seen) - before == isinstance(error, (TTSTunerError, KeyError)) - isinstance(error, StudyStopped)
    assert 'The disk is full.' in seen[0] and "KeyError: 'odd'" in seen[1]


def test_gates_and_score_of_the_best(tmp_path):
    from tts_tuner.quality.gates import GateLimits
    from tts_tuner.tuner.study_alerts import StudyAlerts
    seen, calls, clock = [], [], [0.0]
    voice = dict(score=0.9, val_loss=1.0, alignment_score=0.95, dnsmos_overall=3.6, dnsmos_overall_copy_synthesis=3.7)
    with AlertManager(tmp_path, AlertRules(target_score=0.8), [CallNotifier(seen.append)]) as m:
        alerts = StudyAlerts(m, tmp_path, GateLimits(), every=10, clock=lambda: clock[0], room=lambda _: 10**12)
        def bests():
            calls.append(1)
            return [('t001', dict(score=float('nan'))), ('t002', dict(score=0.3)), ('t003', voice)]
        for t in (0, 1, 9.9, 10, 11, 25): clock[0] = t; alerts.look(bests)
    assert len(calls) == 3 and len(seen) == 2 and 't003 passes the release gate' in ''.join(seen) and 't003 has a score of 0.900' in ''.join(seen)


@quiet
def test_the_verb_that_tries_each_place(web, mailbox, monkeypatch):
    for name, value in TOKENS.items(): monkeypatch.setenv(name, value)
    words = f'monitoring.alerts.email.smtp_server=127.0.0.1 monitoring.alerts.email.port={mailbox.port} monitoring.alerts.email.secure=none'
    code, out, err = answer(f'alerts test {words} monitoring.alerts.email.recipients=[me@example.org]')
    assert (code, err) == (0, '') and [line.split(',')[0] for line in out.splitlines()] == [f'{p} took it' for p in ('slack', 'discord', 'telegram', 'email')]
    assert len(web.got) == 3 and len(mailbox.got) == 1
    web.mood = 'deny'
    code, out, err = answer('alerts test')
    assert code == 1 and out.count('did not take it') == 3 and not any(c in out + err for c in CANARIES)
    web.mood = 'drip'
    began = time.monotonic()
    code, out, _ = answer('alerts test --limit 0.2')
    assert code == 1 and out.count('no answer within 0.2 seconds') == 3 and time.monotonic() - began < 5


def test_verbs_answer_mistakes(tmp_path, monkeypatch):
    for name in TOKENS: monkeypatch.delenv(name, raising=False)
    code, out, err = answer('alerts test monitoring.alerts.slack.webhook_url=https://hooks.slack.com/services/T/B/canary')
    assert code == 2 and 'canary' not in out + err and len(err.strip().splitlines()) == 1
    assert answer(f'alerts show {tmp_path}/nowhere')[0] == 2 and 'worth an alert' in answer(f'alerts show {tmp_path}')[1]
    Outbox(tmp_path / 'alerts.jsonl').add(ONE, 'held', ())
    assert 'held back' in answer(f'alerts show {tmp_path}')[1] and json.loads(answer(f'alerts show {tmp_path} --json')[1])['title'] == ONE.title
