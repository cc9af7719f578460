"""Settings for every test: a shape mistake is an error, not a broadcast, and nothing asks the network."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a TPU or GPU run of the tests sets it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import pathlib

import hypothesis
import jax
import pytest

# The same examples in every run, so that a change is to blame when a test turns red; HYPOTHESIS_PROFILE=explore draws others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("explore", derandomize=False, max_examples=200)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

jax.config.update("jax_numpy_rank_promotion", "raise")

MOST_MAPPINGS = 30_000  # of memory; Linux allows a process 65,530, and each compiled program takes some


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs():
    """Lets compiled programs go before there are too many: the compiler crashes where it gets no further mapping."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
