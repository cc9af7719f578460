"""The benchmark of generation, on a model of two narrow layers."""

import json

import pytest

from benchmarks import generate


@pytest.mark.slow
def test_both_workers_take_turns():
    rows = generate.measure(["huggingface:float32", "ours:float32", "ours:bfloat16/int8"], "tiny", [1, 2], rounds=1)
    assert [(row["batch"], row["variant"]) for row in rows] == [
        (batch, name) for batch in (1, 2) for name in ("huggingface:float32", "ours:float32", "ours:bfloat16/int8")
    ]
    for row in rows:
        reference = next(r for r in rows if r["batch"] == row["batch"])
        for phase in ("prefill", "decode"):
            speed, ratio = row[f"{phase}_tokens_per_second"], row[f"{phase}_ratio_to_huggingface"]
            assert speed > 0
            assert ratio == pytest.approx(speed / reference[f"{phase}_tokens_per_second"], rel=0.05, abs=0.02)
    json.dumps(rows)
