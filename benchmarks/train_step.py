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
import subprocess
import sys
import time
from typing import Any

from benchmarks.train_step_shapes import SHAPES

FRAMEWORKS = {"ours": "benchmarks.train_step_jax", "huggingface": "benchmarks.train_step_huggingface"}


class Worker:
    """A subprocess that builds one framework's step and then runs as many as it is asked to."""

    def __init__(self, framework: str, model: str) -> None:
        command = [sys.executable, "-m", "benchmarks.train_step", f"--worker={framework}", f"--models={model}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.description: dict[str, Any] = self._read()

    def run(self, steps: int) -> float:
        """Seconds per step of `steps` steps."""
        assert self._process.stdin
        print(steps, file=self._process.stdin, flush=True)
        return self._read()["seconds"] / steps

    def close(self) -> None:
        """Ends the subprocess."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the worker ended; its error is above")


def serve(framework: str, model: str) -> None:
    """The worker's side: one JSON line when ready, then one for each line that asks for a number of steps."""
    module = importlib.import_module(FRAMEWORKS[framework])
    steps, description = module.build(SHAPES[model], len(os.sched_getaffinity(0)))
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": steps(int(line))}), flush=True)


def measure(model: str, seconds: float) -> dict[str, Any]:
    """One row: both frameworks in turns for about `seconds` seconds, at least three rounds of each."""
    workers = {framework: Worker(framework, model) for framework in FRAMEWORKS}
    times: dict[str, list[float]] = {framework: [] for framework in FRAMEWORKS}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["ours"]) < 3:
        for framework, worker in workers.items():
            times[framework].append(worker.run(2))
    for worker in workers.values():
        worker.close()
    medians = {framework: statistics.median(values) for framework, values in times.items()}
    tokens = SHAPES[model].tokens
    return {
        "model": model,
        "tokens_per_second": round(tokens / medians["ours"], 1),
        "huggingface_tokens_per_second": round(tokens / medians["huggingface"], 1),
        "ratio_to_huggingface": round(medians["huggingface"] / medians["ours"], 3),
        "rounds": len(times["ours"]),
        "huggingface_variant": workers["huggingface"].description,
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
