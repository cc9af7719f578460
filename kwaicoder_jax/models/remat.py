"""Names of what a layer may keep for its backward pass, and which of them each policy keeps.

`jax.checkpoint` saves what carries a name that its policy lists, and computes the rest again.
"""

import enum
from collections.abc import Mapping

from jax.ad_checkpoint import checkpoint_name

from kernels.grouped_matmul import PROJECTIONS
from kernels.routing import ORDER

ATTENTION = "attention"  # its output by heads, and the sums of its rows
HEADS = "heads"  # queries, keys and values
MIXED = "mixed"  # what attention adds to the residual stream

named = checkpoint_name


class Remat(enum.StrEnum):
    """What a layer keeps for its backward pass, from most to least memory."""

    NONE = "none"  # everything
    PRODUCTS = "products"  # the outputs of matrix products and of attention
    PROJECTIONS = "projections"  # of MLPs and experts, and attention's; queries, keys and values are made again
    ATTENTION = "attention"  # attention's output
    FULL = "full"  # its input


_KEPT: Mapping[Remat, tuple[str, ...]] = {
    Remat.FULL: (),
    Remat.ATTENTION: (ATTENTION,),
    Remat.PROJECTIONS: (ATTENTION, MIXED, PROJECTIONS, ORDER),
    Remat.PRODUCTS: (ATTENTION, MIXED, PROJECTIONS, ORDER, HEADS),
}


def kept(policy: Remat) -> tuple[str, ...]:
    """The names that are saved."""
    return _KEPT[policy]
