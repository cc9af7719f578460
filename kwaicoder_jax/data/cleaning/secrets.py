"""Keys and passwords in texts, by the patterns of detect-secrets' plugins.

Only the plugins' patterns are used, never their `verify`, which sends what was found to its service; nor
`scan_line`, which yields groups of a pattern ("ghp" of a GitHub token) and keeps global settings. Of the plugins, those
whose patterns say what they find; the general keyword and entropy detectors, together, where a name says that a string
is a secret.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator

from kwaicoder_jax.errors import UserError

_WINDOW = 512  # characters around a sign of a key in which patterns are looked for: no line is too long
# plugin's module, its class, and texts without which none of its patterns can match
_PLUGINS = (
    ("aws", "AWSKeyDetector", ("AKIA", "ASIA", "ABIA", "ACCA", "A3T", "aws", "AWS")),
    ("azure_storage_key", "AzureStorageKeyDetector", ("AccountKey=",)),
    ("basic_auth", "BasicAuthDetector", ("://",)),
    ("github_token", "GitHubTokenDetector", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
    ("gitlab_token", "GitLabTokenDetector", ("glpat-", "gldt-", "glft-", "glsoat-", "glrt-", "GR1348941", "glcbt-")),
    ("jwt", "JwtTokenDetector", ("eyJ",)),
    ("npm", "NpmDetector", ("/:_authToken=",)),
    ("openai", "OpenAIDetector", ("T3BlbkFJ",)),
    ("pypi_token", "PypiTokenDetector", ("pypi-AgE",)),
    ("sendgrid", "SendGridDetector", ("SG.",)),
    ("slack", "SlackDetector", ("xox", "hooks.slack.com/services/")),
    ("square_oauth", "SquareOAuthDetector", ("sq0csp-",)),
    ("stripe", "StripeDetector", ("k_live_",)),
)
_GROUPS = {"AWSKeyDetector": 1, "BasicAuthDetector": 1, "NpmDetector": 1}  # what is secret, where a pattern has groups
_VALUE = re.compile(r"[\"'`]([A-Za-z0-9+/=_.~-]{16,200})[\"'`]")
_NAME = re.compile(
    r"(?:password|passwd|pwd|secret|token|api_?key|access_?key|auth_?key|client_?key|private_?key)\w{0,20}"
    r"[\"'\])]{0,3}\s{0,4}(?::=|=>|[=:])\s{0,4}[rbuf@]{0,2}\Z",
    re.IGNORECASE,
)
_LONGEST_NAME = 60  # characters before a value
_ENTROPY_OF_BASE64, _ENTROPY_OF_HEX = 4.0, 3.0  # bits a character; detect-secrets has 4.5 where no name speaks for it
_PLACEHOLDER = re.compile(
    r"example|sample|dummy|fake|test|your|xxxx|change|insert|placeholder|12345|abcdef|password|secret|token|[._-]key|user|<|\{|\$|%",
    re.IGNORECASE,
)
_PRIVATE_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----([^-]{1,20000})-----END", re.IGNORECASE
)
_KEY_BODY = re.compile(r"(?<!\\)[A-Za-z0-9+/=]{16,}")  # the n of an escaped line break is no part of it
_HIDDEN = str.maketrans(
    "abcdefghijklmnopqrstuvwyz" + "ABCDEFGHIJKLMNOPQRSTUVWYZ" + "123456789", "x" * 25 + "X" * 25 + "0" * 9
)


def hide(text: str) -> tuple[str, dict[str, int]]:
    """Replaces secrets: each letter by x or X, each digit by 0, so that length, quotes and signs stay.

    Returns:
      the text, and counts by "secret" and "private_key".
    """
    counts: Counter[str] = Counter()
    for kind, spans in (("private_key", _private_keys(text)), ("secret", _secrets(text))):
        parts, place = [], 0
        for start, end in sorted(spans):
            hidden = text[start:end].translate(_HIDDEN)
            if start < place or hidden == text[start:end]:
                continue
            parts += [text[place:start], hidden]
            place = end
            counts[kind] += 1
        text = "".join(parts) + text[place:]
    return text, dict(counts)


def _private_keys(text: str) -> list[tuple[int, int]]:
    if "PRIVATE KEY" not in text:
        return []
    return [
        (block.start(1) + run.start(), block.start(1) + run.end())
        for block in _PRIVATE_KEY.finditer(text)
        for run in _KEY_BODY.finditer(block[1])
    ]


@functools.cache
def _plugins() -> tuple[tuple[str, re.Pattern[str], tuple[re.Pattern[str], ...]], ...]:
    """Each plugin's name, the expression that finds its signs, and its patterns."""
    import importlib

    rows = []
    for module, name, signs in _PLUGINS:
        try:
            plugin = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                "detect-secrets is not installed",
                where="prepare_data.cleaning.secrets",
                remedy="pip install detect-secrets, or set it to False",
            ) from error
        rows.append((name, re.compile("|".join(map(re.escape, signs))), tuple(plugin.denylist)))
    return tuple(rows)


def _secrets(text: str) -> list[tuple[int, int]]:
    found: set[tuple[int, int]] = set()
    for (name, signs, patterns), (_, _, literals) in zip(_plugins(), _PLUGINS, strict=True):
        if not any(literal in text for literal in literals):
            continue
        for start, end in _windows(text, signs):
            for pattern in patterns:
                for match in pattern.finditer(text, start, end):
                    span = match.span(_GROUPS.get(name, 0) if pattern.groups else 0)
                    if _plausible(name, text[slice(*span)]) and not _in_data(text, *span):
                        found.add(span)
    for match in _VALUE.finditer(text):
        before = text[max(0, match.start() - _LONGEST_NAME) : match.start()]
        if _NAME.search(before) and _is_random(match[1]):
            found.add(match.span(1))
    return _without_overlaps(found)


def _windows(text: str, signs: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """The lines with signs, cut to 512 characters on both sides of them; each part of the text once."""
    last = 0
    for match in signs.finditer(text):
        if match.start() < last:
            continue
        before, after = max(last, match.start() - _WINDOW), match.end() + _WINDOW
        start = max(before, text.rfind("\n", before, match.start()) + 1)
        end = text.find("\n", match.end(), after)
        last = end if end >= 0 else min(after, len(text))
        yield start, last


def _plausible(plugin: str, secret: str) -> bool:
    if plugin == "JwtTokenDetector":
        from detect_secrets.plugins.jwt import JwtTokenDetector

        return JwtTokenDetector.is_formally_valid(secret)
    if plugin == "BasicAuthDetector":
        return len(secret) >= 6 and not _PLACEHOLDER.search(secret) and bool(re.search(r"\d", secret))
    return "EXAMPLE" not in secret


def _in_data(text: str, start: int, end: int) -> bool:
    """Whether it is a piece of a longer run of base64."""
    around = text[max(0, start - 1) : start] + text[end : end + 1]
    return any(character.isalnum() or character in "+/" for character in around) and text[start:end].isalnum()


def _is_random(value: str) -> bool:
    if _PLACEHOLDER.search(value) or not (re.search("[0-9]", value) and re.search("[A-Za-z]", value)):
        return False
    from detect_secrets.filters.heuristic import is_potential_uuid, is_sequential_string

    if is_potential_uuid(value) or is_sequential_string(value):
        return False
    hexadecimal = re.fullmatch("[0-9a-fA-F]+", value)
    return _entropy(value) > (_ENTROPY_OF_HEX if hexadecimal else min(_ENTROPY_OF_BASE64, math.log2(len(value)) - 0.6))


def _entropy(value: str) -> float:
    return -sum(count / len(value) * math.log2(count / len(value)) for count in Counter(value).values())


def _without_overlaps(spans: set[tuple[int, int]]) -> list[tuple[int, int]]:
    kept: list[tuple[int, int]] = []
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not kept or start >= kept[-1][1]:
            kept.append((start, end))
    return kept
