"""Imports and exports a model in a process of its own, and prints by how many bytes its memory grew at most."""

import pathlib
import sys

from kwaicoder_jax import checkpoints, huggingface, models
from kwaicoder_jax.checkpoints import layout


def resident(field: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def watched(work) -> int:
    """Growth of VmHWM, the most resident memory, over what was resident before."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def main() -> None:
    layout.CHUNK_BYTES = 2**22
    source, place = map(pathlib.Path, sys.argv[1:])
    opened = huggingface.open_model(source)
    meta = {"model": opened.config.to_dict(), "lineage": [], "identity": "imported"}
    print(watched(lambda: huggingface.save(opened, place / "checkpoints", meta=meta, memory_bytes=2**24)))
    tensors = checkpoints.open_tensors(place)
    config = models.ModelConfig.from_dict(checkpoints.read_meta(place)["model"])
    planned = huggingface.plan_export(tensors, config)
    print(watched(lambda: huggingface.export(tensors, planned, place / "out", memory_bytes=2**24)))


if __name__ == "__main__":
    main()
