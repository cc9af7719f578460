"""Compiles a stage's step for a machine that is not here, and says what it would need there.

python -m experiments.compile --config=configs/kwaicoder_23b_a4b.py --topology=v5p:4x4x4
python -m experiments.compile --config=configs/kwaicoder_23b_a4b.py --topology=v5p:2x2x1 --step=generate --rows=64

The batch is that of the step's first phase, or of --phase. Memory, FLOPs and collectives are those of the compiled
program; times are a roofline, not a measurement. With --workdir the figures are stored in
WORKDIR/compile/STEP/TOPOLOGY/summary.json. --search tries meshes and remat policies.
"""

import dataclasses
import os
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from experiments import command, compile_generate, compile_kernels, compile_search, compile_steps
from experiments.contract import Context, Section, Stage
from experiments.display import Display
from experiments.stopping import Stop
from experiments.training_stage import runtime_from, runtime_of
from kernels.grouped_matmul.local_experts import OVERFLOW
from kwaicoder_jax import files, hardware
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware import roofline
from kwaicoder_jax.hardware.work import KernelWork
from kwaicoder_jax.inference.sampling import DRAWING

NAME = "compile"
RARE = (OVERFLOW, DRAWING)  # further passes of very uneven routing; draws that greedy decoding does not make
STAGE = Stage(NAME, lambda context: {})  # a tool; it has no section of its own


def main() -> None:
    """The body of the command."""
    for name, value in hardware.TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    holder = command.define_flags()
    flags.DEFINE_string("topology", None, "The machine, as in v5p:4x4x4, v5e:16x16, h100:8x8.")
    flags.DEFINE_enum("step", "cpt", [*compile_steps.STEPS, compile_generate.NAME], "Whose step.")
    flags.DEFINE_string("phase", None, "The phase whose batches it works on; the first one unless given.")
    flags.DEFINE_bool("search", False, "Try mesh shapes and remat policies, and print the best.")
    flags.DEFINE_string("text", None, "Write the compiled program to this file.")
    compile_generate.define_flags()

    def work(stop: Stop, display: Display) -> None:
        display.stage(NAME)
        context = command.tool_context(STAGE, holder.value, {}, {}, stop, display)
        machine, step = hardware.topology(flags.FLAGS.topology), flags.FLAGS.step
        _check_flags(step)
        context = dataclasses.replace(context, config=of_phase(context.config, step, flags.FLAGS.phase))
        if flags.FLAGS.search:
            compile_search.run(context, machine, step)
            return
        if step == compile_generate.NAME:
            summary, shown = compile_engine(context, machine, flags.FLAGS.text)
        else:
            summary, report = compile_step(context, machine, step, flags.FLAGS.text)
            shown = table(machine, report, summary)
        print(shown)
        workdir = command.tool_workdir()
        if workdir is not None:
            place = workdir / NAME / step / machine.name.replace(":", "_")
            files.write_json(place / "summary.json", summary)

    command.execute(work, required=("config", "topology"), resumable=False)


def _check_flags(step: str) -> None:
    """UserError for flags that say nothing about the step."""
    if step in compile_steps.STEPS:
        for name in compile_generate.FLAGS:
            if flags.FLAGS[name].present:
                raise UserError(f"is not of {step}", where=f"--{name}", remedy="use it with --step=generate")
        return
    if flags.FLAGS.search:
        raise UserError(f"does not search for {step}", where="--search", remedy="name a mesh")
    if flags.FLAGS.phase is not None:
        raise UserError(f"{step} has no phases", where="--phase", remedy="leave it out")


def of_phase(config: dict[str, Any], step: str, phase: str | None) -> dict[str, Any]:
    """The recipe with one phase of a step alone; None leaves them all."""
    if phase is None:
        return config
    phases = config.get(step, {}).get("phases", {})
    if phase not in phases:
        remedy = f"the phases of {step} are {', '.join(sorted(phases))}"
        raise UserError(f"there is no {phase}", where="phase", remedy=remedy)
    return config | {step: Section({**config[step], "phases": {phase: phases[phase]}}, step)}


def compile_step(
    context: Context, machine: hardware.Topology, step: str, text: str | None = None
) -> tuple[dict[str, Any], roofline.Roofline]:
    """Compiles; returns the documented summary keys, and the whole report."""
    made = compile_steps.make(context, step, machine)
    return _compile(made, machine, compile_kernels.kernel_work(runtime_of(context, made.mesh)), text)


def compile_engine(context: Context, machine: hardware.Topology, text: str | None = None) -> tuple[dict[str, Any], str]:
    """Compiles what `generate` runs; returns the summary keys, those of the decode step first, and what a person reads."""
    named = flags.FLAGS
    engine = compile_generate.make(context, machine, named.rows, named.cache_tokens, named.prompt_tokens)
    kernel_work = compile_kernels.kernel_work(runtime_from(context.config))
    remedy = "more chips along mesh.tensor or expert, or lower --rows, --cache_tokens"
    summaries, reports, shown = {}, {}, []
    for name, made in engine.steps.items():
        place = None if text is None else f"{text}.{name}"
        summaries[name], reports[name] = _compile(made, machine, kernel_work, place, remedy)
        shown += [name, table(machine, reports[name], summaries[name])]
    shown.append(compile_generate.table(engine, reports))
    own = compile_generate.summary_of(engine, reports)
    return summaries["decode"] | own | {"prefill": summaries["prefill"]}, "\n".join(shown)


def _compile(
    made: compile_steps.Step, machine: hardware.Topology, kernel_work: KernelWork, text: str | None,
    remedy: str = "a smaller batch, more remat, or more chips",
) -> tuple[dict[str, Any], roofline.Roofline]:  # fmt: skip
    began = time.monotonic()
    try:
        compiled = made.function.lower(*made.arguments, **made.keywords).compile()
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = f"does not fit {machine.name}: {_first_line(error)}"
        raise UserError(what, where="mesh", remedy=remedy) from error
    seconds = time.monotonic() - began
    if text is not None:
        files.write_text(files.path(text), compiled.as_text())
    flops = made.model_flops / made.mesh.size
    report = roofline.analyze(compiled, machine, made.mesh, flops, kernel_work, rare=RARE)
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
