"""The table of tuned tiles: what is looked up, what falls back to the rule, and what is refused."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from kernels.grouped_matmul import tpu, tpu_tiles, tpu_tuned

V5P = tpu_tiles.chip_called("v5p")
KEY = {"chip": "v5p", "dtype": "bfloat16", "groups": 8, "depth": 512, "width": 256, "rows_per_group": 512}
FORWARD = {
    **KEY, "product": "forward", "source": "predicted", "seconds": 1.0, "rule_seconds": 2.0,
    "tiles": {"rows": 128, "columns": 256, "block_rows": 128, "step_rows": 32, "block_columns": 128},
}  # fmt: skip
DRHS = {
    **FORWARD, "product": "drhs",
    "tiles": {"rows": 256, "depth": 256, "columns": 128, "block_depth": 128, "depth_parts": 2},
}  # fmt: skip
SHAPE = (4096, 8, 512, 256, 2)  # rows, groups, depth, width, bytes of a number


@pytest.fixture
def table(monkeypatch):
    def use(*entries):
        monkeypatch.setattr(tpu_tuned, "table", lambda: tpu_tuned.parse(json.dumps(entries)))

    return use


def test_the_committed_entries_fit_and_are_as_written():
    text = pathlib.Path(str(tpu_tuned.path())).read_text()
    for key in tpu_tuned.table():
        shape = (key.rows_per_group * key.groups, key.groups, key.depth, key.width, jnp.dtype(key.dtype).itemsize)
        chosen = (tpu_tiles.outer_tiles, tpu_tiles.product_tiles)[key.product != "drhs"]
        product = () if key.product == "drhs" else (key.product,)
        tiles = chosen(*shape, tpu_tiles.chip_called(key.chip), *product)
        assert dict(tpu_tuned.table()[key].tiles).items() <= dataclasses.asdict(tiles).items()
    assert tpu_tuned.to_text(tpu_tuned.table().values()) == text


def test_lookup(table):
    table(FORWARD, DRHS)
    assert tpu_tiles.product_tiles(*SHAPE, V5P) == tpu_tiles.ProductTiles(**FORWARD["tiles"])
    assert tpu_tiles.outer_tiles(*SHAPE, V5P) == tpu_tiles.OuterTiles(**DRHS["tiles"])
    near = (8 * 600, *SHAPE[1:])  # 600 rows a group are nearest to 512
    assert tpu_tiles.product_tiles(*near, V5P) == tpu_tiles.ProductTiles(**FORWARD["tiles"])


def test_the_kernels_ask_for_their_own_product(table, monkeypatch):
    """K and N of dlhs are the other way round; the shape that is looked up is padded."""
    keys = []
    table()
    key_of = tpu_tuned.key_of
    monkeypatch.setattr(tpu_tuned, "key_of", lambda *key: keys.append(key_of(*key)) or keys[-1])
    lhs, rhs, dout = jnp.zeros((64, 500), jnp.bfloat16), jnp.zeros((2, 500, 130), jnp.bfloat16), jnp.zeros((64, 130))
    sizes = jnp.zeros(2, jnp.int32)
    jax.eval_shape(functools.partial(tpu.product, chip=V5P), lhs, rhs, sizes)
    jax.eval_shape(functools.partial(tpu.product, transpose_rhs=True, chip=V5P), dout.astype(jnp.bfloat16), rhs, sizes)
    jax.eval_shape(functools.partial(tpu.outer, chip=V5P), lhs.astype(jnp.float32), dout, sizes)
    assert keys == [
        tpu_tuned.Key("v5p", "forward", "bfloat16", 2, 512, 256, 32),
        tpu_tuned.Key("v5p", "dlhs", "bfloat16", 2, 256, 512, 32),
        tpu_tuned.Key("v5p", "drhs", "float32", 2, 512, 256, 32),
    ]


def test_an_unknown_shape_falls_back_to_the_rule(table):
    table(FORWARD, DRHS)
    rule = tpu_tiles.product_rule(*SHAPE, V5P)
    assert rule != tpu_tiles.product_tiles(*SHAPE, V5P)
    for other in ((8 * 800, *SHAPE[1:]), (*SHAPE[:4], 4), (SHAPE[0], 16, *SHAPE[2:])):
        assert tpu_tiles.product_tiles(*other, V5P) == tpu_tiles.product_rule(*other, V5P)
    assert tpu_tiles.product_tiles(*SHAPE, V5P, "dlhs") == rule
    assert tpu_tiles.product_tiles(*SHAPE, dataclasses.replace(V5P, name="")) == rule
    assert tpu_tiles.product_tiles(*SHAPE, dataclasses.replace(V5P, name="v5e")) == rule


@pytest.mark.parametrize(
    ("entry", "changes", "message"),
    [
        (FORWARD, {"columns": 384}, "columns is 384, which does not divide 256"),
        (FORWARD, {"block_columns": 64}, "block_columns is 64, which is no multiple of 128"),
        (FORWARD, {"step_rows": 8}, "step_rows is 8, which is no multiple of 16"),
        (FORWARD, {"lhs_slots": 1}, "lhs_slots is 1, which is less than 2"),
        (FORWARD, {"rows": 2**20}, "bytes of VMEM are more than 0.85 of the 67108864"),
        (FORWARD, {"depth": 128}, "unexpected keyword argument 'depth'"),
        (DRHS, {"depth": 512}, "depth x depth_parts is 1024, which does not divide 512"),
        (DRHS, {"rows": 200}, "rows is 200, which is no multiple of 128"),
        (DRHS, {"depth_parts": 4, "depth": 128}, "depth_parts x column_parts is 4, which does not divide 2"),
    ],
)
def test_tiles_that_do_not_fit_are_an_error(table, entry, changes, message):
    table({**entry, "tiles": {**entry["tiles"], **changes}})
    with pytest.raises(ValueError, match=message) as error:
        (tpu_tiles.outer_tiles if entry is DRHS else tpu_tiles.product_tiles)(*SHAPE, V5P)
    assert f"{entry['product']} on v5p, bfloat16, 8 groups of 512 rows, 512 x 256" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({**FORWARD, "product": "backward"}, "entry 1 .*product is 'backward', not one of forward, dlhs, drhs"),
        ({**FORWARD, "dtype": "int8"}, "dtype is 'int8'"),
        ({**FORWARD, "source": "guessed"}, "source is 'guessed', not one of timed, predicted"),
        ({**FORWARD, "groups": 0}, "groups is 0, not a positive integer"),
        ({**FORWARD, "tiles": {"rows": True}}, "rows is True, not a positive integer"),
        ({**FORWARD, "rows_per_group": 500}, "rows_per_group is 500, not a power of two"),
        ({**FORWARD, "speed": 1}, "unexpected keyword argument 'speed'"),
        ({name: value for name, value in FORWARD.items() if name != "chip"}, "entry 1 .*'chip'"),
        (3, "entry 1"),
        (DRHS, "entry 1: drhs on v5p, .* is there twice"),
    ],
)
def test_a_table_that_is_wrong_is_refused(entry, message):
    with pytest.raises(ValueError, match=message) as error:
        tpu_tuned.parse(json.dumps([DRHS, entry]))
    assert "benchmarks.tune_kernels" in str(error.value)
