"""tokamax's kernels behind our interface: interpreted against float64, and what is said without tokamax."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from kernels.grouped_matmul import Backend, grouped_matmul, tokamax
from tests.kernels import exact

V5E = AbstractMesh((1,), ("device",), abstract_device=AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu"))
INTERPRET = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise")


@pytest.mark.parametrize(
    ("sizes", "rows", "depth", "width", "dtype"),
    [
        ([37, 0, 5, 3, 0, 150, 40], 320, 256, 128, jnp.bfloat16),  # many groups in a tile, empty ones, a tail
        ([0, 100, 30], 130, 100, 140, jnp.float32),  # rows and widths that no tile divides
    ],
)
def test_against_float64(sizes, rows, depth, width, dtype):
    pytest.importorskip("tokamax")
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((rows, depth), (len(sizes), depth, width), (rows, width))]
    lhs, rhs, dout = (np.array(jnp.asarray(array, dtype).astype(jnp.float32)) for array in arrays)
    wanted = exact.products(lhs, rhs, sizes, dout)
    lhs[sum(sizes) :], dout[sum(sizes) :] = np.nan, np.nan  # reach nothing
    lhs, rhs, dout = (jnp.asarray(array, dtype) for array in (lhs, rhs, dout))
    sizes = jnp.asarray(sizes, jnp.int32)
    product = functools.partial(tokamax.product, interpret=INTERPRET)
    with jax.sharding.use_abstract_mesh(V5E), jax.numpy_rank_promotion("allow"):
        got = (
            product(lhs, rhs, sizes),
            product(dout, rhs, sizes, transpose_rhs=True),
            tokamax.outer(lhs, dout, sizes, interpret=INTERPRET),
        )
    # float32: sums of up to `depth` products. bfloat16: one rounding at the end of a float32 sum.
    close = {"rtol": 1e-5, "atol": 1e-5 * rows**0.5} if dtype == jnp.float32 else {"rtol": 2**-8, "atol": 1e-4}
    for name, have, want in zip(("out", "dlhs", "drhs"), got, wanted, strict=True):
        assert have.dtype == dtype
        np.testing.assert_allclose(np.asarray(have.astype(jnp.float32)), want, err_msg=name, **close)


def test_the_enum_takes_its_kernels_and_not_xla():
    pytest.importorskip("tokamax")
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 128), (4, 128, 128))]

    def loss(lhs, rhs, sizes):
        return jnp.sum(grouped_matmul(lhs, rhs, sizes, backend=Backend.TOKAMAX).astype(jnp.float32))

    with jax.sharding.use_abstract_mesh(V5E), jax.numpy_rank_promotion("allow"):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(*arrays, jax.ShapeDtypeStruct((4,), jnp.int32))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "ragged_dot" not in text
    assert {"gmm_megablox_transpose_rhs", "tgmm_megablox"} <= set(text.replace('"', " ").split())


def test_without_tokamax_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.ragged_dot", None)
    with pytest.raises(ValueError, match=r"^backend: tokamax is not installed: pip install tokamax==0\.0\.12(\n|$)"):
        grouped_matmul(jnp.ones((8, 128)), jnp.ones((1, 128, 128)), jnp.asarray([8]), backend="tokamax")
