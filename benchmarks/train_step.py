"""Tokens per second of one full train step on CPU: this codebase against Hugging Face transformers on PyTorch.

    python -m benchmarks.train_step [--json=FILE] [--seconds=120] [--models=dense,moe]

A step is forward, cross-entropy, backward, clipping by global norm and AdamW, in float32, of the same model (about 7M
parameters dense, 17M with 16 experts) on the same batch of 8 x 256 tokens. Each framework runs in its own process, with
all cores; the two take turns within one run, and the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from typing import Any

from benchmarks import workers
from benchmarks.train_step_shapes import SHAPES

FRAMEWORKS = {"ours": "benchmarks.train_step_jax", "huggingface": "benchmarks.train_step_huggingface"}


def serve(framework: str, model: str) -> None:
    """The worker's side: the seconds of as many steps as it is asked for."""
    module = importlib.import_module(FRAMEWORKS[framework])
    steps, description = module.build(SHAPES[model], len(os.sched_getaffinity(0)))
    workers.answer(description, lambda count: {"seconds": steps(count)})


def measure(model: str, seconds: float) -> dict[str, Any]:
    """One row: both frameworks in turns for about `seconds` seconds, at least three rounds of each."""
    running = {
        framework: workers.Worker("benchmarks.train_step", f"--worker={framework}", f"--models={model}")
        for framework in FRAMEWORKS
    }
    times: dict[str, list[float]] = {framework: [] for framework in FRAMEWORKS}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["ours"]) < 3:
        for framework, worker in running.items():
            times[framework].append(worker.ask(2)["seconds"] / 2)
    for worker in running.values():
        worker.close()
    medians = {framework: statistics.median(values) for framework, values in times.items()}
    tokens = SHAPES[model].tokens
    return {
        "model": model,
        "tokens_per_second": round(tokens / medians["ours"], 1),
        "huggingface_tokens_per_second": round(tokens / medians["huggingface"], 1),
        "ratio_to_huggingface": round(medians["huggingface"] / medians["ours"], 3),
        "rounds": len(times["ours"]),
        "huggingface_variant": running["huggingface"].description,
    }


def main() -> None:
    """Parses flags, prints the table, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the rows to, as a JSON list")
    parser.add_argument("--seconds", type=float, default=60.0, help="measuring time of each model")
    parser.add_argument("--models", default=",".join(SHAPES), help="which of " + ", ".join(SHAPES))
    parser.add_argument("--worker", choices=sorted(FRAMEWORKS), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        serve(flags.worker, flags.models)
        return
    rows = []
    print(f"{'model':8s} {'ours tok/s':>11s} {'HF tok/s':>11s} {'ratio':>7s} {'rounds':>7s}  HF variant")
    for model in flags.models.split(","):
        row = measure(model, flags.seconds)
        rows.append(row)
        ours, theirs, ratio = (row[key] for key in list(row)[1:4])
        variant = row["huggingface_variant"]["variant"]
        print(f"{model:8s} {ours:11.0f} {theirs:11.0f} {ratio:7.2f} {row['rounds']:7d}  {variant}", flush=True)
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
