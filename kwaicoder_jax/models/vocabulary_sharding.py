"""The vocabulary on a mesh. A loss: the projections come to the tokens, once, and their gradients go back once.

Left to XLA, a loop over slices of time gathers the projection and adds up its gradient over all devices in every slice,
and an embedding's gradient is added up whole where rows are split along another axis too than channels are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from kwaicoder_jax.models.mesh_axes import (
    EMBED_AXIS,
    TENSOR_AXIS,
    batch_spec,
    scattered,
    token_axes,
    token_mesh,
    weight_axis,
)

# What is scattered at a time. libtpu 0.0.42 scatters an array where the tiles of a device's part are many small factors, as
# with rows in thousands, and sums it whole elsewhere (151,936 = 128 x 1187); with few elements less memory is held.
SCATTERED_ELEMENTS, SCATTERED_ROWS = 2**24, 2048

# (token arrays, projections [V, D], mesh axis over which V is split or None) -> (token arrays, sums like projections)
LocalLoss = Callable[[Sequence[jax.Array], Sequence[jax.Array], str | None], tuple[Any, Sequence[jax.Array]]]


def on_each_device(
    function: LocalLoss, tokens: Sequence[jax.Array], projections: Sequence[jax.Array], *, sums: int, stage: int = 0
) -> tuple[Any, Sequence[jax.Array]]:
    """Calls `function` with each device's tokens and the whole width of its part of the vocabulary.

    Args:
      function: see LocalLoss. Where it is told an axis, rows of V on other devices are missing from its sums.
      tokens: arrays [B, T, ...] that are split as the batch is.
      projections: matrices [V, D] in the dtype of the computation.
      sums: for how many of the projections, the first ones, `function` returns a sum.
      stage: devices among which a sum is scattered at a time, see `mesh_axes.gathered`.

    Returns:
      What `function` returns: token arrays as the batch is split, and the sums (over all tokens) as the projections are.
    """
    mesh = token_mesh(tokens[0], tokens[0].shape[0])
    if mesh is None:
        return function(tokens, projections, None)
    rows = batch_spec(mesh)
    vocab, *embeds = _axes(mesh, projections)

    def local(tokens: Sequence[jax.Array], parts: Sequence[jax.Array]) -> tuple[Any, Sequence[jax.Array]]:
        whole = [
            x_VD if axis is None else jax.lax.all_gather(x_VD, axis, axis=1, tiled=True)
            for x_VD, axis in zip(parts, embeds, strict=True)
        ]
        per_token, parts = function(tokens, whole, vocab)
        added_up = [_added_up(mesh, x_VD, axis, stage) for x_VD, axis in zip(parts, embeds)]
        # What goes on to the layers waits for the sums: a compiler that runs collectives alone (v5e's) would else do it
        # last, and hold a sum of the whole width through the backward pass.
        return jax.lax.optimization_barrier((per_token, added_up))

    specs = [PartitionSpec(vocab, axis) for axis in embeds]
    # check_vma would want the zeros that start the sums to be marked as varying over the mesh.
    out_specs = (rows, specs[:sums])
    return jax.shard_map(
        local, mesh=mesh, in_specs=([rows for _ in tokens], specs), out_specs=out_specs, check_vma=False
    )(list(tokens), list(projections))


def looked_up(table_VD: jax.Array, tokens_BT: jax.Array, dtype: str) -> jax.Array:
    """Embeddings [B, T, D] in `dtype`. Each device looks up its channels for the tokens of all that share its rows' axis."""
    mesh = token_mesh(tokens_BT, tokens_BT.shape[0])
    axis = None if mesh is None else weight_axis(mesh, EMBED_AXIS, table_VD.shape[1])
    if mesh is None or axis is None or mesh.shape[axis] == 1 or mesh.shape.get(TENSOR_AXIS, 1) > 1:
        return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)

    def local(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        tokens_NT = jax.lax.all_gather(tokens_BT, axis, axis=0, tiled=True)
        x_NTD = jnp.take(table_VD, tokens_NT, axis=0).astype(dtype)
        return jax.lax.all_to_all(x_NTD, axis, split_axis=0, concat_axis=2, tiled=True)

    rows = batch_spec(mesh)
    return jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec(None, axis), rows), out_specs=rows, check_vma=False)(
        table_VD, tokens_BT
    )


def can_split(x_BTD: jax.Array, *, vocabulary: bool) -> bool:
    """Whether `on_each_device` would split anything; without `vocabulary`, only where the vocabulary stays whole."""
    mesh = token_mesh(x_BTD, x_BTD.shape[0])
    return mesh is not None and (vocabulary or mesh.shape.get(TENSOR_AXIS, 1) == 1)


def _axes(mesh: AbstractMesh, projections: Sequence[jax.Array]) -> list[str | None]:
    """The mesh axis of the vocabulary, the same for all, and that of each one's width."""
    vocabs = {weight_axis(mesh, TENSOR_AXIS, x_VD.shape[0]) for x_VD in projections}
    vocab = vocabs.pop() if len(vocabs) == 1 else None
    return [vocab, *(weight_axis(mesh, EMBED_AXIS, x_VD.shape[1]) for x_VD in projections)]


def _added_up(mesh: AbstractMesh, sum_VD: jax.Array, axis: str | None, stage: int) -> jax.Array:
    """The sum over all devices' tokens; each keeps its own columns."""
    if axis is not None:
        parts = [scattered(x_VD, axis, 1, stage) for x_VD in _slices(sum_VD)]
        sum_VD = jnp.concatenate(parts)[: sum_VD.shape[0]]
    rest = tuple(each for each in token_axes(mesh) if each != axis)
    return jax.lax.psum(sum_VD, rest) if rest else sum_VD


def _slices(x_VD: jax.Array) -> list[jax.Array]:
    """Rows of about SCATTERED_ELEMENTS, rounded up to whole SCATTERED_ROWS; zeros behind the last."""
    vocab, width = x_VD.shape
    parts = -(-vocab * width // SCATTERED_ELEMENTS)
    step = -(-vocab // (parts * SCATTERED_ROWS)) * SCATTERED_ROWS
    padded_VD = jnp.pad(x_VD, ((0, -vocab % SCATTERED_ROWS), (0, 0)))
    return [padded_VD[first : first + step] for first in range(0, vocab, step)]
