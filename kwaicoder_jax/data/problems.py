"""Makers of mathematics problems: each draws numbers, works the answer out step by step, and says how to check it.

A maker computes with its own arithmetic (step by step, integers only); its checks state the problem anew as Python,
by substitution or by definition, so that a slip in the working shows.
"""

import random
from typing import NamedTuple

_NAMES = (
    "Ada",
    "Alan",
    "Amina",
    "Bo",
    "Chen",
    "Dana",
    "Emmy",
    "Fatima",
    "Grace",
    "Ivan",
    "Kofi",
    "Leila",
    "Mei",
    "Noor",
)
_THINGS = ("apples", "books", "cards", "coins", "marbles", "pencils", "shells", "stamps", "stickers", "tickets")


class Problem(NamedTuple):
    """A question, the steps to the answer, the answer, and Python expressions that are true if the answer is right."""

    question: str
    steps: list[str]
    answer: str
    checks: list[str]

    def text(self) -> str:
        """Returns the problem as it stands in a document."""
        return "\n".join([f"Question: {self.question}", *self.steps, f"Answer: {self.answer}"]) + "\n"


def _signed(value: int) -> str:
    return f"({value})" if value < 0 else str(value)


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return abs(a)


def _reduced(numerator: int, denominator: int) -> tuple[int, int]:
    divisor = _gcd(numerator, denominator) or 1
    return numerator // divisor, denominator // divisor


def _shown(numerator: int, denominator: int) -> str:
    return str(numerator) if denominator == 1 else f"{numerator}/{denominator}"


def arithmetic(rng: random.Random) -> Problem:
    """A chain of additions, subtractions and products, with brackets, evaluated one operation at a time."""
    value = rng.randint(-99, 999)
    expression, steps = _signed(value), []
    for turn in range(rng.randint(2, 4)):
        operator, other = rng.choice("+-*"), rng.randint(2, 99)
        before = value
        value = {"+": value + other, "-": value - other, "*": value * other}[operator]
        grouped = f"({expression})" if operator == "*" and turn else expression
        expression = f"{grouped} {operator} {other}"
        steps.append(f"{_signed(before)} {operator} {other} = {value}")
    return Problem(f"Compute {expression}.", steps, str(value), [f"({expression}) == {value}"])


def fractions(rng: random.Random) -> Problem:
    """Two fractions, added, subtracted, multiplied or divided, in lowest terms."""
    a, b, c, d = rng.randint(1, 40), rng.randint(2, 40), rng.randint(1, 40), rng.randint(2, 40)
    operator = rng.choice("+-*/")
    if operator in "+-":
        left, right, low = a * d, c * b, b * d
        top = left + right if operator == "+" else left - right
        steps = [f"{a}/{b} {operator} {c}/{d} = {left}/{low} {operator} {right}/{low} = {top}/{low}"]
    elif operator == "*":
        top, low = a * c, b * d
        steps = [f"{a}/{b} * {c}/{d} = ({a} * {c})/({b} * {d}) = {top}/{low}"]
    else:
        top, low = a * d, b * c
        steps = [f"({a}/{b}) / ({c}/{d}) = {a}/{b} * {d}/{c} = {top}/{low}"]
    numerator, denominator = _reduced(top, low)
    answer = _shown(numerator, denominator)
    steps.append(f"In lowest terms: {answer}")
    checks = [
        f"Fraction({a}, {b}) {operator} Fraction({c}, {d}) == Fraction({numerator}, {denominator})",
        f"gcd({numerator}, {denominator}) == 1",
    ]
    return Problem(f"Compute ({a}/{b}) {operator} ({c}/{d}) in lowest terms.", steps, answer, checks)


def equation(rng: random.Random) -> Problem:
    """A linear equation in x with x on both sides."""
    a, c = rng.sample([n for n in range(-20, 21) if n], 2)
    b, d = rng.randint(-99, 99), rng.randint(-99, 99)
    left, right = a - c, d - b
    numerator, denominator = _reduced(right, left)
    if denominator < 0:
        numerator, denominator = -numerator, -denominator
    answer = _shown(numerator, denominator)
    steps = [
        f"Bring x to the left: {a}*x - {_signed(c)}*x = {d} - {_signed(b)}",
        f"{left}*x = {right}",
        f"x = {right}/{_signed(left)} = {answer}",
    ]
    x = f"Fraction({numerator}, {denominator})"
    question = f"Solve {a}*x + {_signed(b)} = {c}*x + {_signed(d)} for x."
    return Problem(question, steps, f"x = {answer}", [f"{a}*{x} + {_signed(b)} == {c}*{x} + {_signed(d)}"])


def divisors(rng: random.Random) -> Problem:
    """Greatest common divisor by Euclid's algorithm, and least common multiple."""
    common = rng.randint(1, 30)
    a, b = sorted((common * rng.randint(2, 60), common * rng.randint(2, 60)), reverse=True)
    steps, x, y = [], a, b
    while y:
        steps.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    multiple = a // x * b
    checks = [f"{a} % {x} == 0 and {b} % {x} == 0", f"all({a} % n or {b} % n for n in range({x} + 1, {b} + 1))"]
    checks += [f"{multiple} % {a} == 0 and {multiple} % {b} == 0", f"{multiple} * gcd({a}, {b}) == {a} * {b}"]
    steps += [f"gcd = {x}", f"lcm = {a} * {b} / {x} = {multiple}"]
    question = f"Find the greatest common divisor and the least common multiple of {a} and {b}."
    return Problem(question, steps, f"gcd = {x}, lcm = {multiple}", checks)


def remainder(rng: random.Random) -> Problem:
    """A power modulo a number, by repeated squaring."""
    base, exponent, modulus = rng.randint(2, 60), rng.randint(5, 60), rng.randint(7, 99)
    result, square, steps, left = 1, base % modulus, [], exponent
    power = 1
    while left:
        steps.append(f"{base}^{power} mod {modulus} = {square}" + (", used" if left & 1 else ""))
        if left & 1:
            result = result * square % modulus
        square, left, power = square * square % modulus, left >> 1, power * 2
    steps.append(f"The product of the used powers mod {modulus} is {result}")
    question = f"What is the remainder of {base}^{exponent} divided by {modulus}?"
    return Problem(question, steps, str(result), [f"{base}**{exponent} % {modulus} == {result}"])


def percentage(rng: random.Random) -> Problem:
    """A price after a rise and a fall in per cent, exactly."""
    price, up, down = rng.randint(10, 900), rng.randint(1, 60), rng.randint(1, 60)
    middle = _reduced(price * (100 + up), 100)
    end = _reduced(middle[0] * (100 - down), middle[1] * 100)
    steps = [
        f"After the rise: {price} * {100 + up}/100 = {_shown(*middle)}",
        f"After the fall: {_shown(*middle)} * {100 - down}/100 = {_shown(*end)}",
    ]
    question = f"A price of {price} rises by {up}% and then falls by {down}%. What is it then, as a fraction?"
    check = f"{price} * (1 + Fraction({up}, 100)) * (1 - Fraction({down}, 100)) == Fraction({end[0]}, {end[1]})"
    return Problem(question, steps, _shown(*end), [check])


def sequence(rng: random.Random) -> Problem:
    """The sum of an arithmetic sequence."""
    first, step, count = rng.randint(-50, 99), rng.randint(2, 25), rng.randint(5, 40)
    last = first + (count - 1) * step
    total = (first + last) * count // 2
    steps = [
        f"Last term: {first} + {count - 1} * {step} = {last}",
        f"Sum: ({first} + {_signed(last)}) * {count} / 2 = {total}",
    ]
    question = f"Add up the first {count} terms of the sequence {first}, {first + step}, {first + 2 * step}, ..."
    return Problem(question, steps, str(total), [f"sum({first} + {step} * i for i in range({count})) == {total}"])


def word_problem(rng: random.Random) -> Problem:
    """Boxes of things, some given away, the rest shared out."""
    name = rng.choice(_NAMES)
    thing = rng.choice(_THINGS)
    boxes, each, friends = rng.randint(3, 40), rng.randint(4, 60), rng.randint(2, 9)
    total = boxes * each
    given = rng.randint(1, total - friends)
    left = total - given
    share, rest = left // friends, left % friends
    steps = [
        f"{name} starts with {boxes} * {each} = {total} {thing}.",
        f"{total} - {given} = {left} {thing} are left.",
        f"{left} = {friends} * {share} + {rest}",
    ]
    question = (
        f"{name} has {boxes} boxes with {each} {thing} in each, gives away {given} {thing} and shares the rest equally "
        f"among {friends} friends. How many does each friend get, and how many are left over?"
    )
    check = f"{share} * {friends} + {rest} + {given} == {boxes} * {each} and 0 <= {rest} < {friends}"
    return Problem(question, steps, f"{share} each, {rest} left over", [check])


def python_expression(rng: random.Random) -> Problem:
    """The value of a short Python expression over a list, from a small interpreter of our own."""
    numbers = [rng.randint(-20, 99) for _ in range(rng.randint(4, 7))]
    divisor, keep = rng.randint(2, 5), rng.randint(2, 4)
    kind = rng.randrange(4)
    if kind == 0:
        expression, value = f"sum(n for n in {numbers} if n % {divisor} == 0)", 0
        steps = []
        for n in numbers:
            if n - divisor * (n // divisor) == 0:
                value += n
                steps.append(f"{n} is a multiple of {divisor}; the sum is {value}")
        result = str(value)
    elif kind == 1:
        result = str([n * n for n in numbers[:keep]])
        expression, steps = f"[n ** 2 for n in {numbers}[:{keep}]]", [f"{numbers}[:{keep}] is {numbers[:keep]}"]
    elif kind == 2:
        ordered: list[int] = []
        for n in numbers:  # insertion sort
            place = len([m for m in ordered if m <= n])
            ordered.insert(place, n)
        expression, steps = f"sorted({numbers})[-{keep}]", [f"sorted, the list is {ordered}"]
        result = str(ordered[len(ordered) - keep])
    else:
        low, high = numbers[0], numbers[0]
        for n in numbers:
            low, high = (n if n < low else low), (n if n > high else high)
        expression, steps = f"max({numbers}) - min({numbers})", [f"max is {high}", f"min is {low}"]
        result = str(high - low)
    return Problem(f"What does the Python expression {expression} give?", steps, result, [f"{expression} == {result}"])


KINDS = (
    arithmetic,
    fractions,
    equation,
    divisors,
    remainder,
    percentage,
    sequence,
    word_problem,
    python_expression,
)
