"""Chips: what they can do in a second, and what the roofline makes of it. Knows nothing of models."""

from kwaicoder_jax.hardware.chips import CHIPS, Chip, chip

__all__ = ["CHIPS", "Chip", "chip"]
