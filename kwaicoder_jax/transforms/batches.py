"""What is read of a batch of calibration data."""

from collections.abc import Mapping
from typing import Any

from kwaicoder_jax.errors import UserError

Batch = Mapping[str, Any]  # the entries below, [B, T] each; others are not read
TOKENS = ("inputs", "positions", "segment_ids")  # int32; segment 0 is padding
TARGETS = (*TOKENS, "targets", "loss_mask")


def entries(batch: Batch, number: int, names: tuple[str, ...] = TOKENS) -> tuple[Any, ...]:
    """The arrays of those names; a UserError that names the first one that batch `number` lacks."""
    if not isinstance(batch, Mapping):
        remedy = f"give a list of mappings, each with {', '.join(names)}: [B, T] each"
        raise UserError(f"batch {number} is {type(batch).__name__}, not a mapping", where="batches", remedy=remedy)
    for name in names:
        if name not in batch:
            raise UserError(f"batch {number} has no {name!r}", where="batches", remedy=f"it has {sorted(batch)}")
    return tuple(batch[name] for name in names)
