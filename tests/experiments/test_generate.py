"""The text of generate against tokens of `inference.generate` decoded, and what its flags ask for and refuse."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from experiments import generate, loading
from experiments.answers import Writer
from experiments.display import Display
from kwaicoder_jax import checkpoints, data, inference, models
from kwaicoder_jax.errors import UserError
from tests.experiments import commands, tiny_checkpoint

NEW = 24
PROMPTS = ["def naïve(", "x", tiny_checkpoint.TEXT * 3]  # ragged: of several buckets


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return tiny_checkpoint.write(tmp_path_factory.mktemp("tiny") / "pretrain")


@pytest.fixture(scope="module")
def loaded(stage):
    return loading.load(settings(stage), "generate")


def settings(stage, **section):
    return {"seed": 0, "generate": {**generate.DEFAULTS, "init_from": str(stage), "max_new_tokens": NEW, **section}}


def answers(loaded, prompts, stream=False, end_lines=False, as_json=False, echo=False, **section):
    """What would be on standard output."""
    config = settings("", **section)
    out = io.BytesIO()
    writer = Writer(
        out, len(prompts) * config["generate"]["num_samples"], stream=stream, end_lines=end_lines, as_json=as_json
    )
    generate.run(loaded, config, prompts, writer, Display(), echo=echo)
    return out.getvalue().decode()


def expected(stage, prompts, **options):
    """The tokens of the library's one call, from parameters that are read another way."""
    config = models.ModelConfig.from_dict(checkpoints.read_meta(stage)["model"])
    params = checkpoints.read_params(stage, models.abstract(config))
    return inference.generate(params, config, prompts, max_new_tokens=NEW, stop_tokens=(0, 1, 2, 3, 4), **options)


def of(*texts):
    return [generate.Prompt(text) for text in texts]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "seed": 5}])
def test_the_text_is_the_tokens_decoded(stage, loaded, options):
    tokenizer = data.Tokenizer.from_file(stage / "tokenizer.json")
    prompts = [[tokenizer.end_of_text, *tokenizer.encode(text)] for text in PROMPTS]
    texts = [tokenizer.decode(ids) for ids in expected(stage, prompts, **options)]
    assert len({*texts}) == len(texts)
    text = answers(loaded, of(*PROMPTS), as_json=True, **options)
    assert text.endswith("}\n")
    lines = text.splitlines()
    assert [json.loads(line)["text"] for line in lines] == texts
    assert answers(loaded, of(PROMPTS[0]), **options) == texts[0]


def test_samples_are_those_of_their_ids(stage, loaded):
    prompts = [[0, *loaded.tokenizer.encode(text)] for text in PROMPTS[:2] for _ in range(2)]
    ids = expected(stage, prompts, temperature=1.0, seed=3)
    lines = [
        json.loads(line)
        for line in answers(loaded, of(*PROMPTS[:2]), as_json=True, num_samples=2, temperature=1.0, seed=3).splitlines()
    ]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [line["text"] for line in lines] == [loaded.tokenizer.decode(row) for row in ids]
    assert [line["tokens"] for line in lines] == [len(row) for row in ids]
    assert [line["finish_reason"] for line in lines] == ["length" if len(row) == NEW else "stop" for row in ids]
    assert lines[0]["text"] != lines[1]["text"]


def test_infilling_is_the_corpus_format(stage, loaded):
    prompt = data.infilling_prompt(loaded.tokenizer, "def f(", "):\n")
    (ids,) = expected(stage, [prompt])
    middle = loaded.tokenizer.decode(ids)
    assert answers(loaded, [generate.Prompt("def f(", "):\n")]) == middle
    assert answers(loaded, [generate.Prompt("def f(", "):\n")], echo=True) == f"def f({middle}):\n"
    assert loaded.infilling("a", "b") == tuple(data.infilling_prompt(loaded.tokenizer, "a", "b"))


def test_a_stop_string_ends_the_text(loaded):
    whole = answers(loaded, of("x"), temperature=1.5, seed=11)
    assert len(whole) > 6
    for stop in (whole[3:6], whole[2]):
        assert answers(loaded, of("x"), temperature=1.5, seed=11, stop=(stop, "never")) == whole[: whole.index(stop)]


def test_streams_are_in_order_and_whole_characters(loaded):
    class Pieces(io.BytesIO):
        def __init__(self):
            super().__init__()
            self.pieces = []

        def write(self, piece):
            self.pieces.append(bytes(piece))
            return super().write(piece)

    prompts = of(*PROMPTS)
    config = settings("", temperature=1.0, seed=2)
    out = Pieces()
    writer = Writer(out, 3, stream=True, end_lines=False, as_json=False)
    generate.run(loaded, config, prompts, writer, Display())
    assert out.getvalue().decode() == answers(loaded, prompts, temperature=1.0, seed=2)
    assert len(out.pieces) > 10
    for piece in out.pieces:
        piece.decode()  # no character is cut


def test_newlines_are_added_to_several_answers_only(loaded):
    one = answers(loaded, of("x"))
    assert not one.endswith("\n")
    assert answers(loaded, of("x"), end_lines=True) == one + "\n"
    assert answers(loaded, of("x"), num_samples=2) == 2 * (one + "\n")
    assert answers(loaded, of("x"), stop=(one[-1],), num_samples=2) == 2 * (one.partition(one[-1])[0] + "\n")


def test_prompts_of_flags(tmp_path, monkeypatch):
    file = tmp_path / "half.py"
    file.write_text("def f(<|cursor|>):\n")
    assert generate.read_prompts(["a", "b"]) == of("a", "b")
    assert generate.read_prompts([""]) == of("")
    assert generate.read_prompts(prefix="a", suffix="b") == [generate.Prompt("a", "b")]
    assert generate.read_prompts(suffix="b") == [generate.Prompt("", "b")]
    assert generate.read_prompts(file=str(file)) == [generate.Prompt("def f(", "):\n")]
    for flags in ({}, {"prompt": ["-"]}):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("naïve\n".encode())))
        assert generate.read_prompts(**flags) == of("naïve\n")


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"prompt": ["a"], "file": "b"}, "--prompt and --file together; give one of them"),
        ({"prefix": "a"}, "--prefix without --suffix; give both"),
        ({"prompt": ["-", "-"]}, "--prompt: standard input is named twice"),
        ({"file": "FILE"}, "FILE: the mark <|cursor|> is not in it; put it"),
        ({"file": "FILE", "cursor": "x"}, "FILE: the mark x is 2 times in it"),
        ({"file": "FILE", "cursor": ""}, "--cursor: is empty"),
        ({"file": "FOLDER"}, "FOLDER: Is a directory; name a file"),
        ({"file": "FOLDER/none"}, "FOLDER/none: No such file or directory"),
        ({"file": "BINARY"}, "BINARY: is not UTF-8 at byte 1; give it as UTF-8"),
    ],
)
def test_bad_prompts(given, error, tmp_path):
    (tmp_path / "file").write_text("xx")
    (tmp_path / "binary").write_bytes(b"a\xff")
    places = {"FILE": tmp_path / "file", "FOLDER": tmp_path, "BINARY": tmp_path / "binary"}
    for name, place in places.items():
        given = {key: x.replace(name, str(place)) if isinstance(x, str) else x for key, x in given.items()}
        error = error.replace(name, str(place))
    with pytest.raises(UserError) as caught:
        generate.read_prompts(**given)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"form": "int3"}, "generate.form (--form): no choice 'int3'; use float, int8"),
        ({"dtype": "int3"}, "--dtype: no dtype 'int3'"),
        ({"begin": "<s>"}, "generate.begin (--begin): the tokenizer has no special token '<s>'; use auto, none"),
        ({"fim_order": "pms"}, "generate.fim_order (--fim_order): no choice 'pms'"),
        ({"init_from": None}, "--checkpoint: is required"),
        ({"init_from": "/nowhere"}, "/nowhere does not exist"),
    ],
)
def test_bad_models(section, error, stage):
    with pytest.raises(UserError) as caught:
        loading.load(settings(stage, **{"init_from": str(stage), **section}), "generate")
    assert str(caught.value).startswith(error), caught.value
    assert ";" in str(caught.value)


def test_bytes_that_are_no_text_are_refused(loaded):
    for ask in (lambda: loaded.prompt("a\udcff", "--prompt"), lambda: loaded.infilling("a", "\ud800", "--prompt")):
        with pytest.raises(UserError, match=r"^--prompt: is not UTF-8 at character"):
            ask()


def test_where_the_model_is(stage, loaded, tmp_path):
    """By the name of a stage, or the last one of the work folder."""
    (tmp_path / "prune").symlink_to(stage)
    (tmp_path / "distill").mkdir()
    for section in ({"init_from": "prune"}, {"init_from": None}):
        found = loading.load(settings("", **section), "generate", tmp_path)
        assert (found.name, found.config) == ("prune", loaded.config)


def complaints(errors):
    """Standard error without the progress that a busy machine's slow answer shows."""
    return re.sub(rb"generate: \d+/\d+ tokens\n", b"", errors)


def test_the_command(stage, tmp_path):
    """In a process: the text alone on standard output; a reader who leaves; a wrong flag."""
    start = [sys.executable, "-m", "experiments.generate", f"--checkpoint={stage}", f"--max_new_tokens={NEW}"]
    options = {"cwd": commands.ROOT, "env": commands.environment(), "stderr": subprocess.PIPE}
    done = subprocess.run([*start, "-"], input=b"x", stdout=subprocess.PIPE, timeout=300, **options)
    tokenizer = data.Tokenizer.from_file(stage / "tokenizer.json")
    (ids,) = expected(stage, [[0, *tokenizer.encode("x")]])
    assert (done.returncode, done.stdout.decode(), complaints(done.stderr)) == (0, tokenizer.decode(ids), b"")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*start, "--prompt=x"], stdout=writer, timeout=300, **options)
    assert (done.returncode, complaints(done.stderr)) == (0, b"")
    done = subprocess.run([*start, "--prompt=x", "--temperature=-1"], stdout=subprocess.PIPE, timeout=300, **options)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == "error: generate.temperature: -1.0 is out of range; use 0 or more\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_it_is_stopped_quietly(stage, number, status):
    command = [sys.executable, "-m", "experiments.generate", f"--checkpoint={stage}", "--max_new_tokens=1000000"]
    process = subprocess.Popen(
        [*command, "--prompt=x", "--stream", "--stop=never"], cwd=commands.ROOT, env=commands.environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.read(8)
    time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (status, b"")


def test_a_single_answer_that_does_not_stream_shows_its_progress_if_it_takes_long(loaded, capsys, monkeypatch):
    answers(loaded, of("x"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("experiments.display.LINE_SECONDS", 0.0)
    answers(loaded, of("x"))
    assert f"{NEW}/{NEW} tokens" in capsys.readouterr().err
    answers(loaded, of("x"), stream=True)
    assert capsys.readouterr().err == ""


def test_more_tokens_than_the_model_was_trained_for_are_said(loaded, capsys):
    short = dataclasses.replace(loaded, config=loaded.config.replace(max_length=NEW))
    answers(short, of("xyz"), stream=True)
    assert f"are more than the {NEW} that the model was trained for" in capsys.readouterr().err
