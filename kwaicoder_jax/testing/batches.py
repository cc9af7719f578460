"""Random packed batches, laid out as `data` packs documents."""

import numpy as np

from kwaicoder_jax.models import ModelConfig


def random_batch(
    config: ModelConfig, batch: int, time: int, seed: int = 0, *, packed: bool = True
) -> dict[str, np.ndarray]:
    """A batch of random tokens as the trainer sees it.

    Args:
      config: only its vocabulary size matters.
      batch: rows.
      time: tokens per row; 4 or more where `packed`.
      seed: any non-negative integer.
      packed: 2 to 4 documents per row and at least one position of padding at its end; else one document that fills
        the row, without padding.

    Returns:
      "inputs", "targets" (the token after each input, within its document), "segment_ids" (1, 2, ... and 0 in the
      padding), "positions" (from 0 in each document): int32 [batch, time]; "loss_mask": float32, 1 outside the padding.
    """
    rng = np.random.default_rng((seed, batch, time))
    names = ("inputs", "targets", "segment_ids", "positions")
    arrays = {name: np.zeros((batch, time), np.int32) for name in names}
    for row in range(batch):
        start = 0
        for segment, length in enumerate(_lengths(rng, time) if packed else [time], start=1):
            tokens = rng.integers(0, config.vocab_size, length + 1)  # the last one is a target only
            here = (row, slice(start, start + length))
            arrays["inputs"][here], arrays["targets"][here] = tokens[:-1], tokens[1:]
            arrays["segment_ids"][here], arrays["positions"][here] = segment, np.arange(length)
            start += length
    return arrays | {"loss_mask": (arrays["segment_ids"] > 0).astype(np.float32)}


def _lengths(rng: np.random.Generator, time: int) -> list[int]:
    """Lengths of 2 to 4 documents that leave 1 to time / 4 positions of padding."""
    used = time - int(rng.integers(1, max(2, time // 4 + 1)))
    cuts = rng.choice(np.arange(1, used), size=min(int(rng.integers(1, 4)), used - 1), replace=False)
    return np.diff([0, *sorted(cuts), used]).tolist()
