"""Rows grouped by expert times one matrix per expert, with gradients, and the expert MLP fused from it."""

from kernels.grouped_matmul.api import Backend, grouped_matmul
from kernels.grouped_matmul.expert_mlp import expert_mlp, expert_rows

__all__ = ["Backend", "expert_mlp", "expert_rows", "grouped_matmul"]
