"""The search of tiles: what it tries, what it keeps, and the command on one small product."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

from benchmarks import tune_kernels
from benchmarks.tune_kernels import Case
from kernels.grouped_matmul import tpu_tiles, tpu_tuned

V5E, V5P = tpu_tiles.chip_called("v5e"), tpu_tiles.chip_called("v5p")


@pytest.mark.parametrize("product", tpu_tuned.PRODUCTS)
def test_what_is_tried_fits(product):
    case = Case(product, 64, (2048, 1408), 32_768)
    depth, width, itemsize = case.shape[2:]
    assert (depth, width) == ((1408, 2048) if product == "dlhs" else (2048, 1408))
    rule = case.rule(V5P)
    tried = list(tune_kernels.neighbours(case, rule, V5P))
    assert len(set(tried)) == len(tried) > 4
    for tiles in tried:
        assert tiles != rule
        assert tiles.problem(depth, width, itemsize, V5P) is None


def test_the_search_goes_on_from_what_was_fastest():
    """To the least of a sum of distances, several steps away from where it begins; the rule's tiles stay first."""
    case = Case("drhs", 8, (2048, 1024), 8192)
    rule = case.rule(V5E)
    goal = dataclasses.replace(rule, rows=rule.rows - 256, slots=2)

    def score(tiles):
        return abs(tiles.rows - goal.rows) / 128 + abs(tiles.slots - goal.slots)

    tried = tune_kernels.search(case, V5E, score, most=60)
    assert next(iter(tried)) == rule
    best = min(tried, key=tried.get)
    assert (best.rows, best.slots) == (goal.rows, goal.slots)
    assert len(tune_kernels.search(case, V5E, score, most=5)) == 5


def test_what_is_kept():
    key = Case("drhs", 8, (256, 128), 1024).key("v5e")
    slow, fast = (tpu_tuned.Entry(key, {"rows": 128}, "predicted", seconds, 2.0) for seconds in (1.99, 1.0))
    timed = dataclasses.replace(fast, source="timed")
    other = dataclasses.replace(fast, key=dataclasses.replace(key, groups=9))
    table = {other.key: other}
    assert tune_kernels.merged(table, [fast]) == [other, fast]
    assert tune_kernels.merged(table, [slow]) == [other]  # less than 1 % of gain
    assert tune_kernels.merged({key: fast, **table}, [slow]) == [other]  # and what was there is out of date
    assert tune_kernels.merged({key: fast}, [timed]) == [timed]
    assert tune_kernels.merged({key: timed}, [fast]) == [timed]


def test_times_are_medians_of_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(Case, "function", lambda self, tiles: lambda lhs, rhs, sizes: calls.append(0) or jnp.sum(lhs))
    case = Case("forward", 2, (128, 128), 64)
    assert 0 < tune_kernels.timed(case, case.rule(V5E)) < 1
    assert len(calls) == 1  # compiled once


def test_the_command(tmp_path, capsys):
    table, rows = tmp_path / "table.json", tmp_path / "rows.json"
    table.write_text("[]")
    flags = ["--shapes=2x256x128", "--rows=256", "--products=drhs", "--most=2", "--write"]
    tune_kernels.main(["--chip=v5e", *flags, f"--table={table}", f"--json={rows}"])
    (row,) = json.loads(rows.read_text())
    assert {row[name] for name in ("chip", "product", "source")} == {"v5e", "drhs", "predicted"}
    assert 0 < row["seconds"] <= row["rule_seconds"] < 1e-3
    assert "drhs on v5e, bfloat16, 2 groups of 128 rows, 256 x 128: predicted" in capsys.readouterr().out
    gained = row["rule_seconds"] > tune_kernels.GAIN * row["seconds"]
    assert len(tpu_tuned.parse(table.read_text())) == gained


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--shapes=8x4096", "--shapes: '8x4096': use GROUPSxDEPTHxWIDTH"),
        ("--products=up", "--products: no up: use forward, dlhs, drhs"),
        ("--rows=many", "--rows: 'many': use numbers"),
        ("--chip=v7", "--chip: no v7: use v5e, v5p, v6e"),
    ],
)
def test_a_wrong_flag_is_one_line(flag, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        tune_kernels.main([flag])
