"""Forward and dlhs on TPU: out[rows of group g] = lhs[rows of group g] @ rhs[g], the plainest plan of `tpu_rows`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kernels.grouped_matmul.scaled import Matrices
from kernels.grouped_matmul.tpu_plan import Out, Plan
from kernels.grouped_matmul.tpu_rows import grouped_rows
from kernels.grouped_matmul.tpu_tiles import Chip, ProductTiles

NAME = "grouped_product"


def grouped_product(
    lhs_MK: jax.Array, rhs_GKN: Matrices, group_sizes_G: jax.Array, *,
    transpose_rhs: bool, tiles: ProductTiles, here: Chip, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """See `tpu.product`; M, K and N are multiples of the tiles."""
    dtype = lhs_MK.dtype

    def finish(parts: Sequence[jax.Array], *_: Any) -> list[jax.Array]:
        return [parts[0].astype(dtype)]

    plan = Plan(NAME, ((0, 0),), (((0, 0),),), (Out(dtype),), finish, transpose_rhs)
    width = rhs_GKN.shape[1 if transpose_rhs else 2]
    return grouped_rows(
        [lhs_MK], [rhs_GKN], group_sizes_G, plan, width=width, dtype=dtype, tiles=tiles, here=here,
        interpret=interpret,
    )[0]  # fmt: skip
