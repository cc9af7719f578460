"""Tiny configs, random models, random batches and a float64 reference, for our tests and for yours.

Nothing here is imported by the rest of the library.
"""

from kwaicoder_jax.testing.batches import random_batch
from kwaicoder_jax.testing.configs import dense_config, family_configs, moe_config, odd_config, small_configs
from kwaicoder_jax.testing.params import random_params
from kwaicoder_jax.testing.reference import reference_logits
from kwaicoder_jax.testing.run import mean_loss, model_logits, run

__all__ = [
    "dense_config",
    "family_configs",
    "mean_loss",
    "model_logits",
    "moe_config",
    "odd_config",
    "random_batch",
    "random_params",
    "reference_logits",
    "run",
    "small_configs",
]
