"""Orbax checkpoints with a description of what they hold and where it came from."""

from kwaicoder_jax.checkpoints.store import CheckpointStore, find, on_device, read_meta, read_params

__all__ = ["CheckpointStore", "find", "on_device", "read_meta", "read_params"]
