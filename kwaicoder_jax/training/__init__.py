"""Mesh and sharding rules, optimizer, schedule, state, step, loop, metrics."""

from kwaicoder_jax.training import processes, timeline
from kwaicoder_jax.training.guard import Diverged, Guard, SpikeConfig
from kwaicoder_jax.training.loop import Loop, LoopConfig, Preempted
from kwaicoder_jax.training.losses import (
    BalanceConfig,
    balance_loss,
    language_model_loss,
    load_balance_loss,
    move_biases,
    router_metrics,
    run_model,
)
from kwaicoder_jax.training.mesh import (
    BATCH_AXES,
    RULES,
    MeshConfig,
    abstract_params,
    batch_sharding,
    check_rows,
    compiler_options,
    make_mesh,
    own_rows,
    param_shardings,
    partition,
    platform_of,
    replicated,
    row_share,
    shard_batch,
    share_of,
)
from kwaicoder_jax.training.metrics import TIME_KEYS, MetricsLog, read_metrics
from kwaicoder_jax.training.optimizer import OptimizerConfig, make_optimizer
from kwaicoder_jax.training.resuming import Progress, abstract_batch
from kwaicoder_jax.training.schedule import Law, PhaseRate, join, phase_rate
from kwaicoder_jax.training.state import TrainState, abstract_state, make_state, state_shardings
from kwaicoder_jax.training.step import HeldOutLoss, Interrupted, LossFunction, StepFunction, make_step

__all__ = [
    "BATCH_AXES",
    "RULES",
    "TIME_KEYS",
    "BalanceConfig",
    "Diverged",
    "Guard",
    "HeldOutLoss",
    "Interrupted",
    "Law",
    "Loop",
    "LoopConfig",
    "LossFunction",
    "MeshConfig",
    "MetricsLog",
    "OptimizerConfig",
    "PhaseRate",
    "Preempted",
    "Progress",
    "SpikeConfig",
    "StepFunction",
    "TrainState",
    "abstract_batch",
    "abstract_params",
    "abstract_state",
    "balance_loss",
    "batch_sharding",
    "check_rows",
    "compiler_options",
    "join",
    "language_model_loss",
    "load_balance_loss",
    "make_mesh",
    "make_optimizer",
    "make_state",
    "make_step",
    "move_biases",
    "own_rows",
    "param_shardings",
    "partition",
    "phase_rate",
    "platform_of",
    "processes",
    "read_metrics",
    "replicated",
    "router_metrics",
    "row_share",
    "run_model",
    "shard_batch",
    "share_of",
    "state_shardings",
    "timeline",
]
