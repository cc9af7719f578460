"""Every number against plain Python over characters, on real files and on odd texts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax.data.cleaning import comments, encoded, measure
from tests.kwaicoder_jax.data.cleaning import slow_statistics as slow

ODD = [
    "",
    "\n",
    "a",
    " ",
    "\n\n\n",
    "日本語のテスト abc 漢字1",
    "naïve café\n",
    "😀 😀 😀\n",
    "a\u2028b\x85c\n",
    "１２３ ٣٤\n",
]


def assert_same(text, language=""):
    measured = measure(text, language, parse=False)
    for name, value in slow.plain(text).items():
        assert getattr(measured, name) == pytest.approx(value, rel=1e-12, nan_ok=True), (name, text[:80])


def test_on_real_files(library):
    for text in list(library.values())[::6]:
        assert_same(text, "python")


@pytest.mark.parametrize("text", ODD)
def test_on_odd_texts(text):
    assert_same(text)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab1 \n_.漢é\t\"'#x", max_size=80))
def test_on_any_text(text):
    assert_same(text, "python")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["x", "yy", "zzz", "w"]), max_size=60))
def test_repetitions_of_few_words(tokens):
    assert_same(" ".join(tokens))


def test_comments_and_strings_as_pythons_tokeniser_has_them(library):
    for path, text in library.items():
        spans = comments.spans(text, "python")
        assert (spans.comments(), spans.strings()) == slow.python_comments(text), path


@pytest.mark.parametrize(
    ("language", "text", "said", "quoted"),
    [
        (
            "c",
            'int a; // one "x"\nchar *b = "no // comment"; /* two\n lines */\n',
            '// one "x"|/* two\n lines */',
            None,
        ),
        ("c", "char q = '\"'; int x; // real\n", "// real", "'\"'"),
        ("javascript", "let a = `x // ${b}\n y`; // z\n", "// z", "`x // ${b}\n y`"),
        ("rust", "fn f<'a>(x: &'a str) -> char { '\"' } // end\n", "// end", "'\"'"),
        ("shell", "echo ${#x} a#b # real 'one\n", "# real 'one", None),
        ("sql", "SELECT 'it''s -- no' -- yes\n", "-- yes", "'it'|'s -- no'"),
        ("lua", "--[[ a\nb ]] x = 'q' -- c\n", "--[[ a\nb ]]|-- c", "'q'"),
        ("html", "<p>'a'</p><!-- b - -- c -->d", "<!-- b - -- c -->", ""),
        ("tex", "50\\% of % all\n", "% all", ""),
        ("json", '{"a": "b // c"}', "", '"a"|"b // c"'),
        ("c", 'x = "not closed\n// y\n/* to the end', "// y|/* to the end", '"not closed'),
        ("python", "b'''no docstring'''\n", "", "'''no docstring'''"),
        ("python", "x = '''a\n# b'''  # c\n\"\"\"doc\"\"\"\n", '# c|"""doc"""', "'''a\n# b'''"),
    ],
)
def test_spans_by_language(language, text, said, quoted):
    found = comments.spans(text, language)
    assert "|".join(text[a:b] for a, b in zip(found.comment_starts, found.comment_ends)) == said
    if quoted is not None:
        assert "|".join(text[a:b] for a, b in zip(found.string_starts, found.string_ends)) == quoted


@pytest.mark.parametrize(
    "piece", ["/*", '"', "'", '"""', "\\", "`", "<!--", "--[[", "'\\", '"\\', "#", "{-", '""', "a"]
)
def test_no_text_takes_more_than_one_pass(piece):
    """A quadratic expression would take many minutes."""
    text = piece * (500_000 // len(piece))
    for language in ("python", "c", "javascript", "rust", "lua", "html", "haskell"):
        comments.spans(text, language)


def test_long_words_and_strings():
    text = 'a = "' + "x" * 30 + ' short"\nb = "https://example.com/' + "y" * 30 + '"\n'
    assert measure(text, "python", parse=False).long_words == pytest.approx(30 / len(text))
    sentence = " ".join(["word"] * 21)
    text = f'x = f("""{sentence}\n{sentence}\nfew words""")\ny = 1\n'
    assert measure(text, "python", parse=False).long_strings == pytest.approx(2 / 4)


def test_first_words_of_lines():
    text = (
        "import a\nfrom b import c\nimportant = 1\n    pass\npassword = 2\nprint(x)\nblueprint = 3\n"
        "self.assertEqual(a, b)\nassertive(c)\nassert d\nreassert()\nconsole.log(x)\nSystem.out.println(y)\n\n  \n"
        "fmt.Printf(z)\ny1\nprintf(q)\nstd::cout << r\n#define A\n# comment\n#\n(((\n"
    )
    measured, total = measure(text, parse=False), 21
    assert measured.imports == 2 / total
    assert measured.passes == 1 / total
    assert measured.asserts == 3 / total
    assert measured.prints == 6 / total
    assert measured.directives == 2 / total


def test_todos_are_words_in_comments():
    text = "x = 'TODO'\n# TODO: a\n# autodoc todoist mastodon\n# FIXME b\ny = 1  # your code here\n"
    assert measure(text, "python", parse=False).todos == pytest.approx(3 / 5)
    assert math.isnan(measure(text, "", parse=False).todos)


def test_encoded_data():
    rng = np.random.default_rng(0)
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"))
    rows = ["".join(rng.choice(letters, 76)) for _ in range(20)]
    data = "x = (\n" + "\n".join(f'    b"{row}"' for row in rows) + "\n)\n"
    for text in (data, data + "é"):
        measured = measure(text, "python", parse=False)
        assert measured.encoded_run == 20 * 76, "over line breaks, quotes and b"
        assert measured.encoded == pytest.approx(20 * 76 / len(text))
    apart = "\n".join(f"{name} = 'sha256:{row[:64]}'" for name, row in zip(map("name{}".format, range(20)), rows))
    assert measure(apart, "python", parse=False).encoded_run == 64


@pytest.mark.parametrize(
    "text", ["/usr/lib/python/" * 20, "_" * 500, "=" * 500, "1234567890" * 20, "averylongname" * 10, "A" * 100]
)
def test_what_is_not_encoded(text):
    assert measure(text, parse=False).encoded_run == 0


def test_escapes():
    text = r"a = '\x1f\u00e9\U0001F600\n'"
    assert measure(text, parse=False).escapes == pytest.approx(20 / len(text))
    assert encoded.escaped(np.zeros(0, np.uint8)) == 0
