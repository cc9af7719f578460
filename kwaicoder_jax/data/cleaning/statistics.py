"""What rules look at: plain numbers of one text, each measured once, by passes over arrays of its code points."""

import dataclasses
import math
import re

import numpy as np

from kwaicoder_jax.data.cleaning import characters, comments, encoded, repetition, statements, syntax

_TODO = tuple(  # a literal first: `re` finds it at the speed of memory
    re.compile(rf"{mark}(?<![A-Za-z]{mark})(?![A-Za-z])")
    for mark in (
        "TODO",
        "todo",
        "Todo",
        "FIXME",
        "fixme",
        "FixMe",
        "YOUR CODE HERE",
        "Your code here",
        "your code here",
    )
)
_LONG_WORD, _LONG_STRING = 20, 20  # characters; words
_HEX = re.compile(r"0[xX][0-9a-fA-F]+")
_SHORTEST_LINE = 2  # visible characters; a lone bracket is not a repetition


@dataclasses.dataclass(frozen=True, slots=True)
class Statistics:
    """Numbers of one text. A share is of all characters unless it says otherwise; nan: it does not apply.

    Attributes:
      size: bytes in UTF-8.
      characters: code points.
      words: runs of letters and digits; an ideograph is one by itself.
      lines: of any kind; a line break at the end begins no new one.
      longest_line: characters.
      mean_line: characters, without line breaks.
      mean_word: characters of the words that are not ideographs.
      letters: share of the visible characters.
      digits: share of the visible characters.
      white_space: share.
      replacements: share of U+FFFD.
      comments: share in comments, Python's docstrings among them.
      strings: share in the strings that are no comments, of what is no comment.
      long_strings: lines of strings with more than 20 words, over the lines.
      long_words: share of words of strings with more than 20 characters, links left out.
      hex_words: share of hexadecimal numbers such as 0x1F.
      repeated_lines: share of the lines with text that come more than once; of lines without white space at all.
      top_2grams: share of the names' characters that the most frequent 2-gram of names takes, if it comes 4 times; so
        on for 3, 4. A name is a word, or words joined by "_".
      repeated_5grams: share of the names' characters in 5-grams of names that come more than once; so on up to 10.
      imports: lines that begin with `import` or `from`, over the lines with text.
      passes: lines that begin with `pass`, over the lines with text.
      asserts: lines that begin with an assertion, over the lines with text.
      prints: lines that begin by printing, over the lines with text.
      directives: lines that begin with # and a lower-case letter, over the lines with text.
      todos: marks of unfinished work in comments, over the lines.
      encoded_run: characters of the longest run of base64 or hexadecimal data, over line breaks and quotes.
      encoded: share of such data.
      escapes: share of escapes of bytes or code points, such as \\x1f and \\u00e9.
      syntax_errors: share of the bytes that the language's grammar finds no place for; nan where there is no grammar.
      python_2: statements of Python 2 (print, exec; 20 at most), over the lines with text.
    """

    size: int
    characters: int
    words: int
    lines: int
    longest_line: int
    mean_line: float
    mean_word: float
    letters: float
    digits: float
    white_space: float
    replacements: float
    comments: float
    strings: float
    long_strings: float
    long_words: float
    hex_words: float
    repeated_lines: float
    top_2grams: float
    top_3grams: float
    top_4grams: float
    repeated_5grams: float
    repeated_6grams: float
    repeated_7grams: float
    repeated_8grams: float
    repeated_9grams: float
    repeated_10grams: float
    imports: float
    passes: float
    asserts: float
    prints: float
    directives: float
    todos: float
    encoded_run: int
    encoded: float
    escapes: float
    syntax_errors: float
    python_2: float


NAMES = tuple(field.name for field in dataclasses.fields(Statistics))


def measure(text: str, language: str = "", *, parse: bool = True) -> Statistics:
    """Measures a text; comments, strings and what is in them are nan where the language's syntax is not known.

    Args:
      text: valid Unicode.
      language: a name of `reading.languages`, or "".
      parse: whether to look for a grammar of it; else errors of syntax are nan.
    """
    codes = characters.code_points(text)
    kinds = characters.classes(codes)
    visible = (kinds & characters.SPACE) == 0
    total, visible_total = codes.size, int(np.count_nonzero(visible))
    rank = np.zeros(total + 1, np.int64)  # visible characters before each place
    np.cumsum(visible, out=rank[1:])
    seen = characters.Hashed(codes[visible])

    word_starts, word_ends = characters.words(kinds)
    lengths = word_ends - word_starts
    starts, ends = rank[word_starts], rank[word_ends]
    word_hashes = seen.pieces(starts, ends)
    name_starts, name_ends = characters.words(kinds | (codes == ord("_")).view(np.uint8))
    top, repeated = repetition.ngram_shares(seen.pieces(rank[name_starts], rank[name_ends]), name_ends - name_starts)
    gaps = np.zeros(lengths.size, np.int64)
    gaps[1:] = word_starts[1:] - word_ends[:-1]
    joined = gaps <= statements.GAP
    joined[1:] &= starts[1:] - ends[:-1] == gaps[1:]  # no white space

    line_starts, line_ends = _lines(codes)
    line_lengths = line_ends - line_starts
    first, last = rank[line_starts], rank[line_ends]
    full = last > first
    repeated_lines = repetition.repeated_share(
        seen.pieces(first[full], last[full]), (last - first)[full] >= _SHORTEST_LINE
    )
    spans = comments.spans(text, language)
    encoded_run, encoded_total = encoded.data_runs(seen.codes)
    faults = syntax.check(text, language) if parse else syntax.UNKNOWN
    heads = statements.Words(seen, starts, ends, word_hashes, joined)
    # ideographs are words of one character; what is left is as long as its letters say
    spelled = lengths[(kinds[word_starts] & characters.IDEOGRAPH) == 0]

    def share(count: int, of: int = total) -> float:
        return count / of if of else 0.0

    return Statistics(
        size=len(text) if codes.dtype == np.uint8 else len(text.encode()),
        characters=total,
        words=lengths.size,
        lines=line_lengths.size,
        longest_line=int(line_lengths.max(initial=0)),
        mean_line=share(int(line_lengths.sum()), line_lengths.size),
        mean_word=float(spelled.mean()) if spelled.size else math.nan,
        letters=share(int(np.count_nonzero(kinds & characters.LETTER)), visible_total),
        digits=share(int(np.count_nonzero(kinds & characters.DIGIT)), visible_total),
        white_space=share(total - visible_total),
        replacements=0.0 if codes.dtype == np.uint8 else share(text.count("\ufffd")),
        **_in_spans(text, visible, word_starts, line_starts, spans),
        hex_words=share(sum(map(len, _HEX.findall(text)))) if "0x" in text or "0X" in text else 0.0,
        repeated_lines=repeated_lines,
        **{f"top_{n}grams": value for n, value in zip(repetition.TOP, top, strict=True)},
        **{f"repeated_{n}grams": value for n, value in zip(repetition.REPEATED, repeated, strict=True)},
        **heads.shares(first[full]),
        encoded_run=encoded_run,
        encoded=share(encoded_total),
        escapes=share(encoded.escaped(codes)),
        syntax_errors=faults.share,
        python_2=share(faults.python_2, int(np.count_nonzero(full))),
    )


def _lines(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    breaks = np.flatnonzero(codes == ord("\n"))
    starts, ends = np.append(0, breaks + 1), np.append(breaks, codes.size)
    return (starts[:-1], ends[:-1]) if starts[-1] == codes.size else (starts, ends)


def _in_spans(
    text: str, visible: np.ndarray, words: np.ndarray, lines: np.ndarray, spans: comments.Spans | None
) -> dict[str, float]:
    names = ("comments", "strings", "long_strings", "long_words", "todos")
    if spans is None or not text:
        return dict.fromkeys(names, math.nan)
    commented = spans.comments()
    values = (
        commented / len(text),
        spans.strings() / max(len(text) - commented, 1),
        _long_strings(spans, words, lines) / lines.size,
        _long_words(text, visible, spans) / len(text),
        _todos(text, spans) / lines.size,
    )
    return dict(zip(names, values, strict=True))


def _long_strings(spans: comments.Spans, words: np.ndarray, lines: np.ndarray) -> int:
    starts, ends = spans.string_starts, spans.string_ends
    inside = np.searchsorted(starts, lines, "right") > np.searchsorted(ends, lines, "right")
    cuts = lines[inside]  # a line that begins within a string begins a piece of it
    starts, ends = np.sort(np.append(starts, cuts)), np.sort(np.append(ends, cuts))
    counts = np.searchsorted(words, ends) - np.searchsorted(words, starts)
    return int(np.count_nonzero(counts > _LONG_STRING))


def _long_words(text: str, visible: np.ndarray, spans: comments.Spans) -> int:
    if not spans.string_starts.size:
        return 0
    depth = np.zeros(visible.size + 1, np.int8)
    depth[spans.string_starts + 1] += 1  # quotes are no part of a word
    depth[spans.string_ends - 1] -= 1
    starts, ends = characters.runs((np.cumsum(depth[:-1], dtype=np.int8) > 0) & visible)
    long = ends - starts > _LONG_WORD
    return sum(int(b - a) for a, b in zip(starts[long], ends[long], strict=True) if text.find("://", a, b) < 0)


def _todos(text: str, spans: comments.Spans) -> int:
    places = np.array([match.start() for mark in _TODO for match in mark.finditer(text)], np.int64)
    before = np.searchsorted(spans.comment_starts, places, "right")
    return int(np.count_nonzero(before > np.searchsorted(spans.comment_ends, places, "right")))
