"""Pure functions (params, config, ...) -> (params, config, record): importance, pruning, splitting, merging, upcycling.

Each is driven by the axes that the model declares, keeps the kind of its arrays (numpy stays numpy, sharded stays on
its devices), and returns a JSON-able record of what it did.
"""

from kwaicoder_jax.transforms import importance, merge, prune, split, streaming, upcycle, verify
from kwaicoder_jax.transforms.prune import Target
from kwaicoder_jax.transforms.scores import Scores

__all__ = ["Scores", "Target", "importance", "merge", "prune", "split", "streaming", "upcycle", "verify"]
