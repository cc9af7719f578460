"""Personal data and secrets, replaced by values of the same kind that keep the syntax valid.

E-mail and IP addresses are found here, secrets by `secrets.py`. Replacing is deterministic, and a second pass changes
nothing: what is put in is what is left alone.
"""

import functools
import ipaddress
import re
from typing import NamedTuple

from kwaicoder_jax.data.cleaning import secrets
from kwaicoder_jax.data.cleaning.characters import names

_DOMAIN = re.compile(r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,6}([A-Za-z]{2,18}))(?![\w-])")
_LOCAL = re.compile(r"[A-Za-z0-9_%+-]+(?:\.[A-Za-z0-9_%+-]+)*\Z")
_LONGEST_LOCAL = 64  # RFC 5321
# Only real endings: A@W.shape is a product of matrices, icon@2x.png a file.
_ENDINGS = names(
    "com org net edu gov mil int info biz name pro dev app io ai co me tv xyz online site tech cloud blog email "
    "at au be bg br by ca ch cl cn cz de dk ee es eu fi fr gr hk hr hu ie il in ir is it jp kr lt lu lv mx my nl no nz "
    "pe ph pk pl pt ro rs ru se sg si sk su th tr tw ua uk us uy vn za ar id ke ma ng sa ae kz asia cat"
)
_NOBODY = re.compile(  # addresses of documentation and of machines
    r"(?:.*\.)?(?:example|test|invalid|localhost|domain|mydomain|yourdomain|email|foo|bar|host|server|company)\.\w+\Z"
    r"|(?:.*\.)?users\.noreply\.github\.com\Z",
    re.IGNORECASE,
)
_MACHINES = frozenset({"git", "hg", "svn", "noreply", "no-reply", "mailer-daemon", "root", "nobody", "postmaster"})

_IPV4 = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}(?![\w-]|\.[0-9])")  # what follows the first number
_FIRST = re.compile(r"(?<![\w.-])[0-9]{1,3}\Z")
_COLONS = re.compile(r":[0-9a-fA-F]{0,4}:[0-9a-fA-F]")
_IPV6 = re.compile(r"[23][0-9a-fA-F]{3}:(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:.])")
_VERSION = re.compile(
    r"(?:ver(?:sion)?|\bv|release|\brev|build|\boid|revision|firmware|[=<>~!^]=|[\w]/)[\W_]{0,6}\Z", re.I
)
_SMALLEST = 25  # three smaller numbers of the four: a version or a section, as in "HTML5, 8.2.4.44", not an address
_RESOLVERS = names("8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 9.9.9.9 208.67.222.222 208.67.220.220 4.2.2.2")
_LOOK_BACK = 24  # characters
_PASSES = 10  # what stood beside a replaced value can be found in the next; more than two are for hostile texts


class Redacted(NamedTuple):
    """The text after all replacements, and how many of each kind there were."""

    text: str
    counts: dict[str, int]


def redact(text: str, *, emails: bool = True, addresses: bool = True, keys: bool = True) -> Redacted:
    """Replaces e-mail addresses, IP addresses and secrets.

    Equal addresses become equal values of a document: person1@example.com, 192.0.2.1, 2001:db8::1 (RFC 2606, 5737,
    3849), numbered by where they come first. A secret keeps its length, and each character its class.

    Returns:
      the text, with counts by "email", "ip_address", "secret", "private_key"; kinds that do not occur are left out.
    """
    counts: dict[str, int] = {}
    for _ in range(_PASSES):
        redacted, found = _once(text, emails, addresses, keys)
        if redacted == text:
            break
        text = redacted
        counts = {kind: counts.get(kind, 0) + found.get(kind, 0) for kind in sorted(counts | found)}
    return Redacted(text, counts)


def _once(text: str, emails: bool, addresses: bool, keys: bool) -> tuple[str, dict[str, int]]:
    text, counts = secrets.hide(text) if keys else (text, {})
    if emails and "@" in text:
        text = _replaced(text, _emails(text), "person{}@example.com", "email", counts)
    if addresses:
        text = _replaced(text, _ipv4(text), "192.0.2.{}", "ip_address", counts)
        if _COLONS.search(text):
            text = _replaced(text, _ipv6(text), "2001:db8::{:x}", "ip_address", counts)
    return text, counts


def _replaced(text: str, spans: list[tuple[int, int]], form: str, kind: str, counts: dict[str, int]) -> str:
    if not spans:
        return text
    numbers: dict[str, int] = {}
    parts, place = [], 0
    for start, end in spans:
        number = numbers.setdefault(text[start:end].lower(), len(numbers))
        parts += [text[place:start], form.format(1 + number % 254)]
        place = end
    counts[kind] = counts.get(kind, 0) + len(spans)
    return "".join(parts) + text[place:]


def _emails(text: str) -> list[tuple[int, int]]:
    found = []
    end = 0
    for match in _DOMAIN.finditer(text):
        local = _LOCAL.search(text[max(end, match.start() - _LONGEST_LOCAL - 1) : match.start()])
        if local is None or len(local[0]) > _LONGEST_LOCAL or match[2].lower() not in _ENDINGS:
            continue
        end = match.end()  # a@b.com@c.com holds one address
        if _NOBODY.match(match[1]) or local[0].lower() in _MACHINES or not re.search("[A-Za-z]", local[0]):
            continue
        found.append((match.start() - len(local[0]), end))
    return found


def _ipv4(text: str) -> list[tuple[int, int]]:
    found = []
    for match in _IPV4.finditer(text):
        first = _FIRST.search(text, max(0, match.start() - 4), match.start())
        if first is None or not _is_public(first[0] + match[0]):
            continue
        if not _VERSION.search(text, max(0, first.start() - _LOOK_BACK), first.start()):
            found.append((first.start(), match.end()))
    return found


def _ipv6(text: str) -> list[tuple[int, int]]:
    return [
        match.span()
        for match in _IPV6.finditer(text)
        if not (match.start() and (text[match.start() - 1].isalnum() or text[match.start() - 1] in ":._"))
        and _is_public(match[0])
    ]


@functools.lru_cache(4096)
def _is_public(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:  # a number over 255 or with a 0 before it, too few groups
        return False
    if not parsed.is_global or parsed.is_multicast or parsed.is_reserved or address in _RESOLVERS:
        return False
    return parsed.version == 6 or (sorted(parsed.packed)[2] >= _SMALLEST and parsed.packed[3] != 0)
