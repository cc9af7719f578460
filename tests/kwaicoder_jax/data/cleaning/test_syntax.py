"""Good files have almost no errors; broken ones, and texts of another language, have many."""

import ast
import math

import pytest

from kwaicoder_jax.data.cleaning import syntax

C = "int add(int first, int second) {\n    return first + second;\n}\n\nstruct point { int x, y; };\n"
PROSE = "The quick brown fox, it is said, jumps over the lazy dog; and then (why?) it goes on: to the river.\n" * 5


def test_real_files_have_no_errors(library):
    for path, text in library.items():
        ast.parse(text)
        assert syntax.check(text, "python") == (0.0, 0), path


def test_broken_python(library):
    for text in list(library.values())[:40]:
        worse = text.replace(":\n", "\n").replace("(", "{")
        if worse.count("{") > 5:
            assert syntax.check(worse, "python").share > 0.1


@pytest.mark.parametrize("language", ["python", "c", "cpp", "java", "javascript", "go", "rust"])
def test_prose_is_no_code(language):
    assert syntax.check(PROSE, language).share > 0.1


def test_whole_statements_in_an_error_count_as_understood():
    text = C * 20 + "MACRO_WITHOUT_SENSE(int, {\n" + C * 20
    assert 0 < syntax.check(text, "c").share < 0.2
    assert syntax.check(C, "c").share == 0.0


def test_comments_in_an_error_and_missing_signs():
    commented = "FT_BEGIN_HEADER\n\n/* " + "what it does " * 100 + "*/\nFT_EXPORT( int )\nadd(int a);\nFT_END_HEADER(\n"
    assert 0 < syntax.check(commented, "c").share < 0.1
    assert syntax.check("int x = 1", "c").share == 1 / 9


def test_python_2():
    text = 'x = """\nprint the manual\n"""\nprint(x)\nprint = 2\n'
    assert syntax.check(text, "python") == (0.0, 0)
    assert syntax.check('print "a"\nprint x, y\nexec "code"\n', "python").python_2 == 3


def test_unknown_languages_are_not_judged():
    for language in ("", "fortran", "no such"):
        assert math.isnan(syntax.check("((((", language).share)
    assert not syntax.known("fortran")


@pytest.mark.parametrize("piece", ["(", "[", "{", "if x:\n ", "a.", "-", "f(", "\\", "x" * 50, "é", "lambda: ", "\x00"])
def test_deep_nesting_does_no_harm(piece):
    for language in ("python", "c", "javascript"):  # a query for errors took 40 s over 200 kB of "("
        share = syntax.check(piece * (100_000 // len(piece)), language).share
        assert math.isnan(share) or 0 <= share <= 1


@pytest.mark.parametrize(("language", "piece"), [("javascript", "2a00::1 "), ("c", "2a00::1 "), ("shell", "\x00")])
def test_texts_that_take_quadratic_time_are_given_up(language, piece):
    """200 kB of these took minutes; the count of steps bounds them, and the next text is parsed as ever."""
    assert syntax.check(piece * (200_000 // len(piece)), language).share == 1.0
    assert syntax.check("a = 1\n" if language != "c" else C, language).share == 0.0
