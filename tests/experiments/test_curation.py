"""prepare_data over places, as a command: what it writes, what it refuses, and a second run that does nothing."""

import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from experiments import curation
from kwaicoder_jax import data
from tests.experiments import commands

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CONFIG = "configs/curate.py"


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    root = tmp_path_factory.mktemp("code")
    for folder in ("email", "json", "logging"):
        shutil.copytree(STANDARD_LIBRARY / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "json" / "twice.py").write_text((root / "json" / "decoder.py").read_text())
    (root / "json" / "short.py").write_text("x = 1\n")
    return root


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    prompt = (STANDARD_LIBRARY / "json" / "scanner.py").read_text()[500:1500]
    (folder / "own.jsonl").write_text(json.dumps({"task_id": "Own/0", "prompt": prompt}) + "\n")
    return folder


def arguments(code, benchmarks, *more):
    section = "--config.prepare_data"
    return (
        f"{section}.places.code.path={code}", f"{section}.decontamination.folder={benchmarks}", f"{section}.engine.workers=0",
        f"{section}.vocab_size=600", f"{section}.valid_fraction=0.2", *more,
    )  # fmt: skip


def test_a_corpus_of_a_folder(tmp_path, code, benchmarks):
    given = arguments(code, benchmarks)
    commands.run("prepare_data", tmp_path, *given, config=CONFIG)
    folder = tmp_path / "prepare_data"
    found = commands.summary(folder)
    counts = [found[f"documents_{name}"] for name in ("read", "clean", "unique", "uncontaminated", "in")]
    assert counts[0] > counts[1] > counts[2] > counts[3] == counts[4] > 10
    assert counts[1] - counts[2] == counts[2] - counts[3] == 1, "the copy, and scanner.py"
    corpus = data.Corpus.open(folder / "corpus")
    texts = [text for split in ("train", "valid") for text in corpus.documents("code", split)]
    assert len(texts) == counts[4]
    assert not any("NUMBER_RE = re.compile" in text for text in texts)
    page = (folder / "report.html").read_text()
    assert "own.jsonl: Own/0" in page
    assert str(code) not in page + (folder / "curation.json").read_text(), "a page says nothing about the machine"
    before = (folder / "summary.json").read_bytes()
    commands.run("prepare_data", tmp_path, *given, config=CONFIG)
    assert (folder / "summary.json").read_bytes() == before


def test_what_was_read_is_not_lost_with_a_refused_field_and_not_done_again_after_a_restart(tmp_path, code, benchmarks):
    fraction = "--config.prepare_data.valid_fraction="
    given = [each for each in arguments(code, benchmarks) if not each.startswith(fraction)]
    output = commands.run("prepare_data", tmp_path, *given, f"{fraction}0.000001", status=2, config=CONFIG)
    assert "error: prepare_data.places.code: gave no valid document" in output
    assert "prepare_data.valid_fraction" in output

    def written():
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}

    before = written()
    assert len(before) > 10
    commands.run("prepare_data", tmp_path, *given, f"{fraction}0.2", config=CONFIG)
    commands.run("prepare_data", tmp_path, *given, f"{fraction}0.3", "--restart", config=CONFIG)
    assert written() == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--config.prepare_data.places.code.kind=ftp", "'ftp' is not a kind of place"),
        ("--config.prepare_data.engine.kind=ray", "'ray' is no engine"),
        ("--config.prepare_data.engine.workers=-1", "prepare_data.engine.workers"),
        ("--config.prepare_data.deduplication.threshold=high", "threshold"),
        (
            "--config.prepare_data.quality.labels=nowhere.jsonl",
            "prepare_data.quality.labels: nowhere.jsonl: cannot be read",
        ),
        (
            "--config.prepare_data.deduplication.permutations=0",
            "prepare_data.deduplication.permutations: 0 is out of range",
        ),
        (
            "--config.prepare_data.decontamination.folder=nowhere",
            "prepare_data.decontamination.folder: nowhere: is not a folder",
        ),
        ("--config.prepare_data.places.code.path=configs/curate.py", "configs/curate.py: is not a folder"),
        ("--config.prepare_data.places.code.path=nowhere", "nowhere: does not exist"),
    ],
)
def test_what_is_refused(tmp_path, code, benchmarks, more, words):
    output = commands.run("prepare_data", tmp_path, *arguments(code, benchmarks, more), status=2, config=CONFIG)
    assert output.startswith("error: ")
    assert output.count("\n") == 1, output
    assert words in output


def test_lists_of_a_config_become_what_the_settings_have():
    found, _ = curation.settings({"reading": {"licences": ["MIT"], "languages": ["python"]}})
    assert found.options.licences == frozenset({"MIT"})
    assert found.options.languages == ("python",)
