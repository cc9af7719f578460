"""Seconds of a mixture layer (router, top-k, experts, combine) on CPU, forward and backward, in float32.

    python -m benchmarks.moe_layer [--json=FILE] [--seconds=60] [--shapes=mixtral,...]

Ours with the CPU back end, ours with jax.lax.ragged_dot, and transformers' Mixtral block on PyTorch (eager or grouped_mm,
whichever is faster here) have the same sizes and the same random routing. Each runs in a process of its own with all cores;
they take turns, one pass at a time (ragged_dot, which takes long, every fourth time). Ratios are of the medians, and of the
fastest passes, which other work on the machine disturbs least. `executed` is the FLOPs of our products over those that the
rows need, counted from the routing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import statistics
import time
from typing import Any

from benchmarks import workers


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer and its tokens."""

    tokens: int
    experts: int
    experts_per_token: int
    model_dim: int
    mlp_dim: int


#: Few wide experts, the mixture of `benchmarks.train_step`, and fine-grained ones: 128 rows an expert on average.
SHAPES = {
    "mixtral": LayerShape(tokens=1024, experts=8, experts_per_token=2, model_dim=512, mlp_dim=1792),
    "step": LayerShape(tokens=2048, experts=16, experts_per_token=4, model_dim=256, mlp_dim=256),
    "fine": LayerShape(tokens=2048, experts=64, experts_per_token=4, model_dim=512, mlp_dim=192),
}
IMPLEMENTATIONS = {"ours": "jax", "ragged_dot": "jax", "transformers": "torch"}


def serve(implementation: str, shape: str) -> None:
    """The worker's side: the seconds of one pass for each number that it is sent."""
    module = importlib.import_module(f"benchmarks.moe_layer_{IMPLEMENTATIONS[implementation]}")
    run, description = module.build(implementation, SHAPES[shape], len(os.sched_getaffinity(0)))

    def timed(_: int) -> dict[str, Any]:
        start = time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - start}

    workers.answer(description, timed)


def measure(shape: str, seconds: float) -> dict[str, Any]:
    """One row: all in turns for about `seconds` seconds, and until each had three passes."""
    running = {
        name: workers.Worker("benchmarks.moe_layer", f"--worker={name}", f"--shapes={shape}")
        for name in IMPLEMENTATIONS
    }
    times: dict[str, list[float]] = {name: [] for name in running}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["ragged_dot"]) < 3:
        for name, worker in running.items():
            if name != "ragged_dot" or len(times["ours"]) % 4 == 1:
                times[name].append(worker.ask(1)["seconds"])
    for worker in running.values():
        worker.close()
    row: dict[str, Any] = {"shape": shape, **dataclasses.asdict(SHAPES[shape]), "passes": len(times["ours"])}
    row["executed"] = running["ours"].description["executed"]
    row["variant"] = running["transformers"].description["variant"]
    for name, values in times.items():
        row[f"{name}_seconds"] = round(statistics.median(values), 5)
    for name in ("ragged_dot", "transformers"):
        row[f"over_{name}"] = round(row["ours_seconds"] / row[f"{name}_seconds"], 3)
        row[f"fastest_over_{name}"] = round(min(times["ours"]) / min(times[name]), 3)
    return row


def main() -> None:
    """Parses flags, prints the table, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the rows to, as a JSON list")
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time of each shape")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which of " + ", ".join(SHAPES))
    parser.add_argument("--worker", choices=sorted(IMPLEMENTATIONS), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        serve(flags.worker, flags.shapes)
        return
    rows = []
    columns = [f"{name}_seconds" for name in IMPLEMENTATIONS]
    columns += [f"{kind}_{name}" for name in ("ragged_dot", "transformers") for kind in ("over", "fastest_over")]
    columns += ["executed", "passes", "variant"]
    print(f"{'shape':8s}" + "".join(f"  {column}" for column in columns))
    for shape in flags.shapes.split(","):
        rows.append(row := measure(shape, flags.seconds))
        print(f"{shape:8s}" + "".join(f"  {row[column]!s:>{len(column)}}" for column in columns), flush=True)
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
