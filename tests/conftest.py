"""Settings for every test: a shape mistake is an error, not a broadcast, and nothing asks the network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a TPU or GPU run of the tests sets it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
