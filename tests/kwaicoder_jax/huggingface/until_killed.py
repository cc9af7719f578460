"""Imports or exports what is named, with a pause after each file; prints every file that got its name."""

import os
import pathlib
import sys
import time

from kwaicoder_jax import checkpoints, huggingface, models
from kwaicoder_jax.checkpoints import layout, partial
from kwaicoder_jax.huggingface import shards

CHUNK_BYTES = 300
SHARD_BYTES = 3_000


def say(line: str) -> None:
    """One line at once: several threads write."""
    os.write(1, f"{line}\n".encode())


def main() -> None:
    kind, source, target = sys.argv[1], *map(pathlib.Path, sys.argv[2:])
    commit, write = partial._commit, shards.write

    def slowly(file):
        time.sleep(0.002)
        commit(file)
        say(f"{file.parent.name}/{file.name}")

    def slowly_written(folder, shard, data, written):
        def one_by_one():
            for run in data:
                time.sleep(0.002)
                yield run

        write(folder, shard, one_by_one(), written)
        say(shard.name)

    partial._commit, shards.write, layout.CHUNK_BYTES = slowly, slowly_written, CHUNK_BYTES
    say("begun")
    if kind == "import":
        opened = huggingface.open_model(source)
        meta = {"model": opened.config.to_dict(), "lineage": [], "identity": "imported"}
        huggingface.save(opened, target, meta=meta)
        return
    tensors = checkpoints.open_tensors(source)
    config = models.ModelConfig.from_dict(checkpoints.read_meta(source)["model"])
    huggingface.export(tensors, huggingface.plan_export(tensors, config, max_shard_bytes=SHARD_BYTES), target)


if __name__ == "__main__":
    main()
