"""Machines: chips, topologies that are not here, and the roofline of what was compiled for them. Knows nothing of models."""

from kwaicoder_jax.hardware.chips import CHIPS, Chip, chip, chip_of
from kwaicoder_jax.hardware.topologies import TPU_ENVIRONMENT, Topology, compiler_options, topology

__all__ = ["CHIPS", "TPU_ENVIRONMENT", "Chip", "Topology", "chip", "chip_of", "compiler_options", "topology"]
