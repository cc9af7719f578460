"""The stage on whole documents: all rules, counts, settings, processes."""

import pickle
import subprocess
import sys

import pytest

from kwaicoder_jax.data.cleaning import Cleaner
from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.errors import UserError


def document(text, **fields):
    return Document("s", "a", text, **({"language": "python", "path": "a.py", "licence": "MIT"} | fields))


def test_good_code_is_kept_as_it_is(library):
    cleaner = Cleaner(headers="keep", emails=False, addresses=False, secrets=False)
    verdicts = {path: cleaner(document(text, path=path)) for path, text in library.items()}
    assert all(verdict.document.text == library[path] for path, verdict in verdicts.items())
    dropped = {path: verdict.broken for path, verdict in verdicts.items() if verdict.broken}
    assert len(dropped) < 0.2 * len(library), dropped
    for path in ("argparse.py", "json/decoder.py", "heapq.py", "typing.py", "dataclasses.py", "shutil.py"):
        assert path not in dropped, dropped[path]


def test_all_the_broken_rules_are_named():
    verdict = Cleaner()(document("x\n", path="a_pb2.py"))
    assert verdict.broken == (
        "few_words",
        "few_characters",
        "few_lines",
        "mean_line_short",
        "mean_word_short",
        "generated",
    )
    assert set(verdict.broken) <= set(Cleaner().rule_names())


def test_text_and_counts(library):
    text = "# Copyright 2020 me\n\n" + library["heapq.py"] + "\n# jane@corp.com\n"
    verdict = Cleaner()(document(text))
    assert verdict.broken == ()
    assert verdict.counts == {"banner": 1, "email": 1}
    assert "corp" not in verdict.document.text
    assert "Copyright" not in verdict.document.text
    assert verdict.document.path == "a.py"
    assert Cleaner()(verdict.document) == (verdict.document, (), {})


def test_languages_without_grammar_are_counted(library):
    verdict = Cleaner()(document(library["heapq.py"], language="fortran"))
    assert verdict.counts["not_parsed"] == 1


def test_too_large_is_not_looked_at():
    cleaner = Cleaner(max_bytes=100)
    assert cleaner(document("é" * 51)).broken == ("too_large",)
    assert cleaner(document("x" * 101)) == (document("x" * 101), ("too_large",), {})
    assert "too_large" not in cleaner(document("é" * 50)).broken


def test_config():
    cleaner = Cleaner.from_config({"headers": "keep", "syntax": False, "rules": {"digits": {"at_most": 0.3}}})
    assert (cleaner.headers, cleaner.syntax) == ("keep", False)
    assert next(rule for rule in cleaner.rules if rule.name == "digits").at_most == 0.3
    assert Cleaner.from_config({}) == Cleaner()


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"header": "keep"}, "prepare_data.cleaning"),
        ({"headers": "drop"}, "prepare_data.cleaning.headers"),
        ({"syntax": 1}, "prepare_data.cleaning.syntax"),
        ({"max_bytes": 0}, "prepare_data.cleaning.max_bytes"),
        ({"max_bytes": 10**9}, "prepare_data.cleaning.max_bytes"),
        ({"rules": ["digits"]}, "prepare_data.cleaning.rules"),
        ({"rules": {"nothing": None}}, "prepare_data.cleaning.rules.nothing"),
    ],
)
def test_mistakes_name_the_field(config, where):
    with pytest.raises(UserError) as caught:
        Cleaner.from_config(config)
    assert caught.value.where == where


def test_another_process_gives_the_same(library):
    documents = [document(text, path=path) for path, text in list(library.items())[:10]]
    code = (
        "import pickle, sys; c, d = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(pickle.dumps([*map(c, d)]))"
    )
    raw = pickle.dumps((Cleaner(), documents))
    done = subprocess.run([sys.executable, "-c", code], input=raw, stdout=subprocess.PIPE, check=True)
    assert pickle.loads(done.stdout) == [Cleaner()(each) for each in documents]


@pytest.mark.parametrize(
    "text",
    ["", "\n", "\x00" * 1000, "\ufffd" * 100, "\U0010ffff" * 50, "a" * 10**6, "\n" * 10**5, "é\n" * 10**5, "'" * 10**5],
)
def test_odd_documents_do_no_harm(text):
    for language in ("python", "c", "json", ""):
        assert Cleaner()(document(text, language=language)).broken
