"""Tokens per second of generation on CPU: this codebase's engine against `generate` of Hugging Face transformers.

    python -m benchmarks.generate [--json=FILE] [--rounds=5] [--variants=float32,bfloat16,...] [--batches=1,8]

The model has SmolLM2-135M's sizes (30 layers, width 576, vocabulary 49152) and random weights; prompts of 128 tokens,
64 new ones, greedy. transformers runs as it does by default, float32 with sdpa attention and a KV cache, on all threads;
ours in several dtypes. Each runs in its own process; all take turns within one run, and ratios are those of medians.
`prefill` is the time to the first token of every row, as prompt tokens per second; `decode` the tokens after it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
from typing import Any

from benchmarks import workers
from benchmarks.generate_shapes import SHAPES

FRAMEWORKS = {"ours": "benchmarks.generate_jax", "huggingface": "benchmarks.generate_huggingface"}
REFERENCE = "huggingface:float32"
VARIANTS = ("float32", "bfloat16", "float32/int8", "bfloat16/int8")


def serve(name: str, model: str) -> None:
    """The worker's side: the seconds of a batch of the size that it is asked for, "prefill" and "decode"."""
    framework, _, variant = name.partition(":")
    module = importlib.import_module(FRAMEWORKS[framework])
    runner = module.Runner(SHAPES[model], variant, len(os.sched_getaffinity(0)))
    workers.answer({}, runner.run)


def measure(names: list[str], model: str, batches: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row for every worker and batch; all in turns, after one round that compiles."""
    running = {name: workers.Worker("benchmarks.generate", f"--worker={name}", f"--model={model}") for name in names}
    seconds: dict[tuple[int, str], list[dict[str, float]]] = {}
    for turn in range(rounds + 1):
        for batch in batches:
            for name, worker in running.items():
                taken = worker.ask(batch)
                if turn:
                    seconds.setdefault((batch, name), []).append(taken)
    for worker in running.values():
        worker.close()
    shape = SHAPES[model]
    tokens = {"prefill": shape.prompt, "decode": shape.new_tokens - 1}
    rows: list[dict[str, Any]] = []
    for (batch, name), runs in seconds.items():
        row: dict[str, Any] = {"model": model, "batch": batch, "variant": name, "rounds": rounds}
        for phase, count in tokens.items():
            median = statistics.median(run[phase] for run in runs)
            reference = statistics.median(run[phase] for run in seconds[batch, REFERENCE])
            row[f"{phase}_tokens_per_second"] = round(batch * count / median, 1)
            row[f"{phase}_ratio_to_huggingface"] = round(reference / median, 2)
        rows.append(row)
    return rows


def main() -> None:
    """Parses flags, prints the table, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the rows to, as a JSON list")
    parser.add_argument("--rounds", type=int, default=5, help="measured turns of each")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="ours: dtype, or dtype/form")
    parser.add_argument("--references", default="float32", help="transformers': dtype, or dtype/attention")
    parser.add_argument("--batches", default="1,8", help="rows generated together")
    parser.add_argument("--model", choices=sorted(SHAPES), default="smollm2_135m", help="sizes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        serve(flags.worker, flags.model)
        return
    references = dict.fromkeys([REFERENCE, *(f"huggingface:{each}" for each in flags.references.split(","))])
    names = [*references, *(f"ours:{each}" for each in flags.variants.split(",") if each)]
    rows = measure(names, flags.model, [int(each) for each in flags.batches.split(",")], flags.rounds)
    print(f"{'batch':>5s} {'variant':24s} {'prefill tok/s':>13s} {'ratio':>6s} {'decode tok/s':>13s} {'ratio':>6s}")
    for row in rows:
        figures = [row[f"{phase}_{what}"] for phase in ("prefill", "decode") for what in _COLUMNS]
        print(
            f"{row['batch']:5d} {row['variant']:24s} {figures[0]:13.1f} {figures[1]:6.2f} {figures[2]:13.1f} "
            f"{figures[3]:6.2f}"
        )
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(rows, file, indent=1)


_COLUMNS = ("tokens_per_second", "ratio_to_huggingface")

if __name__ == "__main__":
    main()
