"""What a transform's stage leaves: a checkpoint written from memory, or streamed from checkpoint to checkpoint."""

import math
from typing import Any

import jax
import numpy as np

from experiments import memory, moments
from experiments.contract import Context
from kwaicoder_jax import checkpoints, models, training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import parameterwise, streaming
from kwaicoder_jax.transforms.parameterwise import Record, Transform


def describe(context: Context, meta: dict[str, Any], record: Record, **more: Any) -> dict[str, Any]:
    """The description of the new checkpoint, from that of its source."""
    entry = {"stage": context.stage.name, "identity": context.identity, **more, "record": record}
    return {
        "model": record["config_after"],
        "tokenizer": meta["tokenizer"],
        "lineage": [*meta["lineage"], entry],
        "identity": context.identity,
        **moments.data_position(meta),
    }


def save(
    context: Context, transform: Transform, params: Any, config: models.ModelConfig, record: Record,
    meta: dict[str, Any], mesh: Any,
) -> Any:  # fmt: skip
    """Writes the stage's checkpoint as its config says; returns the new parameters, or None if nobody compares them."""
    shardings = training.param_shardings(parameterwise.configs(record)[1], mesh)
    if not context.section["streamed"]:
        check_memory(context, record)
        result = jax.device_put(parameterwise.replay(transform, params, config, record), shardings)
        store = checkpoints.CheckpointStore(context.folder / "checkpoints")
        store.save(0, result, meta)
        store.close()
        return result
    _stream(context, transform, record, meta)
    if not context.section["verify"]:
        return None
    return checkpoints.read_params(context.folder, training.abstract_params(parameterwise.configs(record)[1], mesh))


def check_memory(context: Context, record: Record) -> None:
    """Refuses a result that this machine cannot hold once, where it is computed in the machine's own memory."""
    declared = models.declarations(parameterwise.configs(record)[1]).values()
    needed, free = sum(math.prod(d.shape) * np.dtype(d.dtype).itemsize for d in declared), memory.available()
    if jax.default_backend() == "cpu" and free is not None and needed > free:
        name = context.stage.name
        what = f"a result of {needed / 1e9:.1f} GB does not fit into the {free / 1e9:.1f} GB of memory that are free"
        remedy = f"set {name}.streamed=True with {name}.verify=False"
        if name == "upcycle":
            remedy += ", or use fewer upcycle.replicas"
        raise UserError(what, where=f"{name}.streamed", remedy=remedy)


def _stream(context: Context, transform: Transform, record: Record, meta: dict[str, Any]) -> None:
    """From the checkpoint of `init_from`, with a progress bar; goes on where a killed run was."""
    try:
        with context.display.megabytes() as show:
            streaming.run(
                transform,
                context.inputs["init_from"],
                context.folder / "checkpoints",
                record,
                meta=meta,
                on_progress=show,
            )
    except UserError as error:
        where = f"{context.stage.name}.init_from" if error.where == "source" else error.where
        raise UserError(error.what, where=where, remedy=error.remedy) from error
