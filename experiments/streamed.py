"""Transforms of a stage from checkpoint to checkpoint, without a model in memory."""

import contextlib
from collections.abc import Callable
from typing import Any

from experiments.contract import Context
from kwaicoder_jax.transforms import streaming
from kwaicoder_jax.transforms.parameterwise import Record, Transform

MEGABYTE = 1_000_000


def write(context: Context, transform: Transform, record: Record, meta: dict[str, Any]) -> None:
    """Writes step 0 of the stage's checkpoints from its input `init_from`; goes on where a killed run was."""
    with contextlib.ExitStack() as stack:
        update: Callable[..., None] | None = None

        def show(done: int, total: int) -> None:
            nonlocal update
            if update is None:
                update = stack.enter_context(context.display.progress(-(-total // MEGABYTE), "MB"))
            update(-(-done // MEGABYTE))

        streaming.run(
            transform, context.inputs["init_from"], context.folder / "checkpoints", record, meta=meta, on_progress=show
        )
