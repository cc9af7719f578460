"""Text out of a model: sampling, and generation of many prompts in compiled batches with a cache of keys and values."""

from kwaicoder_jax.inference.decoding import decode, prefill
from kwaicoder_jax.inference.generation import generate
from kwaicoder_jax.inference.sampling import choose_tokens, nucleus, row_keys

__all__ = ["choose_tokens", "decode", "generate", "nucleus", "prefill", "row_keys"]
