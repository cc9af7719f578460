"""Rows from token order to expert order and back, see `api`; between devices, see `exchange`."""

from kernels.routing.api import ORDER, Routing, combine, permute, sort_by_expert

__all__ = ["ORDER", "Routing", "combine", "permute", "sort_by_expert"]
