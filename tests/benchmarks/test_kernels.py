"""The side-by-side benchmark of grouped matmul kernels, on a product that compiles in seconds."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernel_bounds, kernel_candidates, kernel_shapes, kernel_timing, kernels
from benchmarks.kernel_candidates import Candidate
from benchmarks.kernel_shapes import SHAPES, Case, Shape
from kernels.grouped_matmul import Backend
from kwaicoder_jax.errors import UserError

TINY = Case(Shape(8, 256, 384), 1024, "dlhs")


@pytest.mark.parametrize("kind", kernel_shapes.SIZES)
def test_sizes_sum_to_the_rows_and_are_always_the_same(kind):
    for shape in SHAPES.values():
        for rows in kernel_shapes.ROWS:
            found = kernel_shapes.sizes(kind, shape.groups, rows)
            assert found.dtype == np.int32
            assert found.shape == (shape.groups,)
            assert found.sum() == rows
            assert (found >= 0).all()
            np.testing.assert_array_equal(found, kernel_shapes.sizes(kind, shape.groups, rows))


def test_sizes_are_what_they_are_called():
    assert set(kernel_shapes.sizes("aligned", 64, 32_768)) == {512}
    zipf = np.sort(kernel_shapes.sizes("zipf", 8, 8192))[::-1]
    np.testing.assert_allclose(zipf, 8192 / np.arange(1, 9) / np.sum(1 / np.arange(1, 9)), atol=1)
    np.testing.assert_array_equal(kernel_shapes.apportioned(np.array([1.0, 1.0, 1.0]), 5), [2, 2, 1])
    np.testing.assert_array_equal(kernel_shapes.apportioned(np.array([1.0, 5.0, 3.0]), 10), [1, 6, 3])
    counts = np.bincount(
        np.random.default_rng(0).integers(0, 64, 32_768), minlength=64
    )  # the same law, drawn otherwise
    found = kernel_shapes.sizes("multinomial", 64, 32_768)
    assert found.std() == pytest.approx(counts.std(), rel=0.3)


@pytest.mark.parametrize("with_empty", [False, True])
def test_visits_are_those_of_upstream(with_empty):
    upstream = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    metadata = jax.jit(
        upstream.make_group_metadata, static_argnames=("m", "tm", "num_nonzero_groups", "visit_empty_groups")
    )
    rng = np.random.default_rng(0)
    for weights in (np.ones(16), rng.random(16) ** 4, np.eye(16)[3], rng.integers(0, 2, 16)):
        sizes = rng.multinomial(2048, weights / weights.sum()).astype(np.int32)
        (offsets, groups, tiles), count = metadata(
            group_sizes=jnp.asarray(sizes), m=2048, tm=128, start_group=jnp.int32(0), num_nonzero_groups=16,
            visit_empty_groups=with_empty,
        )  # fmt: skip
        found = kernel_candidates.visits(sizes, 2048, 128, with_empty=with_empty)
        assert found[0] == count
        for index, want in ((1, offsets), (2, groups), (3, tiles)):
            np.testing.assert_array_equal(found[index][:count], np.asarray(want)[:count])  # the rest is not read
            assert len(found[index]) == len(want)


def test_tiles_are_few_fit_and_one_is_for_two_cores():
    for shape in SHAPES.values():
        for rows in kernel_shapes.ROWS:
            for product in kernel_shapes.PRODUCTS:
                case = Case(shape, rows, product)
                for tile in kernel_candidates.row_tiles(case):
                    assert rows % tile == 0
                    found = kernel_candidates.inner_tiles(case, tile, cores=2)
                    assert kernel_candidates.inner_tiles(case, tile, cores=1) == found[:1]
                    assert len(found) <= 2
                    assert any(-(-case.inner[1] // wide) % 2 == 0 for _, wide in found)
                    assert all(2 * 2 * deep * wide < 2**26 for deep, wide in found)


def test_a_product_beside_all_others(monkeypatch, tmp_path, capsys):
    """Everything that is compiled once: a row has all keys, and a second run makes nothing anew."""
    pytest.importorskip("tokamax")
    monkeypatch.setattr(kernel_candidates, "row_tiles", lambda case: (128,))
    monkeypatch.setattr(kernel_candidates, "inner_tiles", lambda case, tile, cores: [(384, 256)])
    monkeypatch.setitem(kernels.SHAPES, "tiny", TINY.shape)
    monkeypatch.setattr(kernel_shapes, "ROWS", (TINY.rows,))
    sizes = {"multinomial": np.array([100, 156, 0, 130, 126, 200, 184, 128], np.int32)}
    monkeypatch.setattr(kernel_shapes, "sizes", lambda kind, groups, rows: sizes[kind])
    file = tmp_path / "rows.json"
    command = ["--shapes=tiny", "--products=dlhs", "--sizes=multinomial", f"--json={file}"]
    kernels.main(command)
    table = capsys.readouterr().out
    (row,) = json.loads(file.read_text())
    named = {"chip": "v5e", "shape": "256x384", "groups": 8, "rows": 1024, "product": "dlhs", "sizes": "multinomial"}
    assert {key: row[key] for key in named} == named
    ideal = 2 * 1024 * 256 * 384 / 197e12
    assert row["ideal_seconds"] == pytest.approx(ideal)
    assert row["predicted_util"] == pytest.approx(ideal / row["predicted_seconds"])
    assert row["predicted_seconds_low"] <= row["predicted_seconds"] <= row["predicted_seconds_high"]
    for backend in ("megablox", "tokamax"):
        assert row[f"{backend}_seconds"] == pytest.approx(row[f"ratio_to_{backend}"] * row["predicted_seconds"])
        assert row[f"{backend}_tiles"] == [128, 384, 256]
    assert row["hbm_bytes"] >= 2 * (7 * 256 * 384 + 1024 * (256 + 384))  # one group is empty
    assert row["ragged_dot_flops_ratio"] == pytest.approx(1)
    assert row["ragged_dot_seconds_at_least"] > ideal
    assert "measured_seconds" not in row
    assert "not measured" in table
    assert table.strip().endswith("| - |")
    monkeypatch.setattr(kernels, "compare", None)
    kernels.main(command)
    assert capsys.readouterr().out == table


def test_tiles_that_the_compiler_refuses_are_passed_over(monkeypatch):
    def refuse(candidate, chip):
        raise UserError("no space in VMEM", where="schedule")

    monkeypatch.setattr(Candidate, "compile", refuse)
    found = kernels.search(TINY, "v5e", {"aligned": np.full(8, 128, np.int32)})
    assert found == {Backend.MEGABLOX: [], Backend.TOKAMAX: []}


def test_the_bound_of_a_dense_weight_gradient():
    """ragged_dot computes it for all groups, of all rows."""
    bound = kernel_bounds.ragged_dot(Case(TINY.shape, TINY.rows, "drhs"), "v5e")
    assert bound.flops == pytest.approx(8 * TINY.useful_flops)
    assert bound.seconds(np.full(8, 128)) == bound.roofline_seconds >= bound.flops / 197e12


@pytest.mark.parametrize("product", kernel_shapes.PRODUCTS)
def test_what_runs_here_is_timed(product):
    case = Case(Shape(4, 32, 16), 64, product)
    row = kernels.measured(case, {}, np.array([10, 20, 0, 30], np.int32))
    assert list(row["measured_seconds_of"]) == ["cpu", "reference", "ragged_dot"]
    assert row["measured_seconds"] == row["measured_seconds_of"]["cpu"] > 0
    assert row["measured_backend"] == "cpu"


def test_each_platform_times_its_own():
    assert kernel_timing.backends("tpu") == [Backend.TPU, Backend.TOKAMAX, Backend.MEGABLOX, Backend.RAGGED_DOT]
    assert len(kernel_timing.backends("gpu")) == 2


def test_what_there_is_not_is_named():
    with pytest.raises(SystemExit, match=r"--sizes: no poisson: use multinomial, aligned, zipf, real"):
        kernels.main(["--sizes=poisson"])
    with pytest.raises(SystemExit, match="--chip: no h100: use v5e, v5p, v6e"):
        kernels.main(["--chip=h100"])
