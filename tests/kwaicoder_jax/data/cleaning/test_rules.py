"""The table, its bounds, and what a config may change."""

import dataclasses
import math

import pytest

from kwaicoder_jax.data.cleaning import DEFAULT_RULES, Rule, measure, rules
from kwaicoder_jax.errors import UserError

# OpenCoder's numbers as its repository has them, but for those that are wider here: (low, high)
OPENCODER = {
    "replacements": (None, 0.01),
    "words": (30, None),
    "lines": (10, 100_000),
    "longest_line": (None, 1000),
    "mean_line": (5, 100),
    "mean_word": (2, 10),
    "letters": (0.5, None),
    "digits": (None, 0.2),
    "white_space": (None, 0.5),
    "top_2grams": (None, 0.20),
    "top_3grams": (None, 0.18),
    "top_4grams": (None, 0.16),
    "long_strings": (None, 0.2),
    "strings": (None, 0.6),
    "long_words": (None, 0.4),
    "hex_words": (None, 0.4),
    "asserts": (None, 0.4),
    "imports": (None, 0.3),
    "prints": (None, 0.4),
}


def bounds(language):
    found = {}
    for rule in DEFAULT_RULES:
        if rule.holds_for(language):
            low, high = found.get(rule.statistic, (None, None))
            found[rule.statistic] = (
                rule.at_least if low is None else low,
                rule.at_most if high is None else high,
            )
    return found


def test_the_public_numbers_hold_for_python():
    ours = bounds("python")
    assert {name: ours[name] for name in OPENCODER} == OPENCODER


def test_names_are_unique_and_every_rule_has_a_language():
    names = [rule.name for rule in DEFAULT_RULES]
    assert len(set(names)) == len(names)
    assert all(rule.holds_for(language) for rule in DEFAULT_RULES for language in rule.languages - rule.exempt)


def example(**values):
    return dataclasses.replace(measure("x = 1\n", "python", parse=False), **values)


def test_bounds_are_inclusive_and_nan_breaks_none():
    rule = Rule("a", "words", at_least=30, at_most=50)
    assert [rule.broken_by(example(words=n)) for n in (29, 30, 50, 51)] == [True, False, False, True]
    assert not Rule("a", "comments", at_most=0.1).broken_by(example(comments=math.nan))


def test_overrides():
    table = {rule.name: rule for rule in rules.table({"digits": {"at_most": 0.3}, "passes": None})}
    assert table["digits"].at_most == 0.3
    assert table["digits"].exempt
    assert "passes" not in table
    added = rules.table({"commented": {"statistic": "comments", "at_least": 0.01, "languages": ["python"]}})[-1]
    assert added == Rule("commented", "comments", at_least=0.01, languages=frozenset({"python"}))
    assert rules.table(None) == rules.table({}) == DEFAULT_RULES


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"digit": {"at_most": 1}}, "rules.digit"),
        ({"digit": None}, "rules.digit"),
        ({"digits": 0.3}, "rules.digits"),
        ({"digits": {"most": 1}}, "rules.digits"),
        ({"digits": {"at_most": "lambda x: x"}}, "rules.digits.at_most"),
        ({"digits": {"at_most": True}}, "rules.digits.at_most"),
        ({"digits": {"at_most": math.nan}}, "rules.digits.at_most"),
        ({"digits": {"at_most": None}}, "rules.digits"),
        ({"digits": {"languages": "python"}}, "rules.digits.languages"),
        ({"new": {"statistic": "beauty", "at_least": 1}}, "rules.new.statistic"),
    ],
)
def test_mistakes_name_the_field(overrides, where):
    with pytest.raises(UserError) as caught:
        rules.table(overrides)
    assert caught.value.where == f"prepare_data.cleaning.{where}"
