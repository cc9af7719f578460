"""Orbax checkpoints with a description of what they hold and where it came from; whole models or single tensors."""

from kwaicoder_jax.checkpoints.layout import Spec, chunk_shape
from kwaicoder_jax.checkpoints.partial import PartialStep
from kwaicoder_jax.checkpoints.pieces import MEMORY_BYTES, Piece, Progress, is_finite, write_pieces
from kwaicoder_jax.checkpoints.store import (
    CheckpointStore,
    SaveFailed,
    find,
    is_complete,
    newest_step,
    on_device,
    read_meta,
)
from kwaicoder_jax.checkpoints.tensors import Tensor, Tensors, from_params, open_tensors, read_params

__all__ = [
    "MEMORY_BYTES",
    "CheckpointStore",
    "PartialStep",
    "Piece",
    "Progress",
    "SaveFailed",
    "Spec",
    "Tensor",
    "Tensors",
    "chunk_shape",
    "find",
    "from_params",
    "is_complete",
    "is_finite",
    "newest_step",
    "on_device",
    "open_tensors",
    "read_meta",
    "read_params",
    "write_pieces",
]
