"""Examples packed into rows, and rows as a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

Batch = dict[str, np.ndarray]


def pack(
    examples: grain.IterDataset, window: int, rows: int, pad: int, *, seed: int | None = None
) -> grain.IterDataset:
    """Packs {"pair": [length, 2]} into rows of `window` places, first fit, `rows` at a time.

    With a seed, the rows of one packing come in a random order (the first ones are fuller); without, in order.
    """
    return FirstFitPackIterDataset(
        examples,
        length_struct={"pair": window},
        num_packing_bins=rows,
        shuffle_bins=seed is not None,
        seed=seed or 0,
        padding_struct={"pair": pad},
    )


def batch(rows: Sequence[Mapping[str, Any]]) -> Batch:
    """Returns packed rows as arrays [rows, window]: int32 inputs, targets, segment_ids, positions; float32 loss_mask.

    Segment 0 is padding, segments count from 1 in each row, positions from 0 in each segment.
    """
    pair = np.stack([row["pair"] for row in rows])
    segments = np.stack([row["pair_segment_ids"] for row in rows])
    return {
        "inputs": np.ascontiguousarray(pair[..., 0]),
        "targets": np.ascontiguousarray(pair[..., 1]),
        "segment_ids": segments,
        "positions": np.stack([row["pair_positions"] for row in rows]),
        "loss_mask": (segments != 0).astype(np.float32),
    }
