"""Groups split over 4 devices, every row on all of them, against float64; prints the largest errors as JSON."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from kernels.grouped_matmul import grouped_matmul
from tests.kernels import exact

SIZES = [9, 0, 30, 1, 0, 0, 17, 40]  # the third device has no row at all in one of its groups, and none in the other
ROWS, DEPTH, WIDTH = 110, 6, 5


def errors(backend: str) -> list[float]:
    """Of output, dlhs and drhs, over the largest entry of each."""
    mesh = Mesh(np.asarray(jax.devices()), ("expert",))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("expert"), P()), out_specs=P(), check_vma=False
    )  # pallas calls do not say along which axes they vary
    def split(lhs_MK: jax.Array, rhs_HKN: jax.Array, sizes_G: jax.Array) -> jax.Array:
        """Own rows first, as many as own groups have; the others are rows of no group."""
        here = rhs_HKN.shape[0]
        first = jax.lax.axis_index("expert") * here
        offset = jnp.sum(jnp.where(jnp.arange(sizes_G.shape[0]) < first, sizes_G, 0))
        own_H = jax.lax.dynamic_slice_in_dim(sizes_G, first, here)
        out_MN = grouped_matmul(jnp.roll(lhs_MK, -offset, axis=0), rhs_HKN, own_H, backend=backend)
        return jax.lax.psum(jnp.roll(out_MN, offset, axis=0), "expert")

    rng = np.random.default_rng(0)
    shapes = [(ROWS, DEPTH), (len(SIZES), DEPTH, WIDTH), (ROWS, WIDTH)]
    lhs, rhs, dout = (rng.normal(size=shape).astype(np.float32) for shape in shapes)

    @jax.jit
    def run(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(lambda a, b: split(a, b, sizes), lhs, rhs)
        return out, *pull(dout)

    got = run(*(jnp.asarray(array) for array in (lhs, rhs, np.int32(SIZES), dout)))
    wanted = exact.products(lhs, rhs, SIZES, dout)
    return [float(np.abs(have - want).max() / np.abs(want).max()) for have, want in zip(got, wanted, strict=True)]


if __name__ == "__main__":
    print(json.dumps({backend.value: errors(backend.value) for backend in exact.BACKENDS}))
