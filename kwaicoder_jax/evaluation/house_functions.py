"""A small benchmark written for this repository: functions from one token to a dozen lines, for models of any size.

Ordered from easy to hard. None of the texts is taken from a published benchmark. Prompts end as written, white space
included: those that end in a line break want an indented body.
"""

from collections.abc import Sequence

from kwaicoder_jax.evaluation.benchmarks import TOP_LEVEL_STOPS, Task

# In a class the next method or decorator is the end too.
METHOD_STOPS = (*TOP_LEVEL_STOPS, "\n    def ", "\n    @")


def _task(name: str, prompt: str, solution: str, tests: str, stops: tuple[str, ...] = TOP_LEVEL_STOPS) -> Task:
    return Task(f"house/{name}", prompt, solution, tests, stops)


_TASKS = (
    _task("add", "def add(a, b):\n    return a +", " b\n", "assert add(2, 5) == 7\nassert add(-3, 1) == -2\n"),
    _task(
        "subtract",
        "def subtract(a, b):\n    return a",
        " - b\n",
        "assert subtract(9, 4) == 5\nassert subtract(1, 4) == -3\n",
    ),
    _task(
        "len_method",
        "class Box:\n    def __init__(self, items):\n        self.items = items\n\n"
        "    def __len__(self):\n        return len(",
        "self.items)\n",
        "assert len(Box([])) == 0\nassert len(Box(['a', 'b'])) == 2\n",
        METHOD_STOPS,
    ),
    _task(
        "getter",
        "class Person:\n    def __init__(self, name, age):\n        self.name = name\n        self.age = age\n\n"
        "    def get_name(self):\n        return self.name\n\n    def get_age(self):\n        return",
        " self.age\n",
        "assert Person('Ada', 36).get_age() == 36\nassert Person('Bob', 1).get_age() == 1\n",
        METHOD_STOPS,
    ),
    _task(
        "is_empty",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
        "        self.items.append(item)\n\n    def is_empty(self):\n",
        "        return len(self.items) == 0\n",
        "s = Stack()\nassert s.is_empty() is True\ns.push(0)\nassert s.is_empty() is False\n",
        METHOD_STOPS,
    ),
    _task(
        "first",
        'def first(items):\n    """Return the first element of the list."""\n    return',
        " items[0]\n",
        "assert first([3, 1, 2]) == 3\nassert first(['x']) == 'x'\n",
    ),
    _task(
        "last",
        'def last(items):\n    """Return the last element of the list."""\n',
        "    return items[-1]\n",
        "assert last([3, 1, 2]) == 2\nassert last(['x']) == 'x'\n",
    ),
    _task(
        "is_even",
        'def is_even(n):\n    """Return True if n is even."""\n',
        "    return n % 2 == 0\n",
        "assert [bool(is_even(n)) for n in (-2, -1, 0, 1, 2, 7)] == [True, False, True, False, True, False]\n",
    ),
    _task(
        "larger",
        'def larger(a, b):\n    """Return the larger of two numbers."""\n    if a > b:\n        return a\n',
        "    return b\n",
        "assert larger(1, 2) == 2\nassert larger(5, -5) == 5\nassert larger(4, 4) == 4\n",
    ),
    _task(
        "square_all",
        'def square_all(numbers):\n    """Return a list with the square of every number."""\n',
        "    return [number * number for number in numbers]\n",
        "assert square_all([]) == []\nassert square_all([1, -2, 3]) == [1, 4, 9]\n",
    ),
    _task(
        "total",
        'def total(prices):\n    """Return the sum of all prices."""\n    result = 0\n    for price in prices:\n',
        "        result += price\n    return result\n",
        "assert total([]) == 0\nassert total([5, 7, 1]) == 13\n",
    ),
    _task(
        "backwards",
        'def backwards(text):\n    """Return the text from its end to its beginning."""\n',
        "    return text[::-1]\n",
        "assert backwards('') == ''\nassert backwards('stone') == 'enots'\n",
    ),
    _task(
        "count_words",
        'def count_words(text):\n    """Return how many words the text has. Words are separated by white space."""\n',
        "    return len(text.split())\n",
        "assert count_words('') == 0\nassert count_words('  one  two\\nthree ') == 3\n",
    ),
    _task(
        "clamp",
        'def clamp(value, low, high):\n    """Limit value to the range from low to high, both included."""\n',
        "    return max(low, min(value, high))\n",
        "assert clamp(5, 0, 3) == 3\nassert clamp(-5, 0, 3) == 0\nassert clamp(2, 0, 3) == 2\n",
    ),
    _task(
        "same_backwards",
        "def same_backwards(text):\n"
        '    """Tell whether the letters of text read the same from both ends, ignoring case and anything else."""\n',
        "    letters = [c.lower() for c in text if c.isalpha()]\n    return letters == letters[::-1]\n",
        "assert same_backwards('Never odd, or even!')\nassert same_backwards('')\nassert not same_backwards('ab')\n"
        "assert same_backwards('x1x2')\n",
    ),
    _task(
        "greatest_common_divisor",
        "def greatest_common_divisor(a, b):\n"
        '    """Return the largest integer that divides both a and b, which are not negative and not both 0."""\n',
        "    while b:\n        a, b = b, a % b\n    return a\n",
        "assert greatest_common_divisor(84, 30) == 6\nassert greatest_common_divisor(0, 9) == 9\n"
        "assert greatest_common_divisor(17, 4) == 1\nassert greatest_common_divisor(10**18, 2**20) == 2**18\n",
    ),
    _task(
        "fizz_buzz",
        "def fizz_buzz(n):\n"
        '    """Return the list for 1 to n of "Fizz" for multiples of 3, "Buzz" for multiples of 5,\n'
        '    "FizzBuzz" for multiples of both, and else the number as a string.\n    """\n',
        '    result = []\n    for i in range(1, n + 1):\n        word = "Fizz" * (i % 3 == 0) + "Buzz" * (i % 5 == 0)\n'
        "        result.append(word or str(i))\n    return result\n",
        "assert fizz_buzz(0) == []\nassert fizz_buzz(5) == ['1', '2', 'Fizz', '4', 'Buzz']\n"
        "assert fizz_buzz(30)[14] == fizz_buzz(30)[29] == 'FizzBuzz'\nassert fizz_buzz(15).count('Fizz') == 4\n",
    ),
    _task(
        "running_maximum",
        "def running_maximum(numbers):\n"
        '    """Return a list whose element i is the largest of numbers[0] ... numbers[i].\n\n'
        '    >>> running_maximum([2, 5, 1])\n    [2, 5, 5]\n    """\n',
        "    result = []\n    for number in numbers:\n"
        "        result.append(max(result[-1], number) if result else number)\n    return result\n",
        "assert running_maximum([]) == []\nassert running_maximum([-3, -4, -1, -2]) == [-3, -3, -1, -1]\n"
        "assert running_maximum([2, 5, 1]) == [2, 5, 5]\n",
    ),
    _task(
        "count_letters",
        "def count_letters(text):\n"
        '    """Return a dictionary from each character of text to the number of its occurrences."""\n',
        "    counts = {}\n    for letter in text:\n"
        "        counts[letter] = counts.get(letter, 0) + 1\n    return counts\n",
        "assert count_letters('') == {}\nassert count_letters('banana') == {'b': 1, 'a': 3, 'n': 2}\n",
    ),
    _task(
        "primes_below",
        'def primes_below(limit):\n    """Return all prime numbers smaller than limit, in increasing order."""\n',
        "    primes = []\n    for n in range(2, limit):\n        if all(n % p for p in primes):\n"
        "            primes.append(n)\n    return primes\n",
        "assert primes_below(2) == []\nassert primes_below(3) == [2]\n"
        "assert primes_below(30) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]\n",
    ),
    _task(
        "encode_runs",
        "def encode_runs(text):\n"
        '    """Shorten text by writing each run of one character as the character and the run\'s length.\n\n'
        "    >>> encode_runs('aaab')\n    'a3b1'\n"
        '    """\n',
        "    result = ''\n    i = 0\n    while i < len(text):\n        j = i\n"
        "        while j < len(text) and text[j] == text[i]:\n            j += 1\n"
        "        result += text[i] + str(j - i)\n        i = j\n    return result\n",
        "assert encode_runs('') == ''\nassert encode_runs('aaab') == 'a3b1'\nassert encode_runs('abba') == 'a1b2a1'\n"
        "assert encode_runs('z' * 12) == 'z12'\n",
    ),
    _task(
        "join_intervals",
        "def join_intervals(intervals):\n"
        '    """Join intervals (start, end) that overlap or touch.\n\n'
        "    Return a list of (start, end) tuples in increasing order. The input may be in any order.\n"
        '    """\n',
        "    result = []\n    for start, end in sorted(intervals):\n        if result and start <= result[-1][1]:\n"
        "            result[-1] = (result[-1][0], max(result[-1][1], end))\n        else:\n"
        "            result.append((start, end))\n    return result\n",
        "assert join_intervals([]) == []\nassert join_intervals([(5, 6), (1, 3), (2, 4)]) == [(1, 4), (5, 6)]\n"
        "assert join_intervals([(1, 9), (2, 3)]) == [(1, 9)]\nassert join_intervals([(1, 2), (2, 3)]) == [(1, 3)]\n",
    ),
    _task(
        "balanced",
        "def balanced(text):\n"
        '    """Tell whether every bracket of text, one of ()[]{}, is closed by its own kind in the right order."""\n',
        "    pairs = {')': '(', ']': '[', '}': '{'}\n    open_brackets = []\n    for letter in text:\n"
        "        if letter in '([{':\n            open_brackets.append(letter)\n        elif letter in pairs:\n"
        "            if not open_brackets or open_brackets.pop() != pairs[letter]:\n                return False\n"
        "    return not open_brackets\n",
        "assert balanced('') and balanced('f(a[1], {x: (2)})')\n"
        "assert not balanced('(') and not balanced(')(') and not balanced('([)]')\n",
    ),
    _task(
        "flatten",
        "def flatten(value):\n"
        '    """Return the elements of a list of lists of any depth as one list.\n\n'
        '    >>> flatten([1, [2, [3]], []])\n    [1, 2, 3]\n    """\n',
        "    result = []\n    for element in value:\n        if isinstance(element, list):\n"
        "            result.extend(flatten(element))\n        else:\n"
        "            result.append(element)\n    return result\n",
        "assert flatten([]) == []\nassert flatten([1, [2, [3]], []]) == [1, 2, 3]\n"
        "assert flatten([[[['ab']]], 4]) == ['ab', 4]\n",
    ),
)


class HouseFunctions:
    """The benchmark `house_functions`."""

    name = "house_functions"

    def tasks(self) -> Sequence[Task]:
        """All 24, from easy to hard."""
        return _TASKS

    def program(self, task: Task, completion: str) -> str:
        """Prompt, completion and tests, one after another."""
        return f"{task.prompt}{completion}\n\n{task.tests}"
