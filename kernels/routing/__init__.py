"""Tokens to experts and back: `api`, its moves in `moves`; between devices: `exchange`; with a limit: `capacity`."""

from kernels.routing.api import (
    ORDER,
    PLATFORMS,
    Backend,
    Routing,
    combine,
    permute,
    sort_by_expert,
    take_experts,
    top_experts,
)

__all__ = [
    "ORDER", "PLATFORMS", "Backend", "Routing", "combine", "permute", "sort_by_expert", "take_experts", "top_experts",
]  # fmt: skip
