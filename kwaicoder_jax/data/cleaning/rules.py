"""The rules: one bound on one number of a document each, as typed objects, with the default table.

The numbers come from OpenCoder's public filters (OpenCoder-llm/opc_data_filtering, pipeline/code_filter_config.py) and
StarCoder's; where they drop good code on real files, they are wider, and the table says so.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from kwaicoder_jax.data.cleaning.statistics import NAMES, Statistics
from kwaicoder_jax.errors import UserError

PROSE = frozenset({"markdown", "text", "rst", "tex", "asciidoc", "org", "texinfo", "troff"})
MARKUP = frozenset({"html", "xml", "svg", "vue", "svelte", "jinja"})
STYLES = frozenset({"css", "scss", "less"})
DATA = frozenset({"json", "yaml", "toml", "csv", "ini", "gettext"})
HASHED_PREPROCESSOR = frozenset({"c", "cpp", "objective_c", "cuda"})
_WHERE = "prepare_data.cleaning.rules"


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """One bound; a number that is nan breaks none.

    Attributes:
      name: in reports and configs.
      statistic: a field of `Statistics`.
      at_least: the number must not be lower; None: no such bound.
      at_most: the number must not be higher; None: no such bound.
      languages: where it holds; empty: everywhere.
      exempt: languages where it does not hold.
    """

    name: str
    statistic: str
    at_least: float | None = None
    at_most: float | None = None
    languages: frozenset[str] = frozenset()
    exempt: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        where = f"{_WHERE}.{self.name}"
        if self.statistic not in NAMES:
            raise UserError(
                f"{self.statistic!r} is not a statistic", where=f"{where}.statistic", remedy=f"one of {list(NAMES)}"
            )
        bounds = {field: getattr(self, field) for field in ("at_least", "at_most")}
        for field, value in bounds.items():
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value)
            ):
                raise UserError(f"{value!r} is not a number", where=f"{where}.{field}")
        if all(value is None for value in bounds.values()):
            raise UserError("has no bound", where=where, remedy="give at_least, at_most or both")
        for field in ("languages", "exempt"):
            names = getattr(self, field)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise UserError(f"{names!r} is not a list of languages", where=f"{where}.{field}")
            object.__setattr__(self, field, frozenset(names))

    def holds_for(self, language: str) -> bool:
        """Whether the rule speaks of this language."""
        return (not self.languages or language in self.languages) and language not in self.exempt

    def broken_by(self, statistics: Statistics) -> bool:
        """Whether the number lies outside the bounds."""
        value = getattr(statistics, self.statistic)
        return (self.at_least is not None and value < self.at_least) or (
            self.at_most is not None and value > self.at_most
        )


def _rule(name: str, statistic: str, at_least: float | None, at_most: float | None, **where: frozenset[str]) -> Rule:
    return Rule(name, statistic, at_least, at_most, **where)


_LOOSE = PROSE | MARKUP | STYLES | DATA
# fmt: off
DEFAULT: tuple[Rule, ...] = (
    _rule("replacement_characters", "replacements", None, 0.01),
    _rule("few_words", "words", 30, None),
    _rule("few_characters", "characters", 50, None),
    _rule("few_lines", "lines", 10, None, exempt=PROSE | DATA | STYLES),
    _rule("many_lines", "lines", None, 100_000),
    _rule("long_line", "longest_line", None, 1000, exempt=PROSE),
    _rule("long_line_of_prose", "longest_line", None, 10_000, languages=PROSE),  # a paragraph can be a line
    _rule("mean_line_short", "mean_line", 5, None),
    _rule("mean_line_long", "mean_line", None, 100, exempt=PROSE),
    _rule("mean_line_of_prose_long", "mean_line", None, 1000, languages=PROSE),
    _rule("mean_word_short", "mean_word", 2, None),
    _rule("mean_word_long", "mean_word", None, 10),
    _rule("few_letters", "letters", 0.5, None, exempt=DATA | STYLES | frozenset({"shell", "sql", "assembly", "tex"})),
    _rule("few_letters_of_data", "letters", 0.35, None, languages=DATA | STYLES | frozenset({"shell", "sql", "tex"})),
    _rule("digits", "digits", None, 0.2, exempt=frozenset({"sql", "assembly", "csv"})),
    _rule("digits_of_sql", "digits", None, 0.3, languages=frozenset({"sql", "assembly", "csv"})),
    _rule("white_space", "white_space", None, 0.5, exempt=MARKUP | DATA),
    _rule("white_space_of_markup", "white_space", None, 0.65, languages=MARKUP | DATA),  # deep nesting
    _rule("comments", "comments", None, 0.9, exempt=MARKUP),  # 0.8 there: well-documented headers
    _rule("repeated_lines", "repeated_lines", None, 0.8),  # 0.7 there: sympy's hyperbolic.py, stubs with overloads
    _rule("top_2grams", "top_2grams", None, 0.20),
    _rule("top_3grams", "top_3grams", None, 0.18),
    _rule("top_4grams", "top_4grams", None, 0.16),
    _rule("repeated_5grams", "repeated_5grams", None, 0.90),  # 0.80, 0.70 and 0.60 there: bisect.py
    _rule("repeated_6grams", "repeated_6grams", None, 0.85),
    _rule("repeated_7grams", "repeated_7grams", None, 0.85),
    _rule("repeated_8grams", "repeated_8grams", None, 0.85),
    _rule("repeated_9grams", "repeated_9grams", None, 0.85),
    _rule("repeated_10grams", "repeated_10grams", None, 0.80),
    _rule("long_strings", "long_strings", None, 0.2, exempt=_LOOSE | frozenset({"shell"})),
    _rule("strings", "strings", None, 0.6, exempt=_LOOSE | frozenset({"shell"})),
    _rule("long_words", "long_words", None, 0.4, exempt=MARKUP),
    _rule("hex_words", "hex_words", None, 0.4),
    _rule("asserts", "asserts", None, 0.4, exempt=_LOOSE | frozenset({"shell", "go"})),
    _rule("todos", "todos", None, 0.05, exempt=_LOOSE),  # 0.01 there: one mark drops a file of 99 lines
    _rule("encoded_run", "encoded_run", None, 1024),
    _rule("encoded", "encoded", None, 0.5),
    _rule("escapes", "escapes", None, 0.3),
    _rule("prints", "prints", None, 0.4, exempt=_LOOSE | frozenset({"shell"})),
    _rule("imports", "imports", None, 0.3, languages=frozenset({"python"})),
    _rule("passes", "passes", None, 0.15, languages=frozenset({"python"})),  # 0.05 there: classes of errors
    _rule("directives", "directives", None, 0.9, languages=HASHED_PREPROCESSOR),
    _rule("large_data", "characters", None, 5000, languages=frozenset({"json", "csv"})),
    _rule("syntax", "syntax_errors", None, 0.1, exempt=HASHED_PREPROCESSOR),
    _rule("syntax_of_c", "syntax_errors", None, 0.3, languages=HASHED_PREPROCESSOR),  # macros
    _rule("python_2", "python_2", None, 0.0, languages=frozenset({"python"})),
)
# fmt: on


def table(overrides: Mapping[str, Mapping[str, Any] | None] | None = None) -> tuple[Rule, ...]:
    """Returns the default rules with changes: a mapping of fields changes or adds a rule, None switches one off.

    As in {"digits": {"at_most": 0.3}, "passes": None, "no_comments": {"statistic": "comments", "at_least": 0.01}}.

    Raises:
      UserError: an unknown rule or field, a bound that is not a number, a rule without a bound.
    """
    found = {rule.name: rule for rule in DEFAULT}
    fields = {field.name for field in dataclasses.fields(Rule)} - {"name"}
    for name, changes in (overrides or {}).items():
        where = f"{_WHERE}.{name}"
        if name not in found and not (isinstance(changes, Mapping) and "statistic" in changes):
            raise UserError(
                "is not a rule", where=where, remedy=f"one of {sorted(found)}, or a new one with its statistic"
            )
        if changes is None:
            del found[name]
            continue
        if not isinstance(changes, Mapping):
            raise UserError(f"{changes!r} does not change a rule", where=where, remedy="a mapping of fields, or None")
        if unknown := sorted(set(changes) - fields):
            raise UserError(f"unknown field {unknown[0]!r}", where=where, remedy=f"a rule has {sorted(fields)}")
        found[name] = dataclasses.replace(found[name], **changes) if name in found else Rule(name, **changes)
    return tuple(found.values())
