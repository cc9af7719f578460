"""What a whole train step of two public mixtures compiles to for TPU pods, beside MaxText's.

python -m benchmarks.compile_step [--rows=mixtral_v5p_1,qwen3_v5p_2] [--json=FILE]

Sequence 4096, full remat, bfloat16 arithmetic, float32 weights and moments. The first line of a row is on MaxText's own mesh
(fsdp over all chips), the second on another one (expert parallelism by tokens). MaxText's figures: e591f30, its own
train_compile, the same jax and libtpu, default flags, dropless megablox. All are static, read off compiled programs.

FLOPs are counted twice: "useful" as MaxText's are (a kernel's own estimate, which leaves out tiles that straddle experts),
and as they are executed.
"""

import argparse
import dataclasses
import json
import os
import time
from typing import Any

import jax

from experiments.compile_kernels import kernel_work
from kernels.grouped_matmul.local_experts import OVERFLOW
from kwaicoder_jax import hardware, models, training
from kwaicoder_jax.hardware import roofline, work

LENGTH = 4096
MIXTRAL = models.ModelConfig(
    vocab_size=32_000, layers=32, model_dim=4096, heads=32, kv_heads=8, head_dim=128, mlp_dim=14_336, tie_embeddings=False,
    dtype="bfloat16", experts=models.ExpertsConfig(8, 2, 14_336),
)  # fmt: skip
QWEN3 = models.ModelConfig(
    vocab_size=151_936, layers=48, model_dim=2048, heads=32, kv_heads=4, head_dim=128, mlp_dim=6144, tie_embeddings=False,
    dtype="bfloat16", qk_norm=models.QkNorm.HEAD,
    experts=models.ExpertsConfig(128, 8, 768, models.Router.SOFTMAX_TOPK_RENORMALISED),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A model on a machine, and what MaxText compiles to there, per chip.

    Attributes:
      model: the mixture.
      topology: the machine.
      batch: rows a chip.
      experts: of the expert axis of the best mesh.
      gigabytes: MaxText's arguments and temporaries.
      flops_ratio: compiled over model FLOPs.
      wire: its bytes on the wire, in GB: payload of gathers, and twice that of all-reduces.
      stage: see `models.Runtime.scatter_stage`.
    """

    model: models.ModelConfig
    topology: str
    batch: int
    experts: int
    gigabytes: float
    flops_ratio: float
    wire: float
    stage: int = 0


ROWS = {
    "mixtral_v5p_1": Row(MIXTRAL, "v5p:4x4x4", 1, 8, 8.76 + 14.52, 1.350, 188.7 + 2 * 93.1),
    "mixtral_v5p_4": Row(MIXTRAL, "v5p:4x4x4", 4, 4, 8.76 + 24.19, 1.350, 188.7 + 2 * 93.1),
    "qwen3_v5p_2": Row(QWEN3, "v5p:4x4x4", 2, 4, 5.73 + 9.89, 1.411, 122.1 + 2 * 60.4),
    "qwen3_v5p_4": Row(QWEN3, "v5p:4x4x4", 4, 4, 5.73 + 18.19, 1.411, 122.1 + 2 * 60.4),
    "mixtral_v5e_1": Row(MIXTRAL, "v5e:16x16", 1, 4, 2.19 + 9.92, 1.350, 187.1 + 2 * 94.8, 16),
    "qwen3_v5e_1": Row(QWEN3, "v5e:16x16", 1, 4, 1.43 + 6.06, 1.411, 116.6 + 2 * 66.0, 16),
}


def compiled(row: Row, experts: int) -> dict[str, Any]:
    """Figures of one row, with an expert axis of so many chips."""
    machine = hardware.topology(row.topology)
    chips = len(machine.devices)
    mesh = training.make_mesh(training.MeshConfig(1, chips // experts, experts), machine.devices)
    runtime = models.Runtime(
        remat="full", platform="tpu", dispatch="tokens" if experts > 1 else "weights", scatter_stage=row.stage
    )

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        del frozen
        balance = training.BalanceConfig()
        return training.language_model_loss(trainable["model"], row.model, batch, runtime=runtime, balance=balance)

    rate = training.join([training.PhaseRate(steps=1000, peak=1e-4)])
    optimizer = training.make_optimizer(training.OptimizerConfig(), rate, row.model)
    trainable = {"model": training.abstract_params(row.model, mesh)}
    shardings = training.state_shardings(trainable, optimizer, row.model, mesh)
    state = jax.eval_shape(lambda tree: training.make_state(tree, optimizer), trainable)
    step: Any = training.make_step(loss, optimizer, rate, shardings, training.compiler_options(mesh))
    batch = training.abstract_batch((row.batch * chips, LENGTH), training.batch_sharding(mesh))
    began = time.monotonic()
    program = step.lower(training.abstract_state(state, shardings), batch, {}).compile()
    flops = models.train_flops_per_token(row.model, LENGTH) * row.batch * LENGTH
    known = kernel_work(runtime)

    def as_estimated(kernel: work.Kernel) -> tuple[float, float] | None:
        return kernel.estimate or known(kernel)

    useful, executed = (
        roofline.analyze(program, machine, mesh, flops, each, rare=(OVERFLOW,)) for each in (as_estimated, known)
    )
    return {
        "mesh": f"fsdp {chips // experts}" + (f" x expert {experts}" if experts > 1 else ""),
        "gigabytes": sum(executed.memory[name] for name in ("arguments", "temporaries")) / 1e9,
        "wire_gigabytes": executed.wire_bytes / 1e9,
        "hidden": executed.hidden_share,
        "useful_ratio": useful.flops_ratio,
        "executed_ratio": executed.flops_ratio,
        "mfu_bound": executed.mfu_bound,
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Prints the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="of the table, separated by commas")
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()
    for name, value in hardware.TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    found = []
    columns = (
        "row", "mesh", "memory, GB (MaxText)", "wire, GB (MaxText)", "ratio", "hidden",
        "FLOPs useful / executed (MaxText)", "MFU at most",
    )  # fmt: skip
    print("| " + " | ".join(columns) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.rows.split(","):
        row = ROWS[name]
        for experts in (1, row.experts):
            got = compiled(row, experts)
            found.append({"row": name, **got})
            print(
                f"| {name} | {got['mesh']} | {got['gigabytes']:.1f} ({row.gigabytes:.1f}) | {got['wire_gigabytes']:.1f}"
                f" ({row.wire:.1f}) | {got['wire_gigabytes'] / row.wire:.2f} | {got['hidden']:.0%} |"
                f" {got['useful_ratio']:.3f} / {got['executed_ratio']:.3f} ({row.flops_ratio:.3f}) |"
                f" {got['mfu_bound']:.0%} |",
                flush=True,
            )
            if arguments.json:  # a row at a time: a compilation takes minutes
                with open(arguments.json, "w") as file:
                    json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
