"""drhs on Hopper (Mosaic GPU): out[g] = lhs[rows of group g]^T @ dout[rows of group g].

One warpgroup a block, persistent over 132 SMs. A tile of 128 x 128 of drhs[g] is summed over the group's rows, 64 at a time:

        lhs   64 rows x 128 of K      dout   64 rows x 128 of N      steps begin at multiples of 64 rows; in the first and
        ------------------------      -------------------------      the last, rows of other groups are set to zero in
        ########################      #########################      shared memory, in the last of both operands

After jax's own `transposed_ragged_dot_mgpu` (jax 0.10.2, Apache 2.0), which masks by multiplication, which NaN passes, and
copies over tiles of shared memory that may still be multiplied.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.grouped_matmul.gpu_tiles import DEPTH, PARAMETERS, SMS, STEPS, place_of

NAME = "grouped_outer_gpu"


def outer_product(
    lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array, *, depth_tile: int, width_tile: int,
    interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N]; zero for a group without rows.

    Args:
      lhs_MK: bfloat16 or float16; M is a multiple of DEPTH.
      dout_MN: of the same dtype.
      group_sizes_G: int32.
      depth_tile: rows of an output tile, which divide K.
      width_tile: its columns, which divide N.
      interpret: as in `rows_product`.
    """
    (rows, depth), width = lhs_MK.shape, dout_MN.shape[1]
    groups, grid = group_sizes_G.shape[0], (depth // depth_tile, width // width_tile)
    ends_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32)
    starts_G = ends_G - group_sizes_G
    first_G = starts_G // DEPTH * DEPTH
    steps_G = jnp.where(group_sizes_G > 0, -(-(ends_G - first_G) // DEPTH), 0)
    # Fixed, not inferred: the masks below rewrite tiles in shared memory.
    transforms = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(2 * DEPTH))

    def body(first_G, start_G, end_G, steps_G, lhs, dout, out) -> None:  # type: ignore[no-untyped-def]
        @plgpu.nd_loop((groups, grid[0] * grid[1]), collective_axes="sm")
        def _(loop: plgpu.NDLoopInfo) -> None:
            group = loop.index[0]
            row, column = place_of(loop.index[1], *grid)
            first = pl.multiple_of(first_G[group], DEPTH)
            before, steps = start_G[group] - first, steps_G[group]
            behind = end_G[group] - first - (steps - 1) * DEPTH

            def accumulate(acc: Any) -> jax.Array:
                def step(index: Any, lhs_smem: Any, dout_smem: Any) -> None:
                    @pl.when(index[0] == 0)
                    def _() -> None:  # rows of the group before: of one operand is enough, they are finite
                        _keep_rows(lhs_smem, lambda row: row >= before)

                    @pl.when(index[0] == steps - 1)
                    def _() -> None:  # rows of the group behind, or of none, which may be NaN
                        _keep_rows(lhs_smem, lambda row: row < behind)
                        _keep_rows(dout_smem, lambda row: row < behind)

                    plgpu.wgmma(acc, plgpu.transpose_ref(lhs_smem, (1, 0)), dout_smem)
                    plgpu.wgmma_wait(1)  # the tiles of the step before are copied over next (delay_release)

                @pl.when(steps > 0)
                def _() -> None:
                    specs = [
                        plgpu.BlockSpec(
                            (DEPTH, tile), functools.partial(_at, place), delay_release=1, transforms=transforms
                        )
                        for tile, place in ((depth_tile, row), (width_tile, column))
                    ]
                    # Slices may end behind the arrays; the steps do not.
                    window = pl.ds(first, rows)
                    plgpu.emit_pipeline(step, grid=(steps,), in_specs=specs, max_concurrent_steps=STEPS)(
                        lhs.at[window, :], dout.at[window, :]
                    )

                return acc[...]

            acc = pl.run_scoped(accumulate, plgpu.ACC((depth_tile, width_tile)))

            @functools.partial(
                pl.run_scoped, out_smem=plgpu.SMEM((depth_tile, width_tile), dtype=out.dtype, transforms=transforms)
            )
            def _(out_smem: Any) -> None:
                out_smem[...] = acc.astype(out_smem.dtype)
                plgpu.commit_smem()
                place = (pl.ds(row * depth_tile, depth_tile), pl.ds(column * width_tile, width_tile))
                plgpu.copy_smem_to_gmem(out_smem, out.at[(group, *place)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((groups, depth, width), lhs_MK.dtype),
        grid=(min(SMS, groups * grid[0] * grid[1]),),
        grid_names=("sm",),
        compiler_params=PARAMETERS,
        interpret=interpret,
        kernel_name=NAME,
    )(first_G, starts_G, ends_G, steps_G, lhs_MK, dout_MN)


def _at(place: Any, step: Any) -> tuple[Any, Any]:
    return step, place


def _keep_rows(tile: Any, kept: Any) -> None:
    """Sets the other rows of a tile to zero."""
    values = tile[...]
    row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0), plgpu.Layout.WGMMA)
    tile[...] = jnp.where(kept(row), values, jnp.zeros_like(values))
    plgpu.commit_smem()
