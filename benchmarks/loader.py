"""What one process reads, packs and mixes, against what its chips would train on.

    python -m benchmarks.loader [--rows=64] [--length=4096] [--streams=64] [--steps=32] [--workers=0] [--chips=h100,v5p]
        [--json=FILE]

A corpus of installed Python packages (a tokenizer of 32,000 tokens is trained on it), fill-in-the-middle for half of the
texts. First the loader alone: tokens per second of its thread, and of its processor time. Then a step that takes as long as
the tokens of a batch would on the chips of one host: how much of the time is waited for data.

A host needs chips * peak * MFU / FLOPs per token, of the 23B mixture, at an MFU of 50 %.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import kwaicoder_23b_a4b
from experiments import recipe_models
from kwaicoder_jax import data, hardware, models

HOSTS = {"v5p": 4, "v5e": 4, "h100": 8}  # chips of a host in a slice of several
MFU = 0.5
SOURCES = {
    "code": {"kind": "installed_packages", "max_bytes": 30_000_000},
    "knowledge": {"kind": "knowledge", "max_bytes": 3_000_000},
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of this process's part of a batch.

    Attributes:
      rows: sequences.
      length: of each, in tokens.
      streams: that they come from.
      workers: processes that read; 0 for a thread of this one.
    """

    rows: int
    length: int
    streams: int
    workers: int = 0


def needed(chip: str, length: int) -> float:
    """Tokens per second of one host of such chips."""
    config = kwaicoder_23b_a4b.get_config().to_dict()
    flops = models.train_flops_per_token(recipe_models.model_before(config, "cpt"), length)
    return HOSTS[chip] * hardware.chip(chip).bf16_flops * MFU / flops


def loader(corpus: data.Corpus, shape: Shape, steps: int) -> data.Loader:
    """Half of its texts with a hole in them, as in the recipe's last phase."""
    phase = data.PhaseSpec(steps, shape.rows, shape.length, {"code": 0.9, "knowledge": 0.1}, data.FimOptions(rate=0.5))
    if shape.workers:
        return data.WorkerLoader(corpus, [phase], seed=0, streams=shape.streams, workers=shape.workers)
    return data.TrainingLoader(corpus, [phase], seed=0, streams=shape.streams)


def alone(batches: Iterator[data.Batch]) -> dict[str, float]:
    """Tokens per second after the first batch, and the share of places that are filled."""
    next(batches)
    began, busy, tokens, places = time.monotonic(), _processor_seconds(), 0.0, 0
    for batch in batches:
        tokens, places = tokens + float(batch["loss_mask"].sum()), places + batch["loss_mask"].size
    return {
        "tokens_per_second": tokens / (time.monotonic() - began),
        "tokens_per_processor_second": tokens / (_processor_seconds() - busy),
        "filled": tokens / places,
    }


def _processor_seconds() -> float:
    """Of this process and those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def beside_a_step(batches: data.Loader, seconds: float) -> dict[str, float]:
    """Seconds until the first batch, and the share of the steps that is waited for the later ones."""
    ready, began = data.prefetch(batches), time.monotonic()
    next(ready)
    first, waited = time.monotonic() - began, 0.0
    began = time.monotonic()
    for _ in range(batches.steps - 1):
        time.sleep(seconds)  # the chips at work
        asked = time.monotonic()
        next(ready)
        waited += time.monotonic() - asked
    ready.close()
    return {"first_batch_seconds": first, "waited_share": waited / (time.monotonic() - began)}


def main() -> None:
    """Prints the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 64), ("length", 4096), ("streams", 64), ("steps", 32), ("workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--chips", default="h100,v5p", help="of the hosts to keep pace with; slow ones take long to measure"
    )
    parser.add_argument("--json", help="file for the rows")
    arguments = parser.parse_args()
    if unknown := set(arguments.chips.split(",")) - set(HOSTS):
        parser.error(f"--chips: {min(unknown)!r} is none of {', '.join(HOSTS)}")
    shape, found = Shape(arguments.rows, arguments.length, arguments.streams, arguments.workers), []
    with tempfile.TemporaryDirectory() as folder:
        data.prepare(SOURCES, Path(folder) / "corpus", vocab_size=32_000)
        corpus = data.Corpus.open(Path(folder) / "corpus")
        rate: dict[str, Any] = alone(loader(corpus, shape, arguments.steps))
        print(
            f"{rate['tokens_per_second']:,.0f} tokens per second, {rate['tokens_per_processor_second']:,.0f} per second of"
            f" processor time, {rate['filled']:.1%} of the places filled\n"
        )
        print("| host | needs, tokens / s | processors | first batch, s | waited for data |\n|---|---|---|---|---|")
        for chip in arguments.chips.split(","):
            need = needed(chip, shape.length)
            paced = beside_a_step(loader(corpus, shape, arguments.steps), shape.rows * shape.length / need)
            row = {"chip": chip, "needed": need, "processors": need / rate["tokens_per_processor_second"], **paced}
            found.append(rate | row)
            print(
                f"| {HOSTS[chip]} {chip} | {need:,.0f} | {row['processors']:.2f} | {paced['first_batch_seconds']:.1f} |"
                f" {paced['waited_share']:.1%} |",
                flush=True,
            )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
