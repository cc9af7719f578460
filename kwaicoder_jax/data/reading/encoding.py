"""Bytes to text: marks, declarations, UTF-8, and a bounded guess for the rest; nothing is replaced or dropped in silence."""

import re
from typing import NamedTuple

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\0\0", "utf-32-le"),
    (b"\0\0\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_COOKIE = re.compile(
    rb"(?:[^\n]*\n)?[ \t\f]*(?:#|//|/\*|\"|;|%|\.\\\").*?coding[:=][ \t]*([-\w.]+)"
)  # PEP 263, Emacs, Vim
_CHARSET = re.compile(
    rb"<\?xml[^>]{0,200}\bencoding=[\"']([-\w.]+)|<meta[^>]{0,200}\bcharset=[\"']?([-\w.]+)", re.IGNORECASE
)
# Encodings that a declaration may name; Python knows others (zip, rot13, idna, unicode_escape) that are no text's.
_DECLARABLE = re.compile(
    r"utf[-_]?8|us-ascii|ascii|latin[-_]?1|iso[-_]?8859[-_]\d+|(?:cp|windows-)125\d|cp437|cp850|cp866|koi8[-_][ru]|"
    r"shift[-_]?jis|sjis|cp932|euc[-_]jp|iso[-_]2022[-_]jp|gb2312|gbk|gb18030|big5|euc[-_]kr|cp949|mac[-_]roman",
    re.IGNORECASE,
)
# The usual letters beyond ASCII of text in an encoding, the length of the runs of high bytes that they come in, and
# letters without which it is none. The first of equal guesses counts: Hangul's bytes are common Hanzi in GB 2312.
_GUESSES = {
    "shift_jis": (r"[\u3041-\u30fe\u3001-\u3011\uff01-\uff5e\u4e00-\u9fa5]", 2, 10**6, r"[\u3041-\u30fe]"),
    "euc_jp": (r"[\u3041-\u30fe\u3001-\u3011\uff01-\uff5e\u4e00-\u9fa5]", 2, 10**6, r"[\u3041-\u30fe]"),
    "euc_kr": (r"[\uac00-\ud7a3\u3001-\u3011]", 2, 10**6, r""),
    "gb18030": (r"[\u4e00-\u9fa5\u3001-\u3011\uff01-\uff5e\u2014-\u2026]", 2, 10**6, r""),
    "cp1251": (r"[а-яё]", 3, 60, r""),
    "koi8-r": (r"[а-яё]", 3, 60, r""),
    "cp1252": (r"[À-ÖØ-öø-ÿ©®°±µ·«»§’‘“”–—…•€ŒœŠšŽž£\xa0¡¿²³¹ªº¼½¾×÷]", 1, 2, r""),
}
_COMMON_HANZI = re.compile(rb"[\xb0-\xd7][\xa1-\xfe]|[\xa1\xa3][\xa1-\xfe]")  # GB 2312, level 1 and punctuation
_HIGH = re.compile(rb"[\x80-\xff]+")
_SAMPLE = 1 << 20  # bytes that a guess looks at
_LEAST = 0.6  # share of usual letters below which a guess is none
_MOJIBAKE = re.compile(r"[ÂÃ][\x80-\xbf¡-¿]|â€[\x80-\xff™œ˜\u009d]|Ã[ƒ‚]")


class Decoded(NamedTuple):
    """A text and how it was had.

    Attributes:
      text: with line ends of "\\n" alone and no mark in front; empty where `reason` is set.
      encoding: that it was in.
      repaired: whether mojibake was mended.
      reason: "undecodable", "null_bytes" or "surrogates" where there is no text.
    """

    text: str
    encoding: str = ""
    repaired: bool = False
    reason: str = ""


def decode(raw: bytes) -> Decoded:
    """Decodes a file: by its mark, as UTF-8, by what it declares, else by a guess among seven common encodings.

    UTF-8 comes before the declaration: text that decodes as such, beyond ASCII, is hardly ever anything else, and old
    declarations outlive a conversion. ISO-2022 (7 bits with escapes) is the exception.
    """
    for mark, encoding in _MARKS:
        if raw.startswith(mark):
            return _finish(raw[len(mark) :], encoding)
    if raw.isascii():
        seven_bit = b"\x1b" in raw and (_declared(raw) or "").lower().startswith("iso")
        return _finish(raw, "iso2022_jp" if seven_bit else "utf-8")
    try:
        return settle(raw.decode("utf-8"), "utf-8")
    except UnicodeDecodeError:
        pass
    declared = _declared(raw)
    if declared and not re.fullmatch(r"utf[-_]?8|(?:us-)?ascii", declared, re.IGNORECASE):
        found = _finish(raw, declared)
        if not found.reason:
            return found
    encoding = _guess(raw)
    return _finish(raw, encoding) if encoding else Decoded("", reason="undecodable")


def settle(text: str, encoding: str = "utf-8") -> Decoded:
    """Refuses NUL and lone surrogates, mends mojibake and line ends; for text that comes decoded, as from JSON, too."""
    if "\0" in text:
        return Decoded("", reason="null_bytes")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return Decoded("", reason="surrogates")
    repaired = False
    if "\xc2" in text or "\xc3" in text or "\xe2" in text:
        text, repaired = _mended(text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return Decoded(text.removeprefix("\ufeff").removesuffix("\x1a"), encoding, repaired)


def _finish(raw: bytes, encoding: str) -> Decoded:
    try:
        return settle(raw.decode(encoding), encoding)
    except (UnicodeDecodeError, LookupError):
        return Decoded("", reason="undecodable")


def _declared(raw: bytes) -> str | None:
    head = raw[:1024]
    match = _COOKIE.match(head) or _CHARSET.search(head)
    if not match:
        return None
    name = next(filter(None, match.groups())).decode()
    for ending in ("-unix", "-dos", "-mac"):  # Emacs
        name = name.removesuffix(ending)
    return name if _DECLARABLE.fullmatch(name) else None


def _guess(raw: bytes) -> str:
    """The encoding whose usual letters make up most of what is beyond ASCII; "" where no guess reaches `_LEAST`."""
    sample = raw if len(raw) <= _SAMPLE else raw[: raw.rindex(b"\n", 0, _SAMPLE) if b"\n" in raw[:_SAMPLE] else _SAMPLE]
    runs = [len(run) for run in _HIGH.findall(sample)]
    best, best_share = "", _LEAST
    for encoding, (letters, shortest, longest, needed) in _GUESSES.items():
        try:
            beyond = re.sub(r"[\x00-\x7f]+", "", sample.decode(encoding))
        except UnicodeDecodeError:
            continue
        if needed and len(re.findall(needed, beyond)) < 0.1 * len(beyond):
            continue
        usual = len(re.findall(letters, beyond))
        if encoding == "gb18030":
            usual = min(usual, len(_COMMON_HANZI.findall(beyond.encode("gb18030"))))
        in_runs = sum(run for run in runs if shortest <= run <= longest) / max(1, sum(runs))
        share = usual / max(1, len(beyond)) * in_runs
        if share > best_share + 1e-9:
            best, best_share = encoding, share
    return best


def _mended(text: str) -> tuple[str, bool]:
    """`text` with mojibake mended where there is some, by ftfy; a line at a time, so that good lines stay as they are."""
    if not _MOJIBAKE.search(text):
        return text, False
    import ftfy

    lines = text.split("\n")
    for i, line in enumerate(lines):
        if len(line) < 10_000 and _MOJIBAKE.search(line):
            lines[i] = ftfy.fix_encoding(line)
    mended = "\n".join(lines)
    return mended, mended != text
