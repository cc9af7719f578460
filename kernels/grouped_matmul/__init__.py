"""Rows grouped by expert times one matrix per expert, with gradients, and the expert MLP fused from it."""

from kernels.grouped_matmul.api import PLATFORMS, Backend, grouped_matmul
from kernels.grouped_matmul.capped_experts import capped_expert_mlp
from kernels.grouped_matmul.exchanged_experts import exchanged_expert_mlp
from kernels.grouped_matmul.expert_mlp import expert_mlp, expert_rows
from kernels.grouped_matmul.local_experts import local_expert_mlp
from kernels.grouped_matmul.mlp_types import PROJECTIONS
from kernels.grouped_matmul.scaled import ScaledMatrices, quantize

__all__ = [
    "PLATFORMS",
    "PROJECTIONS",
    "Backend",
    "ScaledMatrices",
    "capped_expert_mlp",
    "exchanged_expert_mlp",
    "expert_mlp",
    "expert_rows",
    "grouped_matmul",
    "local_expert_mlp",
    "quantize",
]
