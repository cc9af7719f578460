"""Training texts that are made from others, and verified by running them."""

from kwaicoder_jax.data.synthesis.functions import Task, tasks
from kwaicoder_jax.data.synthesis.mutations import Mutant, mutants
from kwaicoder_jax.data.synthesis.verified import Settings, verified

__all__ = ["Mutant", "Settings", "Task", "mutants", "tasks", "verified"]
