"""Orbax checkpoints with a description of what they hold and where it came from; whole models or single tensors."""

from kwaicoder_jax.checkpoints.layout import Spec
from kwaicoder_jax.checkpoints.partial import PartialStep
from kwaicoder_jax.checkpoints.store import (
    CheckpointStore,
    find,
    is_complete,
    newest_step,
    on_device,
    read_meta,
)
from kwaicoder_jax.checkpoints.tensors import Tensor, Tensors, from_params, open_tensors, read_params

__all__ = [
    "CheckpointStore",
    "PartialStep",
    "Spec",
    "Tensor",
    "Tensors",
    "find",
    "from_params",
    "is_complete",
    "newest_step",
    "on_device",
    "open_tensors",
    "read_meta",
    "read_params",
]
