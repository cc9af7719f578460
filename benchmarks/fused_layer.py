"""What a mixture layer's experts move through HBM on TPU: fused kernels beside the same products one by one.

python -m benchmarks.fused_layer [--chip=v5p] [--shapes=64x2048x1408] [--tokens=4096,16384] [--json=FILE]

Both are compiled for the chip, which need not be there, with kernels of our own; the second gathers rows in XLA, applies
the activation and sums tokens' rows there. Figures are static: every instruction's operands and results once, kernels by what
their tiles copy. "forward" keeps nothing, "step" is forward and backward.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import kernel_shapes
from experiments.compile_kernels import kernel_work
from kernels import routing
from kernels.grouped_matmul import Backend, composed_mlp, tpu_mlp
from kernels.grouped_matmul.mlp_types import Arguments, Gradients
from kernels.grouped_matmul.tpu_tiles import Chip
from kwaicoder_jax import hardware, models
from kwaicoder_jax.hardware import hlo, schedule, work

CHOICES = 8


def fused(arguments: Arguments, order: routing.Routing) -> jax.Array:
    """The layer's output by fused kernels."""
    return tpu_mlp.forward(jax.nn.silu, arguments, order, keep=False)[0]


def fused_step(
    arguments: Arguments, order: routing.Routing, dy_MD: jax.Array, chip: Chip | None = None
) -> tuple[jax.Array, Gradients]:
    """And all gradients."""
    y_MD, saved = tpu_mlp.forward(jax.nn.silu, arguments, order, keep=True, chip=chip)
    assert saved is not None
    return y_MD, tpu_mlp.backward(jax.nn.silu, arguments, order, saved, dy_MD, chip=chip)


def composed(arguments: Arguments, order: routing.Routing) -> jax.Array:
    """The layer's output by one product after the other."""
    rows_RD, _ = composed_mlp.forward(Backend.TPU, jax.nn.silu, arguments, order)
    return routing.combine(rows_RD, arguments.weight_MX, order)


def composed_step(arguments: Arguments, order: routing.Routing, dy_MD: jax.Array) -> tuple[jax.Array, Gradients]:
    """And all gradients."""
    rows_RD, saved = composed_mlp.forward(Backend.TPU, jax.nn.silu, arguments, order)
    y_MD = routing.combine(rows_RD, arguments.weight_MX, order)
    return y_MD, composed_mlp.backward(Backend.TPU, jax.nn.silu, arguments, order, saved, dy_MD)


def arguments_of(tokens: int, experts: int, width: int, neurons: int) -> tuple[Arguments, routing.Routing]:
    """Their shapes, in bfloat16."""
    made: Any = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    projection, pairs = made((experts, width, neurons)), (tokens, CHOICES)
    weight_MX: Any = jax.ShapeDtypeStruct(pairs, jnp.float32)
    order = jax.eval_shape(lambda e: routing.sort_by_expert(e, experts), jax.ShapeDtypeStruct(pairs, jnp.int32))
    return Arguments(made((tokens, width)), weight_MX, projection, projection, made((experts, neurons, width))), order


def moved(function: Callable[..., Any], arguments: Any, chip: str) -> float:
    """Bytes of HBM of the compiled function."""
    for name, value in hardware.TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    machine = hardware.topology(schedule.tensor_cores(chip).topology, where="--chip")
    here = jax.sharding.SingleDeviceSharding(machine.devices[0])
    placed = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=here), arguments)
    text = jax.jit(function).lower(*placed).compile().as_text() or ""
    return work.measure(hlo.parse(text), kernel_work(models.Runtime())).hbm_bytes


def row(chip: str, shape: tuple[int, int, int], tokens: int) -> dict[str, Any]:
    """Both layers, forward and whole steps."""
    arguments, order = arguments_of(tokens, *shape)
    found: dict[str, Any] = {"chip": chip, "shape": "x".join(map(str, shape)), "tokens": tokens, "choices": CHOICES}
    for name, ours, theirs, given in (
        ("forward", fused, composed, (arguments, order)),
        ("step", fused_step, composed_step, (arguments, order, arguments.x_MD)),
    ):
        found[f"{name}_bytes"], found[f"{name}_bytes_unfused"] = (moved(each, given, chip) for each in (ours, theirs))
        found[f"{name}_ratio"] = found[f"{name}_bytes"] / found[f"{name}_bytes_unfused"]
    return found


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fused_layer")
    parser.add_argument("--chip", default="v5p")
    parser.add_argument("--shapes", default="64x2048x1408", help="EXPERTSxWIDTHxNEURONS, ...")
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--json", default="")
    flags = parser.parse_args()
    shapes = [kernel_shapes.parsed(each) for each in flags.shapes.split(",")]
    kernel_shapes.chosen(flags.chip, kernel_shapes.CHIPS, "--chip")
    if not all(each.isdigit() and each != "0" for each in flags.tokens.split(",")):
        raise SystemExit(f"--tokens: {flags.tokens!r}: use numbers separated by commas")
    print("| experts x width x neurons | tokens | forward, GB | unfused | ratio | step, GB | unfused | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for shape in shapes:
        for tokens in map(int, flags.tokens.split(",")):
            each = row(flags.chip, (shape.groups, shape.depth, shape.width), tokens)
            rows.append(each)
            cells = [
                f"{each[f'{name}_bytes'] / 1e9:.2f} | {each[f'{name}_bytes_unfused'] / 1e9:.2f} | {each[f'{name}_ratio']:.2f}"
                for name in ("forward", "step")
            ]
            print(f"| {each['shape']} | {tokens} | {' | '.join(cells)} |", flush=True)
    if flags.json:
        with open(flags.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
