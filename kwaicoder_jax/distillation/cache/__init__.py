"""A teacher's top-K logits on disk, found by what an example says: readable in any batch shape and order."""

from kwaicoder_jax.distillation.cache.format import Header
from kwaicoder_jax.distillation.cache.reader import CacheReader
from kwaicoder_jax.distillation.cache.writer import CacheWriter, finish

__all__ = ["CacheReader", "CacheWriter", "Header", "finish"]
