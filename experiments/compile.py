"""Compiles a stage's step for a machine that is not here, and says what it would need there.

python -m experiments.compile --config=configs/kwaicoder_23b_a4b.py --topology=v5p:4x4x4

Memory, FLOPs and collectives are those of the compiled program; times are a roofline, not a measurement. With --workdir
the figures are stored in WORKDIR/compile/STEP/TOPOLOGY/summary.json. --search tries meshes and remat policies.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import command, compile_kernels, compile_search, compile_steps
from experiments.contract import Context, Stage
from experiments.display import Display
from experiments.stopping import Stop
from experiments.training_stage import runtime_of
from kernels.grouped_matmul.local_experts import OVERFLOW
from kwaicoder_jax import files, hardware
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware import roofline

NAME = "compile"
STAGE = Stage(NAME, lambda context: {})  # a tool; it has no section of its own


def main() -> None:
    """The body of the command."""
    for name, value in hardware.TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    holder = command.define_flags()
    flags.DEFINE_string("topology", None, "The machine, as in v5p:4x4x4, v5e:16x16, h100:8x8.")
    flags.DEFINE_enum("step", "cpt", list(compile_steps.STEPS), "Whose step.")
    flags.DEFINE_bool("search", False, "Try mesh shapes and remat policies, and print the best.")
    flags.DEFINE_string("text", None, "Write the compiled program to this file.")

    def work(stop: Stop, display: Display) -> None:
        display.stage(NAME)
        context = command.tool_context(STAGE, holder.value, {}, {}, stop, display)
        # A step names its folder, and nothing is written there.
        context = dataclasses.replace(context, workdir=context.workdir or files.path("."))
        machine = hardware.topology(flags.FLAGS.topology)
        if flags.FLAGS.search:
            compile_search.run(context, machine, flags.FLAGS.step)
            return
        summary, report = compile_step(context, machine, flags.FLAGS.step, flags.FLAGS.text)
        print(table(machine, report, summary))
        workdir = command.tool_workdir()
        if workdir is not None:
            place = workdir / NAME / flags.FLAGS.step / machine.name.replace(":", "_")
            files.write_json(place / "summary.json", summary)

    command.execute(work, required=("config", "topology"), resumable=False)


def compile_step(
    context: Context, machine: hardware.Topology, step: str, text: str | None = None
) -> tuple[dict[str, Any], roofline.Roofline]:
    """Compiles; returns the documented summary keys, and the whole report."""
    made, began = compile_steps.make(context, step, machine), time.monotonic()
    try:
        compiled = made.function.lower(*made.arguments).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = f"does not fit {machine.name}: {_first_line(error)}"
        raise UserError(what, where="mesh", remedy="a smaller batch, more remat, or more chips") from error
    seconds = time.monotonic() - began
    if text is not None:
        files.write_text(files.path(text), compiled.as_text())
    known = compile_kernels.kernel_work(runtime_of(context, made.mesh))
    flops = made.model_flops / made.mesh.size
    report = roofline.analyze(compiled, machine, made.mesh, flops, known, rare=(OVERFLOW,))
    return summary_of(report) | {"compile_seconds": round(seconds, 1), "chips": made.mesh.size}, report


def summary_of(report: roofline.Roofline) -> dict[str, Any]:
    """The summary keys of docs/summary_keys.md."""
    return {
        "fits": report.fits,
        "hbm_bytes_per_chip": report.hbm_bytes,
        "model_flops_per_chip": report.model_flops,
        "compiled_flops_per_chip": report.work.flops,
        "flops_ratio": report.flops_ratio,
        "collective_bytes_per_chip": report.wire_bytes,
        "collective_hidden_share": report.hidden_share,
        "mfu_bound": report.mfu_bound,
        "bound": report.bound,
        "memory": dict(report.memory),
        "collectives": [dataclasses.asdict(each) for each in report.traffic],
    }


def table(machine: hardware.Topology, report: roofline.Roofline, summary: Mapping[str, Any]) -> str:
    """What a person reads."""
    gigabytes = {name: f"{size / 1e9:.2f}" for name, size in report.memory.items()}
    lines = [
        f"{machine.name}: {summary['chips']} chips, compiled in {summary['compile_seconds']:.0f} s",
        f"memory per chip    {report.hbm_bytes / 1e9:.2f} GB of {report.capacity / 1e9:.2f}"
        f" ({', '.join(f'{name} {size}' for name, size in gigabytes.items())}): "
        + ("fits with a tenth to spare" if report.fits else "DOES NOT FIT with a tenth to spare"),
        f"FLOPs per chip     model {report.model_flops / 1e12:.1f} T, compiled {report.work.flops / 1e12:.1f} T,"
        f" ratio {report.flops_ratio:.3f}",
        f"collectives        {report.wire_bytes / 1e9:.2f} GB on the wire, {report.hidden_share:.0%} behind arithmetic",
    ]
    for each in report.traffic:
        lines.append(
            f"  {each.kind:20s} {'+'.join(each.axes) or '-':16s} x{each.count:<6d} {each.wire_bytes / 1e9:8.2f} GB"
            f" {each.seconds * 1e3:8.1f} ms, hidden {each.hidden_bytes / max(each.wire_bytes, 1):.0%}"
        )
    lines.append(
        f"roofline           compute {report.compute_seconds * 1e3:.0f} ms, HBM {report.memory_seconds * 1e3:.0f} ms,"
        f" interconnect {report.hidden_seconds * 1e3:.0f} ms hidden and {report.exposed_seconds * 1e3:.0f} ms exposed;"
        f" bound by {report.bound}"
    )
    lines.append(f"MFU at most        {report.mfu_bound:.1%}")
    if report.work.unknown_kernels or report.work.unknown_loops:
        unknown = [*report.work.unknown_kernels, *report.work.unknown_loops]
        lines.append(f"not counted        {', '.join(unknown)}")
    return "\n".join(lines)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line), str(error)[:200])[:300]


if __name__ == "__main__":
    main()
