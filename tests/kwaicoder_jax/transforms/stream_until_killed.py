"""Upcycles the checkpoint that is named, streamed, with a pause after each file; prints each piece that is written."""

import json
import os
import pathlib
import sys
import time

from kwaicoder_jax.checkpoints import layout, partial
from kwaicoder_jax.transforms import streaming, upcycle

META = {"model": {}, "lineage": [], "identity": "mixture"}
CHUNK_BYTES = 700


def main() -> None:
    source, target, record = map(pathlib.Path, sys.argv[1:])
    original = partial._commit

    def slowly(file):
        time.sleep(0.002)
        original(file)
        os.write(1, f"{file.parent.name}/{file.name}\n".encode())  # at once: several threads write

    partial._commit, layout.CHUNK_BYTES = slowly, CHUNK_BYTES
    streaming.run(upcycle, source, target, json.loads(record.read_text()), meta=META)


if __name__ == "__main__":
    main()
