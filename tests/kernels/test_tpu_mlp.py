"""The fused kernels of the expert MLP on TPU: interpreted against float64, and compiled for three chips."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels import routing
from kernels.grouped_matmul import (
    Backend,
    expert_mlp,
    tpu_combine,
    tpu_fused_tiles,
    tpu_gather,
    tpu_mlp,
    tpu_plan,
    tpu_rows,
    tpu_tiles,
)
from kernels.grouped_matmul.mlp_types import Arguments, Saved
from kernels.routing.api import weighted_sum
from kwaicoder_jax.hardware import schedule
from tests.kernels import exact

# Matrix units of 64 rows and pieces of 64, so that few rows are several blocks and pieces.
ONE_CORE, TWO_CORES = tpu_tiles.Chip(1, 2**26, 64), tpu_tiles.Chip(2, 2**26, 64)
PIECE = 64


def strict(chip):
    """Both cores at once, where there are two."""
    return pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", num_cores_or_threads=chip.cores
    )


@functools.partial(jax.jit, static_argnames=("chip", "tiles"))
def interpreted(arguments, order, dy_MD, *, chip, tiles=None):
    how = {"chip": chip, "tiles": tiles, "interpret": strict(chip), "piece": PIECE}
    y_MD, saved = tpu_mlp.forward(jax.nn.silu, arguments, order, keep=True, **how)
    return y_MD, *tpu_mlp.backward(jax.nn.silu, arguments, order, saved, dy_MD, **how)


def drawn(expert_MX, experts, width, neurons, dtype, seed=0):
    rng = np.random.default_rng(seed)
    tokens, choices = expert_MX.shape
    shapes = [(tokens, width), (experts, width, neurons), (experts, width, neurons), (experts, neurons, width)]
    x, gate, up, down = (jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.25, dtype) for shape in shapes)
    weight = jnp.asarray(rng.random((tokens, choices)), jnp.float32)
    return Arguments(x, weight, gate, up, down), jnp.asarray(rng.normal(size=shapes[0]), dtype)


def check(expert_MX, experts, width, neurons, dtype, chip, tiles=None):
    arguments, dy_MD = drawn(expert_MX, experts, width, neurons, dtype)
    x, weight, *matrices = (np.asarray(array.astype(jnp.float32)) for array in arguments)
    wanted = exact.layer(x, weight, expert_MX, *matrices, np.asarray(dy_MD.astype(jnp.float32)))
    order = routing.sort_by_expert(jnp.asarray(expert_MX), experts)
    got = interpreted(arguments, order, dy_MD, chip=chip, tiles=tiles)
    # bfloat16: intermediate rows are rounded twice, relative to the largest entry. float32: order of sums.
    tolerance = 0.02 if dtype == jnp.bfloat16 else 2e-5
    for name, have, want in zip(("y", "dx", "dweight", "dgate", "dup", "ddown"), got, wanted, strict=True):
        error = np.abs(np.asarray(have.astype(jnp.float32)) - want).max()
        assert error <= tolerance * np.abs(want).max(), name
    assert not interpret_pallas_call.races.races_found


def test_bfloat16_on_two_cores():
    """Experts without rows, one with most of them, choices of experts that are elsewhere, rows that no tile divides."""
    expert_MX = np.array([[2, 1 + token % 5] if token % 7 else [2, 6] for token in range(71)], np.int32)
    check(expert_MX, 6, 256, 128, jnp.bfloat16, TWO_CORES)


def test_float32_on_one_core():
    expert_MX = np.random.default_rng(0).integers(0, 5, (40, 2)).astype(np.int32)
    check(expert_MX, 4, 128, 128, jnp.float32, ONE_CORE)


@pytest.mark.parametrize(("columns", "width"), [(128, 256), (256, 512)], ids=["tiles", "blocks"])
def test_columns_in_parts(columns, width):
    """Two tiles of columns, each with a pass over the gathered rows, and two blocks of a tile; sums of rows over both."""
    tiles = tpu_tiles.ProductTiles(128, columns, 64, 16, 128)
    expert_MX = (np.arange(150, dtype=np.int32) % 7 // 3).reshape(-1, 1)  # two experts with 64 rows, one with 22
    check(expert_MX, 3, width, 256, jnp.bfloat16, TWO_CORES, tiles)


def test_gathered_rows_across_the_end_of_the_ring():
    """More rows than are held at once, and blocks that begin in the last held piece and end in the first."""
    sizes, rows = [40, 290], 330
    assert rows > tpu_gather.HELD * PIECE
    rng = np.random.default_rng(0)
    x_MD, rhs_GKN = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((64, 256), (2, 256, 128)))
    index_R = jnp.asarray(rng.integers(0, 64, 336), jnp.int32)

    def finish(parts, *_):
        return [parts[0].astype(jnp.bfloat16)]

    plan = tpu_plan.Plan("gathered", ((0, 0),), (((0, 0),),), (tpu_plan.Out(jnp.bfloat16),), finish)
    (got,) = tpu_rows.grouped_rows(
        [tpu_gather.packed(x_MD)], [rhs_GKN], jnp.asarray(sizes, jnp.int32), plan, width=128, index_M=index_R, here=ONE_CORE,
        piece=PIECE, interpret=strict(ONE_CORE),
    )  # fmt: skip
    x, rhs, got = (np.asarray(each.astype(jnp.float32)) for each in (x_MD, rhs_GKN, got))
    want, _, _ = exact.products(x[np.asarray(index_R)], rhs, sizes, np.zeros((336, 128)))
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-4)  # one rounding of a float32 sum


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=90))
def test_any_routing(experts):
    check(np.array(experts, np.int32).reshape(-1, 1), 4, 256, 256, jnp.bfloat16, TWO_CORES)


@pytest.mark.parametrize(
    "chip", [ONE_CORE, pytest.param(TWO_CORES, marks=pytest.mark.slow)], ids=["one core", "two cores"]
)
def test_what_is_wrong_in_one_expert_stays_there(chip):
    """A matrix of NaN: tokens of other experts, and the other experts' gradients, are as without."""
    expert_MX = (np.arange(48, dtype=np.int32) % 3).reshape(-1, 1)
    arguments, dy_MD = drawn(expert_MX, 3, 256, 128, jnp.bfloat16)
    order = routing.sort_by_expert(jnp.asarray(expert_MX), 3)
    poisoned = arguments._replace(
        gate_EDF=arguments.gate_EDF.at[1].set(jnp.nan), up_EDF=arguments.up_EDF.at[1].set(jnp.inf)
    )
    clean, other = (interpreted(each, order, dy_MD, chip=chip) for each in (arguments, poisoned))
    tokens, experts = np.flatnonzero(expert_MX[:, 0] != 1), [0, 2]
    for number, kept in enumerate((tokens, tokens, tokens, experts, experts, experts)):
        have, want = (np.asarray(run[number].astype(jnp.float32))[kept] for run in (other, clean))
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(
    ("tokens", "choices", "dtype", "weighted"),
    [(96, 2, jnp.bfloat16, True), (50, 3, jnp.bfloat16, False), (40, 8, jnp.float32, True)],
)
def test_sums_of_rows_are_those_of_the_reference(tokens, choices, dtype, weighted):
    rng = np.random.default_rng(0)
    rows_RD = jnp.asarray(rng.normal(size=(tokens * choices, 256)), dtype)
    index_MX = jnp.asarray(rng.permutation(tokens * choices).reshape(tokens, choices), jnp.int32)
    weight_MX = jnp.asarray(rng.random((tokens, choices)), jnp.float32) if weighted else None
    got = tpu_combine.sum_rows(
        tpu_gather.packed(rows_RD), index_MX, weight_MX, dtype, here=TWO_CORES, rows_of_a_piece=PIECE,
        interpret=strict(TWO_CORES),
    )  # fmt: skip
    want = weighted_sum(rows_RD, index_MX, weight_MX).astype(dtype)
    # One rounding less of a product where the compiler fuses it with the sum.
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=1e-6, atol=1e-6)


def test_packed_rows_come_back():
    x_MD = jnp.asarray(np.random.default_rng(0).normal(size=(16, 256)), jnp.bfloat16)
    words_MW = tpu_gather.packed(x_MD)[:, 0]
    halves = tpu_gather.unpack(words_MW, x_MD.dtype)
    np.testing.assert_array_equal(jnp.concatenate(halves, axis=1).astype(x_MD.dtype), x_MD)
    np.testing.assert_array_equal(tpu_gather.pack(halves, x_MD.dtype), words_MW)


def test_what_they_do_not_take_is_composed():
    """Widths of no whole tiles: the same function through the products."""
    for width, neurons, dtype, is_fused in (
        (2048, 1408, jnp.bfloat16, True), (128, 128, jnp.float32, True), (128, 128, jnp.bfloat16, False),
        (256, 96, jnp.bfloat16, False), (256, 128, jnp.float16, False),
    ):  # fmt: skip
        arguments, _ = jax.eval_shape(lambda w=width, n=neurons, d=dtype: drawn(np.zeros((8, 2), np.int32), 2, w, n, d))
        assert tpu_mlp.fits(arguments) == is_fused


def kernel_names(traced):
    """Names of a program's kernels. Their bodies stand in its text too, encoded: any few letters occur there."""
    return set(re.findall(r'kernel_name = "(\w+)"', traced.lower(lowering_platforms=("tpu",)).as_text()))


def test_auto_takes_them_on_tpu_through_remat():
    arguments, _ = jax.eval_shape(lambda: drawn(np.zeros((32, 2), np.int32), 4, 256, 128, jnp.bfloat16))

    def loss(arguments, expert_MX):
        order = routing.sort_by_expert(expert_MX, 4)
        return jnp.sum(expert_mlp(arguments[0], arguments[1], order, *arguments[2:]).astype(jnp.float32))

    traced = jax.jit(jax.grad(jax.checkpoint(loss))).trace(arguments, jax.ShapeDtypeStruct((32, 2), jnp.int32))
    assert kernel_names(traced) == {
        "routing_places", tpu_mlp.GATE_UP, tpu_mlp.DOWN, tpu_mlp.GRAD_IN, tpu_mlp.GRAD_X, "grouped_outer", tpu_combine.NAME,
    }  # fmt: skip
    explicit = jax.jit(functools.partial(expert_mlp, backend=Backend.TPU)).trace(
        arguments[0], arguments[1], jax.eval_shape(lambda e: routing.sort_by_expert(e, 4), jnp.zeros((32, 2), jnp.int32)),
        *arguments[2:],
    )  # fmt: skip
    assert tpu_mlp.GATE_UP in kernel_names(explicit)


PRODUCTS = {tpu_mlp.GATE_UP: 2, tpu_mlp.DOWN: 1, tpu_mlp.GRAD_IN: 1, tpu_mlp.GRAD_X: 2}


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_compiled_for(chip):
    """64 experts of 2048 x 1408, 4096 tokens with 8 of them each: what each kernel reaches with all that it does."""
    experts, tokens, width, neurons, choices = 64, 4096, 2048, 1408, 8
    rows, here = tokens * choices, tpu_tiles.chip_called(chip)
    made = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    projection = made((experts, width, neurons))
    weight_MX = jax.ShapeDtypeStruct((tokens, choices), jnp.float32)
    arguments = Arguments(made((tokens, width)), weight_MX, projection, projection, made((experts, neurons, width)))
    order = jax.eval_shape(lambda e: routing.sort_by_expert(e, experts), jnp.zeros((tokens, choices), jnp.int32))

    def layer(arguments, order, dy_MD):
        y_MD, saved = tpu_mlp.forward(jax.nn.silu, arguments, order, keep=True, chip=here)
        return y_MD, tpu_mlp.backward(jax.nn.silu, arguments, order, Saved(*saved), dy_MD, chip=here)

    kernels = {
        name: kernel
        for kernel in schedule.compile_kernels(layer, (arguments, order, arguments.x_MD), chip=chip, kernel="experts_")
        for name in PRODUCTS
        if name in kernel.name
    }
    assert kernels.keys() == PRODUCTS.keys()
    sizes = np.random.default_rng(0).multinomial(rows, [1 / experts] * experts).astype(np.int32)
    least = {"v5e": (0.84, 0.85, 0.74, 0.86), "v5p": (0.83, 0.84, 0.73, 0.85), "v6e": (0.3,) * 4}[
        chip
    ]  # v6e: bound by HBM
    for (name, products), bound in zip(PRODUCTS.items(), least, strict=True):
        found = kernels[name].predict({0: sizes}, useful_flops=2 * products * rows * width * neurons)
        assert found.cores_used == here.cores
        assert found.utilization > bound, name


def test_tiles_fit_whatever_the_shape():
    plan = tpu_mlp.gate_up_plan(jax.nn.silu, jnp.dtype(jnp.bfloat16), True)
    for chip in ("v5e", "v5p", "v6e"):
        here = tpu_tiles.chip_called(chip)
        for experts, width, neurons in ((8, 4096, 14_336), (256, 7168, 2048), (512, 2048, 768)):
            call = tpu_fused_tiles.Call(
                131_072, experts, width, neurons, 1, 2, 0, 0, True, 256, jnp.dtype(jnp.bfloat16), 16
            )
            tiles = tpu_fused_tiles.rows_tiles(plan, call, here)
            assert neurons % tiles.columns == tiles.columns % tiles.block_columns == 0
            assert tpu_fused_tiles.vmem_bytes(plan, call, tiles) < here.vmem_bytes
    with pytest.raises(ValueError, match="no tiles of experts_gate_up, 2048 x 768, fit in 1000 bytes"):
        tpu_fused_tiles.rows_tiles(plan, call, tpu_tiles.Chip(1, 1000))
