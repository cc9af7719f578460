"""What measuring importance costs on CPU: the collecting pass against a plain forward pass.

    python -m benchmarks.importance_overhead [--json=FILE] [--seconds=30] [--models=dense,moe]

Four jitted functions take turns in one process, on the same batch of 8 x 256 tokens: `models.forward` without a loss;
the pass behind `importance.collect`; that with the influence of runs of layers (`blocks`); and the pass behind
`importance.measure`, from which every aggregation can be read (`all`). A ratio is that of the medians; `cpu_ratio` is
the same of the processor time that the process used, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.train_step_jax import model_config, random_batch
from benchmarks.train_step_shapes import StepShape
from kwaicoder_jax import models
from kwaicoder_jax.transforms import importance

#: Wide enough for matrix products to dominate, as in real models; the mixture has a dense model's active neurons.
SHAPES = {
    "dense": StepShape(model_dim=512, head_dim=64, mlp_dim=1536, vocab_size=1024),
    "moe": StepShape(model_dim=512, head_dim=64, mlp_dim=384, vocab_size=1024, experts=16, experts_per_token=4),
}

RATIOS = ("ratio", "cpu_ratio")


def passes(shape: StepShape) -> dict[str, Callable[[], Any]]:
    """The functions to time, by name; each returns the arrays that it computes."""
    config, runtime = model_config(shape), models.Runtime()
    params, batch = models.init(config, jax.random.key(0)), random_batch(shape)
    arguments = [batch[name] for name in ("inputs", "positions", "segment_ids")]

    @jax.jit
    def forward(params: Any, *arguments: Any) -> jax.Array:
        return models.forward(params, config, *arguments, runtime=runtime).hidden_BTD

    def collect(sequence: str | None, blocks: bool = False) -> Callable[[], Any]:
        options = {"config": config, "runtime": runtime, "sequence": sequence, "blocks": blocks}
        return lambda: importance.batch_sums(params, *arguments, **options)

    measuring = {"collect": collect("mean"), "blocks": collect("mean", blocks=True), "all": collect(None)}
    return {"forward": lambda: forward(params, *arguments), **measuring}


def measure(model: str, seconds: float) -> dict[str, Any]:
    """One row: the passes in turns for about `seconds` seconds, at least three rounds of each."""
    functions = passes(SHAPES[model])
    for function in functions.values():
        jax.block_until_ready(function())
    wall: dict[str, list[float]] = {name: [] for name in functions}
    used: dict[str, list[float]] = {name: [] for name in functions}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(wall["forward"]) < 3:
        for name, function in functions.items():
            start, started = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            wall[name].append(time.perf_counter() - start)
            used[name].append(time.process_time() - started)
    row: dict[str, Any] = {"model": model, "rounds": len(wall["forward"])}
    for name in functions:
        row[f"{name}_seconds"] = round(statistics.median(wall[name]), 4)
    for name in ("collect", "blocks", "all"):
        row[f"{name}_ratio"] = round(statistics.median(wall[name]) / statistics.median(wall["forward"]), 3)
        row[f"{name}_cpu_ratio"] = round(statistics.median(used[name]) / statistics.median(used["forward"]), 3)
    return row


def main() -> None:
    """Parses flags, prints the table, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the rows to, as a JSON list")
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time of each model")
    parser.add_argument("--models", default=",".join(SHAPES), help="which of " + ", ".join(SHAPES))
    flags = parser.parse_args()
    rows = []
    columns = ["forward_seconds", *(f"{name}_{kind}" for name in ("collect", "blocks", "all") for kind in RATIOS)]
    heads = [column.replace("_", " ") for column in columns]
    print(f"{'model':6s}" + "".join(f"  {head}" for head in heads) + "  rounds")
    for model in flags.models.split(","):
        rows.append(row := measure(model, flags.seconds))
        cells = "".join(f"  {row[column]:{len(column)}.4g}" for column in columns)
        print(f"{model:6s}{cells}  {row['rounds']:6d}", flush=True)
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
