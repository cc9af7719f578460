"""Pure functions (params, config, ...) -> (params, config, record): importance, pruning, splitting, merging, upcycling.

Each is driven by the axes that the model declares, keeps the kind of its arrays (numpy stays numpy, sharded stays on
its devices), and returns a JSON-able record of what it did.
"""

from kwaicoder_jax.transforms import (
    coactivation,
    fold,
    importance,
    merge,
    optimizer_state,
    partition,
    prune,
    router_init,
    search,
    shapes,
    split,
    streaming,
    upcycle,
    verify,
)
from kwaicoder_jax.transforms.scores import Scores
from kwaicoder_jax.transforms.target import Target

__all__ = [
    "Scores",
    "Target",
    "coactivation",
    "fold",
    "importance",
    "merge",
    "optimizer_state",
    "partition",
    "prune",
    "router_init",
    "search",
    "shapes",
    "split",
    "streaming",
    "upcycle",
    "verify",
]
