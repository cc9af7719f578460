"""The kernels for Hopper: interpreted against float64, what they are given, and where "auto" takes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import Backend, gpu, gpu_outer, gpu_product, gpu_tiles, grouped_matmul, reference
from tests.kernels import exact, interpreted


def operands(sizes, rows, depth, width):
    rng = np.random.default_rng(0)
    shapes = ((rows, depth), (len(sizes), depth, width), (rows, width))
    return [interpreted.bfloat16(rng.normal(size=shape)) for shape in shapes]


@pytest.mark.parametrize(
    ("sizes", "rows", "depth", "width", "blocks"),
    [
        ([3, 70, 0, 41], 120, 128, 128, 2),  # tiles of 64 rows that begin anywhere, halves of their columns, a tail
        ([0, 0], 50, 64, 64, 1),  # rows that no tile divides, and none in a group
        (
            [0, 203, 90],
            300,
            64,
            256,
            1,
        ),  # several tiles of 128 rows, whole and in part, in halves of rows, and wide ones
    ],
)
def test_interpreted_against_float64(sizes, rows, depth, width, blocks, monkeypatch):
    monkeypatch.setattr(gpu_product, "SMS", blocks)  # each is compiled anew where it has several warpgroups
    lhs, rhs, dout = operands(sizes, rows, depth, width)
    wanted = exact.products(lhs, rhs, sizes, dout)
    used = sum(sizes)
    lhs[used:], dout[used:] = np.nan, np.inf  # reach nothing
    lhs, rhs, dout = (jnp.asarray(x, jnp.bfloat16) for x in (lhs, rhs, dout))
    sizes_G = jnp.asarray(sizes, jnp.int32)
    with interpreted.whole(monkeypatch) as interpret:
        got = (
            gpu.product(lhs, rhs, sizes_G, interpret=interpret),
            gpu.product(dout, rhs, sizes_G, transpose_rhs=True, interpret=interpret),
            gpu.outer(lhs, dout, sizes_G, interpret=interpret),
        )
    for name, have, want in zip(("out", "dlhs", "drhs"), got, wanted, strict=True):
        assert have.dtype == jnp.bfloat16
        # One rounding at the end of a float32 sum.
        np.testing.assert_allclose(np.asarray(have.astype(jnp.float32)), want, rtol=2**-8, atol=1e-4, err_msg=name)


visits = jax.jit(gpu_tiles.visits, static_argnums=(1, 2))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_row_of_a_group_is_in_one_tile_that_a_copy_can_begin_with(data):
    groups, rows, tile = data.draw(st.sampled_from([(3, 128, 64), (5, 1000, 128), (64, 512, 128)]))
    size = st.one_of(st.just(0), st.integers(0, 40), st.sampled_from([7, 8, 63, 64, 65, 127, 128, 129, 300]))
    ends = np.minimum(np.cumsum(data.draw(st.lists(size, min_size=groups, max_size=groups))), rows)
    sizes = np.diff(ends, prepend=0)
    tiles = visits(jnp.asarray(sizes, jnp.int32), rows, tile)
    group, block, offset, own = (np.asarray(each) for each in tiles)
    assert np.all(block % gpu_tiles.ALIGNMENT == 0)
    assert np.all((block >= 0) & (block + tile <= rows))
    busy = own > 0
    assert np.all((offset[busy] >= 0) & (offset[busy] + own[busy] <= tile))
    seen = [(row, g) for g, b, o, n in zip(group, block, offset, own) for row in range(b + o, b + o + n)]
    assert sorted(seen) == [(row, g) for row, g in enumerate(np.repeat(np.arange(groups), sizes))]


def stand_in(lhs_MK, rhs_GKN, sizes_G, *, rows_tile, width_tile, transpose_rhs, interpret):
    """What `rows_product` promises, with NaN where it promises nothing; and that it is given what it asks for."""
    assert interpret is None
    depth, width = rhs_GKN.shape[1:][:: -1 if transpose_rhs else 1]
    assert lhs_MK.shape[0] % gpu_tiles.ALIGNMENT == 0
    assert lhs_MK.shape[0] >= rows_tile
    assert (depth % gpu_tiles.DEPTH, width % width_tile) == (0, 0)
    right = rhs_GKN.swapaxes(1, 2) if transpose_rhs else rhs_GKN
    row_M1 = jnp.arange(lhs_MK.shape[0]).reshape(-1, 1)
    return jnp.where(row_M1 < jnp.sum(sizes_G), reference.product(lhs_MK, right, sizes_G), jnp.nan)


def test_gradients_by_the_back_end(monkeypatch):
    def outer(lhs_MK, dout_MN, sizes_G, *, depth_tile, width_tile, interpret):
        assert lhs_MK.shape[0] == dout_MN.shape[0]
        assert lhs_MK.shape[0] % gpu_tiles.DEPTH == 0
        assert (lhs_MK.shape[1] % depth_tile, dout_MN.shape[1] % width_tile) == (0, 0)
        return reference.outer(lhs_MK, dout_MN, sizes_G)

    monkeypatch.setattr(gpu_product, "rows_product", stand_in)
    monkeypatch.setattr(gpu_outer, "outer_product", outer)
    sizes = [20, 0, 23]
    lhs, rhs, dout = operands(sizes, 50, 192, 64)  # fewer rows than a tile has
    wanted = exact.products(lhs, rhs, sizes, dout)
    call = functools.partial(grouped_matmul, group_sizes_G=jnp.asarray(sizes), backend=Backend.GPU)
    out, pull = jax.vjp(call, *(jnp.asarray(x, jnp.bfloat16) for x in (lhs, rhs)))
    for have, want in zip((out, *pull(jnp.asarray(dout, jnp.bfloat16))), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(have.astype(jnp.float32)), want, rtol=2**-8, atol=1e-4)


# Widths of experts: the 23B mixtures, Mixtral 8x7B, Qwen3-30B-A3B.
EXPERTS = [(3072, 1408), (2816, 1664), (4096, 14_336), (2048, 768)]


def lowered(dtype, depth, width, groups=8, rows=4096):
    """The program of all three products for an NVIDIA GPU, by "auto"; made without one."""
    shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((rows, depth), (groups, depth, width), (rows, width))]

    def products(lhs_MK, rhs_GKN, dout_MN, sizes_G):
        out_MN, pull = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes_G), lhs_MK, rhs_GKN)
        return out_MN, pull(dout_MN)

    traced = jax.jit(products).trace(*shapes, jax.ShapeDtypeStruct((groups,), jnp.int32))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("depth", "width"), EXPERTS)
def test_auto_takes_them_for_the_experts_of_large_models(depth, width):
    assert gpu.fits(jnp.dtype(jnp.bfloat16), depth, width)
    assert gpu.fits(jnp.dtype(jnp.bfloat16), depth, width // 2)  # of a tensor axis of two


def test_auto_on_gpu():
    text = lowered(jnp.bfloat16, 128, 64)
    assert text.count("custom_call @mosaic_gpu") == 3
    assert "ragged_dot" not in text
    assert "stablehlo.transpose" not in text  # matrices are read as they lie


@pytest.mark.parametrize(("dtype", "depth", "width"), [(jnp.float32, 128, 64), (jnp.bfloat16, 96, 64)])
def test_auto_falls_back(dtype, depth, width):
    text = lowered(dtype, depth, width)
    assert "mosaic_gpu" not in text
    assert "ragged_dot" in text
    with pytest.raises(ValueError, match="gpu needs bfloat16 or float16, widths that are multiples of 64"):
        gpu.product(jnp.ones((8, depth), dtype), jnp.ones((1, depth, width), dtype), jnp.asarray([8]))


def test_another_gpu_is_left_to_xla(monkeypatch):
    ampere = type("Device", (), {"compute_capability": "8.0"})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [ampere])
    gpu._on_hopper.cache_clear()
    assert not gpu.fits(jnp.dtype(jnp.bfloat16), 128, 64)
    gpu._on_hopper.cache_clear()


def test_the_work_is_that_of_random_groups():
    rows, groups, (depth, width) = 65_536, 64, EXPERTS[0]
    tile, _ = gpu.product_tile(rows, groups, width)
    rng, visited, steps = np.random.default_rng(0), [], []
    for _ in range(20):
        sizes = rng.multinomial(rows, rng.dirichlet(np.full(groups, 50.0)))
        tiles = visits(jnp.asarray(sizes, jnp.int32), rows, tile)
        visited.append(np.sum(np.asarray(tiles.rows) > 0) * tile)
        ends = np.cumsum(sizes)
        steps.append(np.sum(-(-ends // 64) - (ends - sizes) // 64) * 64)
    flops, moved = gpu.product_work(rows, groups, depth, width, 2)
    assert flops == pytest.approx(2 * np.mean(visited) * depth * width, rel=0.01)
    assert moved >= 2 * (rows * (depth + width) + groups * depth * width)  # each array once
    flops, moved = gpu.outer_work(rows, groups, depth, width, 2)
    assert flops == pytest.approx(2 * np.mean(steps) * depth * width, rel=0.01)
    assert moved >= 2 * (rows * (depth + width) + groups * depth * width)


@pytest.mark.parametrize("product", ["forward", "drhs"])
def test_a_tile_is_not_copied_over_while_it_is_multiplied(product):
    """Interpreted products are not asynchronous; on the GPU the loop has to wait for them before it copies."""
    lhs, rhs = jnp.zeros((128, 128), jnp.bfloat16), jnp.zeros((2, 128, 64), jnp.bfloat16)
    call = {"forward": gpu.product, "drhs": gpu.outer}[product]
    text = str(jax.make_jaxpr(call)(lhs, rhs if product == "forward" else lhs, jnp.asarray([64, 64])))
    assert text.count("wgmma_wait") == 1
