"""Rows from token order to expert order and back: `api`; between devices: `exchange`; with a limit: `capacity`."""

from kernels.routing.api import ORDER, Routing, combine, permute, sort_by_expert

__all__ = ["ORDER", "Routing", "combine", "permute", "sort_by_expert"]
