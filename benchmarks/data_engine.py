"""Cleaning and near-deduplication of real code on one core: the data engine beside datatrove.

    python -m benchmarks.data_engine --source=FOLDER [--megabytes=50] [--rounds=3] [--datatrove=VENV/bin/python] [--json=FILE]

The same JSONL file of the folder's Python files, in one process each, in turns; medians of wall time. Ours: all rules, syntax
check, banners, secrets and personal data, then 256 permutations in 25 bands of 10. datatrove, in an environment of its own
(`pip install "datatrove[io,processing]"`): its Gopher filters of repetition and quality, then MinHash with 25 buckets of 10
hashes of 5 words. What they drop is not the same; the work is of the same kind.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kwaicoder_jax.data import curate, reading
from kwaicoder_jax.data.engine.store import Store

_DATATROVE = """
import os, sys
from datatrove.executor import LocalPipelineExecutor as Local
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
source, base = sys.argv[1:]
config = MinhashConfig(num_buckets=25, hashes_per_bucket=10, n_grams=5)
def run(name, *pipeline, tasks=1):
    Local(pipeline=list(pipeline), tasks=tasks, workers=1, logging_dir=f"{base}/log_{name}").run()
run("filter", JsonlReader(source), GopherRepetitionFilter(), GopherQualityFilter(), JsonlWriter(f"{base}/filtered"))
# What is signed is the whole: hardly a file of code passes filters that were made for prose.
run("sign", JsonlReader(source), MinhashDedupSignature(f"{base}/signatures", config=config))
run("buckets", MinhashDedupBuckets(f"{base}/signatures", f"{base}/buckets", config=config), tasks=25)
run("cluster", MinhashDedupCluster(f"{base}/buckets", f"{base}/remove", config=config))
run("drop", JsonlReader(source), MinhashDedupFilter(f"{base}/remove"), JsonlWriter(f"{base}/unique"))
"""


def sample(source: Path, target: Path, most: int) -> tuple[int, int]:
    """Writes Python files below a folder as rows, up to so many bytes; returns documents and bytes of text."""
    documents = size = 0
    with target.open("w", encoding="utf-8") as out:
        for path in sorted(source.rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            out.write(json.dumps({"id": str(path.relative_to(source)), "text": text}) + "\n")
            documents, size = documents + 1, size + len(text.encode())
            if size >= most:
                break
    return documents, size


def ours(rows: Path, folder: Path) -> None:
    """Reads, cleans and deduplicates the rows."""
    place = reading.from_config("code", {"kind": "jsonl", "path": str(rows), "layout": "fineweb", "language": "python"})
    options = reading.Options(allow_unknown_licence=True)
    curate.curate([place], Store(folder), curate.Curation(options=options))


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_engine")
    parser.add_argument("--source", required=True)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--datatrove", default="", help="the Python of an environment that has it")
    parser.add_argument("--json", default="")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows" / "code.jsonl"
        rows.parent.mkdir()
        documents, size = sample(Path(flags.source), rows, flags.megabytes * 10**6)
        if not documents:
            raise SystemExit(f"--source: no Python file below {flags.source}")
        contestants: dict[str, Callable[[Path], object]] = {"ours": lambda place: ours(rows, place)}
        if flags.datatrove:
            command = [flags.datatrove, "-c", _DATATROVE, str(rows.parent)]
            contestants["datatrove"] = lambda place: subprocess.run(
                [*command, str(place)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(flags.rounds):
            for name, run in contestants.items():
                began = time.perf_counter()
                run(Path(folder) / f"{name}{turn}")
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    print(f"{documents} files, {size / 1e6:.1f} MB")
    print("| | seconds | MB/s | ratio |\n|---|---|---|---|")
    found = []
    for name, each in seconds.items():
        median = statistics.median(each)
        row = {"name": name, "seconds": median, "megabytes_per_second": size / 1e6 / median,
               "ratio": median / statistics.median(seconds["ours"])}  # fmt: skip
        found.append(row)
        print(f"| {name} | {median:.1f} | {row['megabytes_per_second']:.2f} | {row['ratio']:.2f} |")
    if flags.json:
        Path(flags.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
