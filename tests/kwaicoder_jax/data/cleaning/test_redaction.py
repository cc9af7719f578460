"""What is replaced, what is left alone, and that the code stays the same kind of code."""

import ast
import importlib
import pkgutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax.data.cleaning import redaction, secrets

# put together at run time, so that no scanner takes this file for a leak
RANDOM = "q7Zr2LpX9vTb4KsWm8YcN3dHf6JgA1eU5oRiD0tE"
TOKENS = {
    "aws": "AKIA" + "Q3EGXK7ZT5LWNVB2",
    "github": "ghp_" + RANDOM[:36],
    "gitlab": "glpat-" + RANDOM[:20],
    "openai": "sk-" + RANDOM[:20] + "T3BlbkFJ" + RANDOM[20:40],
    "slack": "xoxb-" + "123456789012-" + "1234567890123-" + RANDOM[:24].lower(),
    "stripe": "sk_live_" + RANDOM[:24],
    "sendgrid": "SG." + RANDOM[:22] + "." + (RANDOM + RANDOM)[:43],
    "pypi": "pypi-AgEIcHlwaS5vcmc" + RANDOM * 2,
    "jwt": "eyJhbGciOiJIUzI1NiJ9." + "eyJzdWIiOiIxMjM0In0." + RANDOM,
    "azure": "AccountKey=" + (RANDOM * 3)[:88],
    "square": "sq0csp-" + (RANDOM * 2)[:43],
}
PRIVATE = "-----BEGIN RSA PRIVATE KEY-----\n" + (RANDOM[:32] * 2 + "\n") * 5 + "-----END RSA PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Jane <jane.doe+x@mail.cam.ac.uk>", "# Jane <person1@example.com>"),
        ('a = "b@corp.com"; c = "d@corp.com"; e = "B@corp.com"',)
        + ('a = "person1@example.com"; c = "person2@example.com"; e = "person1@example.com"',),
        ("mailto:me@web.de?subject=x", "mailto:person1@example.com?subject=x"),
        ("HOST = '93.184.216.34'", "HOST = '192.0.2.1'"),
        ("ping 93.184.216.34 93.184.216.35 93.184.216.34:80", "ping 192.0.2.1 192.0.2.2 192.0.2.1:80"),
        ("http://93.184.216.34/x", "http://192.0.2.1/x"),
        ("dns = 2a00:1450:4001:829::200e", "dns = 2001:db8::1"),
    ],
)
def test_addresses(text, expected):
    assert redaction.redact(text).text == expected


@pytest.mark.parametrize(
    "text",
    [
        "user@example.com admin@sub.example.org x@localhost a@b noreply@github.com",
        "git@github.com:numpy/numpy.git",
        "@property @app.route x = A@B.shape y = a@w.T icon@2x.png getty@tty1.service pkg@1.2.3",
        "@decorator.com",
        "127.0.0.1 0.0.0.0 10.1.2.3 192.168.1.1 172.16.0.9 169.254.1.1 255.255.255.0 224.0.0.251 239.255.255.250",
        "192.0.2.7 198.51.100.3 203.0.113.9 8.8.8.8 1.1.1.1 100.64.0.1",
        "1.2.3.4 8.2.4.44 30.3.3.3 version 91.4.44.124 v100.2.3.4 ==127.45.67.89 Chrome/91.0.4.124",
        "1.3.6.1.4.1.311.21.20 300.1.1.1",
        "93.184.216.34.5 5.93.184.216.34 a93.184.216.34 93.184.216.34a 093.184.216.034",
        "std::string a::b 12:34:56 fe80::1 ::1 2001:db8::5 00:1b:44:11:3a:b7 2024:01:02",
    ],
)
def test_left_alone(text):
    assert redaction.redact(text) == (text, {})


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_of_services(name):
    token = TOKENS[name]
    text = f'x = 1\ntoken_of_it = f("{token}")  # note\n'
    found = redaction.redact(text)
    assert found.counts == {"secret": 1}
    assert token not in found.text
    assert len(found.text) == len(text)
    assert found.text.startswith("x = 1\ntoken_of_it = f(")
    assert found.text.endswith(")  # note\n")
    assert redaction.redact(found.text) == (found.text, {})


def test_every_plugin_is_there():
    """The names in the table are those of the installed detect-secrets, with patterns and nothing else of it used."""
    import detect_secrets.plugins as plugins

    modules = {module.name for module in pkgutil.iter_modules(plugins.__path__)}
    for module, name, signs in secrets._PLUGINS:
        assert module in modules
        plugin = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)
        assert all(hasattr(pattern, "finditer") for pattern in plugin.denylist)
        assert signs


def test_private_keys_keep_their_frame():
    found = redaction.redact(PRIVATE)
    assert found.counts == {"private_key": 5}
    assert RANDOM[:16] not in found.text
    assert found.text.startswith("-----BEGIN RSA PRIVATE KEY-----\n")
    assert len(found.text) == len(PRIVATE)
    quoted = 'KEY = "' + PRIVATE.replace("\n", "\\n") + '"\n'
    assert ast.parse(redaction.redact(quoted).text)
    assert RANDOM[:16] not in redaction.redact(quoted).text


def test_named_strings():
    value = RANDOM[:24]
    for text in (
        f'API_KEY = "{value}"',
        f"'client_secret': '{value}'",
        f'password := "{value}"',
        f'"token": "{value}"',
    ):
        found = redaction.redact(text)
        assert value not in found.text, text
        assert found.counts == {"secret": 1}


@pytest.mark.parametrize(
    "text",
    [
        'password = "correct horse battery"',
        'password = "changeme-please-1234"',
        'token = "your-token-goes-here-1"',
        'secret_name = "projects.my-project.versions"',
        'key = "6f9619ff-8b86-d011-b42d-00cf4fc964ff"',
        'API_KEY = os.environ["SERVICE_API_KEY_2"]',
        f'checksum = "{RANDOM[:24]}"',
        'url = "postgres://user:password@localhost/db"',
        'url = "https://name:{password}@host.org"',
        'aws = "AKIAIOSFODNN7EXAMPLE"',
        "ghp = 1; tokens = tokenizer.tokens",
    ],
)
def test_no_secrets(text):
    assert redaction.redact(text) == (text, {})


def test_aws_secrets_keep_their_names_and_data_is_no_key():
    found = redaction.redact(f"aws_pw_of_it = '{RANDOM}'\n")
    assert found.text.startswith("aws_pw_of_it = '")
    assert found.counts == {"secret": 1}
    data = "x = '" + RANDOM + TOKENS["aws"] + RANDOM + "'"
    assert redaction.redact(data) == (data, {})


def test_passwords_of_links():
    text = 'url = "https://deploy:' + RANDOM[:12] + '@git.corp.net/x"'
    found = secrets.hide(text)
    assert RANDOM[:12] not in found[0]
    assert found[0].startswith('url = "https://deploy:')
    assert found[0].endswith('@git.corp.net/x"')


def test_switches():
    text = f'# a@corp.com 93.184.216.34\nAPI_KEY = "{RANDOM[:24]}"'
    assert redaction.redact(text, emails=False, addresses=False, keys=False) == (text, {})
    assert redaction.redact(text).counts == {"email": 1, "ip_address": 1, "secret": 1}


PIECES = [
    *TOKENS.values(),
    "a@corp.com",
    "93.184.216.34",
    "2a00:1450:4001:829::200e",
    PRIVATE,
    ".",
    "@",
    ":",
    '"',
    "\n",
]
PIECES += [
    " ",
    "password=",
    "://",
    "x1",
    "::",
    "-",
    "é",
    "api_key: '",
    "'",
    "eyJ",
    "AKIA",
    "person1@example.com",
    "https://u:",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_a_second_pass_changes_nothing(text):
    once = redaction.redact(text)
    assert redaction.redact(once.text) == (once.text, {})


def test_real_files_mean_the_same_and_stay(library):
    """Only strings and comments change: names, numbers and structure do not."""

    class Shape(ast.NodeTransformer):
        def visit_Constant(self, node):
            return ast.Constant(type(node.value).__name__ if isinstance(node.value, str | bytes) else node.value)

    for text in list(library.values()):
        found = redaction.redact(text)
        assert redaction.redact(found.text) == (found.text, {})
        if found.text != text:
            before, after = (ast.dump(Shape().visit(ast.parse(each))) for each in (text, found.text))
            assert before == after


@pytest.mark.parametrize(
    "piece", ["@", "a@", "1.", "1.2.3.4", "eyJ", "eyJa.", "AKIA", ":a", "://", "xox", "a.", "-", "ghp_", "'", "://a:b"]
)
def test_hostile_texts_take_one_pass(piece):
    redaction.redact(piece * (300_000 // len(piece)))
