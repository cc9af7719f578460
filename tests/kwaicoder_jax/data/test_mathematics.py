"""Answers are read back from the text, and judged by an evaluator that shares no code with the generator."""

import ast
import collections
import operator
import re
from fractions import Fraction

import pytest

from kwaicoder_jax.data import mathematics, problems

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def value(expression, **names):
    """Exact value of an expression over integers, by walking its tree."""

    def walk(node):
        match node:
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.Name(id=name):
                return names[name]
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](walk(left), walk(right))
            case ast.UnaryOp(op=op, operand=operand):
                return OPERATORS[type(op)](walk(operand))
        raise AssertionError(ast.dump(node))

    return walk(ast.parse(expression, mode="eval").body)


def right(kind, question, answer):
    numbers = [int(n) for n in re.findall(r"-?\d+", question)]
    match kind:
        case "arithmetic":
            return value(question[len("Compute ") : -1]) == int(answer)
        case "fractions":
            expression = question[len("Compute ") :].removesuffix(" in lowest terms.")
            return value(expression) == Fraction(answer) and str(Fraction(answer)) == answer
        case "equation":
            left, right_side = question[len("Solve ") :].removesuffix(" for x.").split(" = ")
            x = Fraction(answer.removeprefix("x = "))
            return value(left, x=x) == value(right_side, x=x)
        case "divisors":
            a, b = numbers
            g, m = map(int, re.findall(r"\d+", answer))
            common = [n for n in range(1, b + 1) if a % n == 0 and b % n == 0]
            return max(common) == g and m == next(n for n in range(a, a * b + 1, a) if n % b == 0)
        case "remainder":
            base, exponent, modulus = numbers
            result = 1
            for _ in range(exponent):
                result = result * base % modulus
            return result == int(answer)
        case "percentage":
            price, up, down = numbers
            return Fraction(price * (100 + up) * (100 - down), 10_000) == Fraction(answer)
        case "sequence":
            count, first, second, third = numbers
            assert third - second == second - first
            return sum(range(first, first + (second - first) * count, second - first)) == int(answer)
        case "word_problem":
            boxes, each, given, friends = numbers
            return answer == "{} each, {} left over".format(*divmod(boxes * each - given, friends))
        case "python_expression":
            expression = re.fullmatch("What does the Python expression (.*) give[?]", question)[1]
            return str(eval(expression)) == answer
    raise AssertionError(kind)


def documents(seed, max_bytes):
    skipped = collections.Counter()
    return list(mathematics.Mathematics(max_bytes=max_bytes, seed=seed).documents("m", skipped)), skipped


def test_answers_are_right():
    found, skipped = documents(11, 200_000)
    kinds = collections.Counter()
    for d in found:
        lines = d.text.rstrip("\n").split("\n")
        kind = d.identifier.split("/")[0]
        question, answer = lines[0].removeprefix("Question: "), lines[-1].removeprefix("Answer: ")
        assert right(kind, question, answer), d.text
        kinds[kind] += 1
    assert len(kinds) == len(problems.KINDS)
    assert min(kinds.values()) > 50
    assert not skipped


def test_steps_are_right():
    """Every equality between plain expressions in the working holds."""
    checked = 0
    for d in documents(5, 100_000)[0]:
        if d.identifier.startswith(("arithmetic", "fractions", "percentage", "sequence", "divisors")):
            for line in d.text.split("\n")[1:-2]:
                sides = [side for side in line.split(": ")[-1].split(" = ") if re.fullmatch(r"[-+*/() \d]+", side)]
                assert len({value(side) for side in sides}) <= 1, line
                checked += len(sides) > 1
    assert checked > 500


def test_same_seed_same_problems():
    assert documents(1, 20_000) == documents(1, 20_000)
    assert documents(1, 20_000) != documents(2, 20_000)
    assert documents(1, 20_000)[0][:50] == documents(1, 40_000)[0][:50]


def test_a_wrong_answer_is_dropped_and_counted(monkeypatch):
    def wrong(rng):
        return problems.Problem("Compute 2 + 2.", [], "5", ["2 + 2 == 5"])

    def broken(rng):
        return problems.Problem("Compute 1 / 0.", [], "?", ["1 / 0 == 1"])

    def unchecked(rng):
        return problems.Problem("Compute 1.", [], "1", [])

    monkeypatch.setattr(problems, "KINDS", (problems.arithmetic, wrong, broken, unchecked))
    found, skipped = documents(0, 1_000)
    assert {d.identifier.split("/")[0] for d in found} == {"arithmetic"}
    assert skipped["unverified"] == pytest.approx(3 * len(found), abs=3)


@pytest.mark.parametrize("check", ["__import__('os').getcwd() != ''", "open('x')", "1", "2 + 2 == 5", "1 / 0", "("])
def test_checks_are_plain_mathematics(check):
    assert not mathematics.holds(check)
