"""metrics.jsonl: valid JSON, cut where training goes on, whole lines only."""

import json
import sys

import numpy as np
import pytest

from kwaicoder_jax.training import TIME_KEYS, MetricsLog, read_metrics


def log(folder, restored, *records):
    writer = MetricsLog(folder, restored)
    for record in records:
        writer.write(record)
    writer.close()


def strict(line):
    """Parses as the JSON standard does: NaN and Infinity are not numbers."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(line, parse_constant=refuse)


def test_records_come_back_as_plain_numbers(tmp_path):
    share = np.asarray([[0.25, 0.75], [0.5, 0.5]], np.float32)
    log(tmp_path, None, {"step": 1, "loss": np.float32(0.1), "expert_load": share, "by": {"a": np.float64(0.3)}})
    expected = {"step": 1, "loss": float(np.float32(0.1)), "expert_load": share.tolist(), "by": {"a": 0.3}}
    assert read_metrics(tmp_path / "metrics.jsonl") == [expected]


def test_floats_survive_every_cut_to_the_bit(tmp_path):
    values = np.random.default_rng(0).standard_normal(50).tolist()
    log(tmp_path, None, *({"step": i, "loss": x} for i, x in enumerate(values)))
    for _ in range(3):
        log(tmp_path, 49)
    assert [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")] == values


def test_going_on_drops_what_lies_after_the_restored_step(tmp_path):
    log(tmp_path, None, *({"step": step, "loss": 1.0} for step in (0, 1, 5, 5, 6, 10)))
    log(tmp_path, 5, {"step": 6, "loss": 2.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (0, 1.0), (1, 1.0), (5, 1.0), (5, 1.0), (6, 2.0)
    ]  # fmt: skip


def test_the_writer_of_events_does_not_bring_pytorch_along(tmp_path, monkeypatch):
    """That would be a second of every command's start."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    log(tmp_path, None, {"step": 1, "loss": 1.0})
    assert "torch" not in sys.modules
    assert any((tmp_path / "events").iterdir())


def test_a_fresh_start_drops_everything(tmp_path):
    log(tmp_path, None, {"step": 3, "loss": 1.0})
    log(tmp_path, None, {"step": 0, "loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 2.0}]


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_last_line_that_was_cut_anywhere_is_left_out_and_removed(tmp_path, cut):
    log(tmp_path, None, {"step": 1, "loss": 1.5})
    file = tmp_path / "metrics.jsonl"
    line = '{"step": 2, "loss": 12}\n'
    with file.open("a") as out:
        out.write(line[:cut])
    assert [record["step"] for record in read_metrics(file)] == [1]
    log(tmp_path, 2, {"step": 2, "loss": 0.5})
    assert [strict(text) for text in file.read_text().splitlines()] == [
        {"step": 1, "loss": 1.5}, {"step": 2, "loss": 0.5}
    ]  # fmt: skip


def test_numbers_that_json_lacks_are_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    record = {"step": 1, "loss": nan, "norm": np.float32(inf), "loads": np.asarray([1, nan]), "by": {"a": -inf, "b": 1}}
    log(tmp_path, None, record)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    expected = {"step": 1, "loss": None, "norm": None, "loads": [1.0, None], "by": {"a": None, "b": 1}}
    assert strict(line) == expected
    log(tmp_path, 1)
    assert read_metrics(tmp_path / "metrics.jsonl") == [expected]


def test_a_file_that_is_not_there_holds_no_records(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert TIME_KEYS == ("seconds", "tokens_per_second", "tokens_per_second_per_chip", "mfu")
