"""Steps for tests, importable by other processes."""

import dataclasses
import os
import time
from collections.abc import Sequence

from kwaicoder_jax.data.engine.store import Result, Store
from kwaicoder_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shout:
    """Upper case, and a line in a file for each time that it was really done."""

    mark: str = "!"
    log: str = dataclasses.field(default="", metadata={"place": True})
    pause: float = dataclasses.field(default=0.0, metadata={"place": True})
    name: str = "shout"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        content = b"".join(store.read(each) for each in inputs)
        if content == b"bad":
            raise UserError("is bad", where="a text")
        if content == b"worse":
            raise RuntimeError("is worse")
        if content == b"deadly":
            os._exit(9)
        time.sleep(self.pause)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{content.decode()}\n")
        text = content.upper() + self.mark.encode()
        return Result({"text": store.add(text)}, {"bytes": len(text)})
