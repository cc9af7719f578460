"""Streamed upcycling of a model larger than memory, against `cp` of as many bytes on the same disk.

    python -m benchmarks.transform_throughput [--parameters=4e9] [--folder=DIR] [--json=FILE] [--rounds=2]

Writes a random bf16 dense student, upcycles it from checkpoint to checkpoint in a process of its own (its start and the
import of jax are timed too), and copies the result with `cp -r`. Both begin with their input out of the page cache and
end when every file is on the disk (fsync). The two take turns: upcycle, cp, cp, upcycle, ... Needs about five times the
student's bytes (42 GB for 4e9 parameters) for a while, all in one folder that is removed at the end, also on Ctrl-C.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from types import FrameType
from typing import Any

import ml_dtypes
import numpy as np

from kwaicoder_jax import checkpoints, models
from kwaicoder_jax.transforms import streaming, upcycle

GRANULARITY, REPLICAS = 4, 3  # 12 experts; with the shapes below the mixture has twice the student's parameters
LARGEST = 3072  # channels at 4e9 parameters


def student_config(parameters: float) -> models.ModelConfig:
    """A dense model of about that many parameters, in the proportions of one with 4e9."""
    blocks = max(1, round(LARGEST / 128 * (parameters / 4e9) ** (1 / 3)))
    layers = max(1, round(32 * parameters / 4e9 * (LARGEST / 128 / blocks) ** 2))
    return models.ModelConfig(
        vocab_size=max(256, round(151_936 * blocks * 128 / LARGEST)), layers=layers, model_dim=128 * blocks,
        heads=-(-4 * blocks // 12) * 4, kv_heads=4, head_dim=128, mlp_dim=288 * blocks, tie_embeddings=False,
        dtype="bfloat16", param_dtype="bfloat16",
    )  # fmt: skip


def write_student(folder: pathlib.Path, config: models.ModelConfig) -> None:
    """A checkpoint of random parameters, a slice at a time: both signs, magnitudes from 2^-7 to 2^-5."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    specs = {
        name: checkpoints.Spec(d.shape, bfloat16, d.axes[0] == "layers")
        for name, d in models.declarations(config).items()
    }
    partial = checkpoints.PartialStep(folder / "checkpoints", 0, specs, "student")
    generator = np.random.default_rng(0)
    for name, spec in specs.items():
        for layer in spec.slices:
            bits = np.frombuffer(generator.bytes(spec.slice_bytes), np.uint16)
            bits = bits & np.uint16(0x80FF) | np.uint16(0x3C00)
            partial.write(name, bits.view(bfloat16).reshape(spec.slice_shape), layer)
    partial.finish({"model": config.to_dict(), "lineage": [], "identity": "student", "tokenizer": ""})


def work(source: str, target: str) -> None:
    """The timed process: upcycles `source` to `target`; prints its peak resident memory in bytes."""
    meta = checkpoints.read_meta(source)
    config = models.ModelConfig.from_dict(meta["model"])
    record = streaming.record_of(
        lambda params: upcycle.apply(params, config, granularity=GRANULARITY, replicas=REPLICAS), config
    )
    meta = {**meta, "model": record["config_after"]}
    streaming.run(upcycle, source, pathlib.Path(target) / "checkpoints", record, meta=meta)
    status = pathlib.Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    cpu = os.times()
    print(json.dumps({"peak_rss_bytes": peak, "cpu_seconds": cpu.user + cpu.system}))


def upcycled(source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
    """Seconds, peak memory and CPU seconds of one streamed upcycling."""
    if target.exists():
        shutil.rmtree(target)
    forget(source)
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.transform_throughput", f"--work={source},{target}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return {"seconds": time.perf_counter() - began, **json.loads(output.splitlines()[-1])}


def copied(source: pathlib.Path, target: pathlib.Path) -> float:
    """Seconds of one `cp -r` to the disk."""
    forget(source)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in files_of(target):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """Every file below a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def size_of(folder: pathlib.Path) -> int:
    """Bytes of every file below a folder."""
    return sum(path.stat().st_size for path in files_of(folder))


def forget(folder: pathlib.Path) -> None:
    """Drops the folder's files from the page cache, so that reading them is reading the disk."""
    for file in files_of(folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(folder: pathlib.Path, parameters: float, rounds: int) -> dict[str, Any]:
    """One row of results."""
    config = student_config(parameters)
    needed = 10.5 * models.count(config)  # bf16: the student, the mixture of twice its size, and a copy of that
    if shutil.disk_usage(folder).free < needed:
        sys.exit(f"error: {folder} has less than {needed / 1e9:.0f} GB free; name another --folder")
    say(f"writing a student of {models.count(config) / 1e9:.2f}e9 parameters")
    write_student(folder / "student", config)
    ours, theirs = [], []
    for turn in range(rounds):
        for which in ("upcycle", "cp")[:: -1 if turn % 2 else 1]:
            say(f"round {turn + 1} of {rounds}: {which}")
            if which == "cp":
                theirs.append(copied(folder / "mixture", folder / "copy"))
            else:
                ours.append(upcycled(folder / "student", folder / "mixture"))
    seconds, cp_seconds = statistics.median(run["seconds"] for run in ours), statistics.median(theirs)
    size = size_of(folder / "mixture")
    return {
        "parameters": models.count(config),
        "bytes_read": size_of(folder / "student"),
        "bytes_written": size,
        "seconds": round(seconds, 2),
        "cp_seconds": round(cp_seconds, 2),
        "gigabytes_per_second": round(size / seconds / 1e9, 3),
        "cp_gigabytes_per_second": round(size / cp_seconds / 1e9, 3),
        "ratio_to_cp": round(cp_seconds / seconds, 3),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in ours),
        "cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in ours), 2),
        "all_seconds": [round(run["seconds"], 2) for run in ours],
        "all_cp_seconds": [round(each, 2) for each in theirs],
    }


def say(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)


def stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends the program by the way that cleans up."""
    del frame
    raise SystemExit(128 + number)


def main() -> None:
    """Parses flags, prints the table, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=4e9, help="of the dense student, about")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("."), help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=2, help="times that each is measured")
    parser.add_argument("--json", help="file to write the rows to, as a JSON list")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        work(*flags.work.split(","))
        return
    signal.signal(signal.SIGTERM, stop)
    flags.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="transform_throughput_", dir=flags.folder) as folder:
        row = measure(pathlib.Path(folder), flags.parameters, flags.rounds)
    print(f"{'parameters':>12s} {'read GB':>8s} {'written GB':>11s} {'seconds':>8s} {'GB/s':>6s} {'cp s':>7s} "
          f"{'cp GB/s':>8s} {'ratio to cp':>12s} {'peak GB':>8s} {'CPU s':>6s}")  # fmt: skip
    print(f"{row['parameters']:12d} {row['bytes_read'] / 1e9:8.2f} {row['bytes_written'] / 1e9:11.2f} "
          f"{row['seconds']:8.1f} {row['gigabytes_per_second']:6.2f} {row['cp_seconds']:7.1f} "
          f"{row['cp_gigabytes_per_second']:8.2f} {row['ratio_to_cp']:12.2f} {row['peak_rss_bytes'] / 1e9:8.2f} "
          f"{row['cpu_seconds']:6.1f}")  # fmt: skip
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump([row], file, indent=1)


if __name__ == "__main__":
    main()
