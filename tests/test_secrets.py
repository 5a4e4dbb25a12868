"Secrets: references, values that do not print, and masking against every spelling a formatter can give"
import copy
import html
import io
import json
import logging
import pickle
import re
import sys
import textwrap
import traceback
from urllib.parse import quote, quote_plus, unquote, unquote_plus

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tts_tuner.config.errors import UserError
from tts_tuner.config.masking import MASK, MaskedStream, Masker, masked_logging, masked_output
from tts_tuner.config.secrets import (
    SHORTEST,
    EnvironmentSecrets,
    Secret,
    environment_secrets,
    secrets_provider,
    variable_of,
    without_secrets,
)

ALNUM = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'
tokens = st.text(ALNUM + '-_./+=:@!$%&?#"\'\\<>|~é€\U0001f600', min_size=8, max_size=60)
printable = st.text(min_size=0, max_size=30).filter(lambda t: '\x1b' not in t)
easy = settings(max_examples=80, deadline=None)

FORMATS = {
    'plain': (lambda t: t, lambda t: t),
    'f-string': (lambda t: f'<{t!s:>80}>', lambda t: t),
    'JSON': (json.dumps, json.loads),
    'JSON kept readable': (lambda t: json.dumps(t, ensure_ascii=False), json.loads),
    'JSON in JSON': (lambda t: json.dumps(json.dumps(dict(a=[t]))), lambda t: json.loads(json.loads(t))['a'][0]),
    'repr': (repr, lambda t: t.encode('latin-1', 'backslashreplace').decode('unicode_escape')),
    'URL': (quote, unquote),
    'URL, all of it': (lambda t: quote(t, safe=''), unquote),
    'URL, twice': (lambda t: quote(quote(t, safe=''), safe=''), lambda t: unquote(unquote(t))),
    'form': (quote_plus, unquote_plus),
    'form, small letters': (lambda t: re.sub('%..', lambda m: m[0].lower(), quote_plus(t)), unquote_plus),
    'HTML': (html.escape, html.unescape),
    'HTML in HTML': (lambda t: html.escape(html.escape(t)), lambda t: html.unescape(html.unescape(t))),
    'HTML, ASCII': (lambda t: html.escape(t).encode('ascii', 'xmlcharrefreplace').decode(), html.unescape),
}


@easy
@given(tokens, printable, printable, st.sampled_from(sorted(FORMATS)))
@example('a' * 7 + '\\', '', '\\n', 'repr')
@example('\\\\\\\\\\\\n!', '\\', '', 'JSON in JSON')
def test_no_form_of_a_token_gets_through(token, before, after, name):
    write, read = FORMATS[name]
    masker = Masker([Secret(token)])
    out = masker.mask(write(f'{before} {token} {after}'))
    assert MASK in out and token not in out
    try: back = read(out)
    except (ValueError, UnicodeError, IndexError, KeyError, TypeError): return  # a text outside the token may have been cut by the mask
    assert token not in back


@easy
@given(st.text(ALNUM + '-_.:/=+', min_size=8, max_size=100), st.integers(10, 60), st.text(ALNUM + ' ', max_size=30), st.booleans())
def test_a_wrapped_token_is_found(token, width, before, json_too):
    text = textwrap.fill(f'{before} {token} and more', width, initial_indent='  ', subsequent_indent='    ')
    if json_too: text = json.dumps(text)
    out = Masker([Secret(token)]).mask(text)
    assert token not in re.sub(r'\s|\\n', '', out) and MASK in out


@settings(max_examples=30, deadline=None)
@given(st.text(ALNUM + '-_.', min_size=8, max_size=100), st.integers(20, 60))
def test_a_terminal_may_wrap_frame_and_colour(token, width):
    from rich.console import Console
    from rich.panel import Panel
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, color_system='truecolor').print(Panel(f'[bold]token[/bold] {token} ends'))
    shown = Masker([Secret(token)]).mask(out.getvalue())
    assert token not in re.sub(r'\x1b\[[0-9;]*m|[\s│╭╮╰╯─]', '', shown)


@easy
@given(st.text(ALNUM, min_size=16, max_size=60), st.data())
def test_half_of_a_long_token_is_too_much(token, data):
    assume(len(set(token)) > 4)
    masker, half = Masker([Secret(token)]), (len(token) + 1) // 2
    kept = data.draw(st.integers(half, len(token)))
    for text in (f'cut: {token[:kept]}…', f'cut: {token[:kept]}', f'…{token[len(token) - kept:]} end'):
        shown = masker.mask(text)
        assert MASK in shown and token[:half] not in shown and token[-half:] not in shown


@easy
@given(st.lists(tokens, min_size=2, max_size=5, unique=True), st.data())
def test_several_that_overlap(many, data):
    text = ''.join(data.draw(st.lists(st.sampled_from([*many, '*', '**', ' ', many[0][:5], many[1][3:]]), max_size=12)))
    out = Masker(Secret(t) for t in many).mask(text)
    assert not any(t in out for t in many)
    assert Masker(Secret(t) for t in many).mask(out) == out


@easy
@given(st.text(ALNUM + ' .,:/-_=()', max_size=200))
def test_what_holds_no_secret_stays_as_it_is(text):
    masker = Masker([Secret('xoxb-0123456789-ABCDEFGHIJ')])
    assume('0123456789' not in text and 'BCDEFGHIJ' not in text and '://' not in text)
    assert masker.mask(text) == text


@pytest.mark.parametrize('address', [
    'https://hooks.slack.com/services/T0AAAAAAA/B0BBBBBBB/cccccccccccccccccccccccc', 'https://discord.com/api/webhooks/123456789012345678/dddd-DDDD_dddddddddddddddddddddd',
    'https://me:pass-word-1@host.example/hook/eeeeeeeeeeee?key=ffffffffffff'])
def test_of_an_address_the_path_and_its_parts_are_secret(address):
    masker, path = Masker([Secret(address)]), address.split('/', 3)[3]
    for text in (address, f'Max retries exceeded with url: /{path} (Caused by x)', f'"POST /{path} HTTP/1.1" 404', *(p for p in re.split(r'[/?&=]', path) if len(p) > 8 and p != 'webhooks')):
        shown = masker.mask(text)
        assert not any(p in shown for p in re.split(r'[/?=&]', path) if len(p) > 8 and p not in ('services', 'webhooks')), shown
    host = '/'.join(address.split('/')[:3])
    assert masker.mask('see https://hooks.slack.com/services/ for more') == 'see https://hooks.slack.com/services/ for more' or 'me:' in host


def test_basic_authentication_writes_base64():
    import base64
    masker = Masker([Secret('pass-word-4711', 'SMTP_PASSWORD')])
    for before in ('', 'a:', 'ab:', 'user:'):
        shown = masker.mask('AUTH PLAIN ' + base64.b64encode(f'{before}pass-word-4711'.encode()).decode())
        seen = shown.removeprefix('AUTH PLAIN ').replace(MASK, '')
        assert MASK in shown and len(seen) <= len(before) * 4 / 3 + 6


def test_personal_data_only_on_request(monkeypatch):
    monkeypatch.setenv('HOME', '/srv/me')
    text = 'Jane Doe <jane.doe@mail.example.org> has /home/jane-d/runs, C:\\Users\\Jane\\x and /srv/me/data'
    assert Masker().mask(text) == text
    assert Masker(names=['Jane Doe'], mails=True, homes=True).mask(text) == '[name] <[mail]> has ~/runs, ~\\x and ~/data'


@easy
@given(st.sampled_from(['Jane Doe', 'Łukasz Kowalski', "Sinéad O'Neill", 'X Æ']), st.sampled_from(sorted(FORMATS)), st.sampled_from(['', ' ', '\n', '"', '/', '_', ' é ']))
def test_no_form_of_a_name_gets_through(name, how, around):
    write, _ = FORMATS[how]
    shown = Masker(names=[name]).mask(write(f'by{around or " "}{name}{around}'))
    assert '[name]' in shown and name.split()[1] not in shown
    assert Masker(names=['Ana']).mask('banana, Anatole') == 'banana, Anatole'


@easy
@given(st.emails(), st.sampled_from(['plain', 'JSON', 'repr', 'URL, all of it', 'HTML', 'f-string']), st.sampled_from([' ', '\n', '<', '"', ':', 'mailto:']))
def test_mail_addresses_of_common_shapes(address, how, before):
    assume(re.fullmatch(r'[\w.+-]+@[\w.-]+', address) and re.match(r'[A-Za-z0-9]', address))
    shown = Masker(mails=True).mask(FORMATS[how][0](f'{before}{address} '))
    assert '[mail]' in shown and address not in unquote(shown)


def test_nested_values():
    masker = Masker([Secret('canary-4711', 'X')])
    value = {'canary-4711': ['a canary-4711', 3, None, ('canary-4711',)], 'x': Secret('canary-4711', 'X'), 'n': 4711}
    assert masker.mask_all(value) == {MASK: [f'a {MASK}', 3, None, (MASK,)], 'x': '<X>', 'n': 4711}


@pytest.fixture
def log():
    "A logger of its own and what its handler wrote"
    out = io.StringIO()
    handler, logger = logging.StreamHandler(out), logging.getLogger('tests.masking')
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger, handler, out
    logger.removeHandler(handler)


def test_logging_of_whoever_it_is(log):
    logger, _, out = log
    before = logging.getLogRecordFactory()
    with masked_logging(Masker([Secret('canary-canary-4711')])):
        logger.debug('%s-%s', 'canary', 'canary-4711')
        logger.debug('wrong %d', 'canary-canary-4711')
        logger.info('100 %')
        logger.info('stack', stack_info=True)
        try:
            try: raise KeyError('canary-canary-4711')
            except KeyError as e: raise OSError('canary-canary-4711') from e
        except OSError: logger.exception('with its traceback')
    assert logging.getLogRecordFactory() is before
    assert 'canary-canary' not in out.getvalue()
    assert '100 %' in out.getvalue() and 'KeyError' in out.getvalue() and 'OSError' in out.getvalue()
    logger.info('canary-canary-4711')
    assert 'canary-canary-4711' in out.getvalue()  # afterwards nothing is changed


def test_as_a_filter_of_a_handler(log):
    logger, handler, out = log
    masker = Masker([Secret('canary-canary-4711')])
    handler.addFilter(masker)
    try: logger.warning('told: %r', {'a': 'canary-canary-4711'})
    finally: handler.removeFilter(masker)
    assert out.getvalue() == f"told: {{'a': '{MASK}'}}\n"


def test_what_is_printed(capsys):
    masker = Masker([Secret('canary-canary-4711')])
    stream = MaskedStream(sys.stdout, masker)
    print('a', 'canary-canary-4711', 3, file=stream)
    stream.writelines(['canary-canary-4711', '\n'])
    stream.flush()
    assert capsys.readouterr().out == f'a {MASK} 3\n{MASK}\n' and stream.encoding == sys.stdout.encoding


def test_all_output_of_a_process(capsys, log):
    logger, handler, out = log
    streams = sys.stdout, sys.stderr
    with pytest.raises(KeyError), masked_output(Masker([Secret('canary-canary-4711')])):
        print('a canary-canary-4711')
        print('b canary-canary-4711', file=sys.stderr)
        logger.warning('c canary-canary-4711')
        raise KeyError
    assert (sys.stdout, sys.stderr) == streams and capsys.readouterr() == (f'a {MASK}\n', f'b {MASK}\n') and out.getvalue() == f'c {MASK}\n'


def test_added_while_it_works():
    masker = Masker()
    assert masker.mask('canary-4711') == 'canary-4711'
    masker.add(Secret('canary-4711'))
    assert masker.mask('canary-4711') == MASK
    with pytest.raises(ValueError, match='PIN has fewer than') as caught: masker.add(Secret('1234', 'PIN'))
    assert '1234' not in str(caught.value) and SHORTEST > len(MASK)


def test_a_secret_never_prints_itself():
    secret = Secret('canary-4711', 'SLACK_WEBHOOK')
    shown = [repr(secret), str(secret), f'{secret}', f'{secret:>30}', ' '.join(map(str, [secret])), repr([secret]), repr({'a': secret}), repr(vars(type(secret)))]
    try: raise RuntimeError(secret)
    except RuntimeError as e: shown.append(''.join(traceback.format_exception(e)))
    for write in (json.dumps, pickle.dumps):
        with pytest.raises(TypeError) as caught: write(secret)
        shown.append(str(caught.value))
    assert not any('canary' in s for s in shown) and copy.deepcopy({'a': secret})['a'] is secret
    assert secret == Secret('canary-4711') != Secret('canary-4712') and len({secret, Secret('canary-4711')}) == 1
    with pytest.raises(ValueError, match='is empty'): Secret('')


@pytest.mark.parametrize(('text', 'name'), [('${SLACK_WEBHOOK}', 'SLACK_WEBHOOK'), ('${oc.env:A_1}', 'A_1'), ('${ oc.env:A }', ''), (' ${A} ', 'A'), ('${oc.env:A,null}', 'A'),
                                            ("${oc.env:A,''}", 'A'), ('', ''), (None, '')])
def test_references(text, name):
    if name or not text: assert variable_of(text, 'x') == name
    else:
        with pytest.raises(UserError): variable_of(text, 'x')


@pytest.mark.parametrize('text', ['xoxb-canary', 'https://hooks.slack.com/services/T/B/canary', '${oc.env:A,canary}', '${A}canary', '$canary'])
def test_a_token_in_the_settings_is_refused_and_not_repeated(text):
    with pytest.raises(UserError, match=r'alerts\.slack must not hold the secret itself') as caught: variable_of(text, 'alerts.slack')
    assert 'canary' not in str(caught.value)


def test_providers(monkeypatch):
    monkeypatch.setenv('A_TOKEN', ' canary\n')
    monkeypatch.setenv('B_TOKEN', ' ')
    provider = secrets_provider()
    assert provider.get('A_TOKEN') == Secret('canary') and provider.get('B_TOKEN') is None and provider.get('C_TOKEN') is None
    assert isinstance(secrets_provider('env'), EnvironmentSecrets)
    with pytest.raises(UserError, match='"vault" is not installed here .there is: environment'): secrets_provider('vault')


def test_the_provider_of_another_package(monkeypatch):
    import importlib.metadata as metadata
    point = metadata.EntryPoint('drawer', 'test_secrets:Drawer', 'tts_tuner.secrets')
    monkeypatch.setattr(metadata, 'entry_points', lambda group: metadata.EntryPoints([point] if group == 'tts_tuner.secrets' else []))
    monkeypatch.setitem(sys.modules, 'test_secrets', sys.modules[__name__])
    assert secrets_provider('drawer').get('x') == Secret('out of the drawer')


class Drawer:
    "A provider of secrets"
    def get(self, name): return Secret('out of the drawer', name)


def test_an_environment_says_what_is_secret():
    around = dict(PATH='/bin', SLACK_WEBHOOK='https://x/canary', WANDB_API_KEY='canary', APIKEY='canary1', GITHUB_TOKEN='canary2', A_TOKEN='off', TOKENIZERS='canary', MONKEY='canary')
    assert [s.name for s in environment_secrets(around)] == ['APIKEY', 'GITHUB_TOKEN', 'SLACK_WEBHOOK', 'WANDB_API_KEY']
    assert without_secrets(around, ('SLACK_WEBHOOK', 'ABSENT')).keys() == around.keys() - {'SLACK_WEBHOOK'}


def test_a_long_text_takes_no_long_time():
    import time
    masker = Masker([Secret('xoxb-0123456789-ABCDEFGHIJ')], names=['Jane Doe'], mails=True, homes=True)
    began = time.process_time()
    for bad in (' ' * 100_000, '\n   ' * 25_000, '\\n' * 25_000, 'a-' * 50_000, '\x1b[1m' * 20_000, '\\' * 10_000, '%20' * 30_000, 'jane ' * 20_000, 'xoxb-' * 20_000):
        masker.mask(bad)
    assert time.process_time() - began < 8
