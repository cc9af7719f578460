"""Cleaning: which documents are worth training on, and their texts without banners, secrets and personal data."""

from kwaicoder_jax.data.cleaning.rules import DEFAULT as DEFAULT_RULES
from kwaicoder_jax.data.cleaning.rules import Rule
from kwaicoder_jax.data.cleaning.stage import Cleaner
from kwaicoder_jax.data.cleaning.statistics import Statistics, measure

__all__ = ["DEFAULT_RULES", "Cleaner", "Rule", "Statistics", "measure"]
