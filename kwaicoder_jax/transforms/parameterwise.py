"""Transforms told one parameter at a time, which is what lets one definition run in memory and streamed from disk.

A transform decides first and writes down what it decided (the record); computing a parameter of the result then needs
the record and, of the source model, the parameters that `sources` names: whole, or one layer of them.
"""

from typing import Any, Protocol

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.arrays import Array, like

Record = dict[str, Any]  # JSON-able; holds at least "config_before" and "config_after"


class Transform(Protocol):
    """A module such as `transforms.prune` or `transforms.upcycle`."""

    def sources(self, record: Record, name: str, layer: int | None = None) -> dict[str, int | None]:
        """What parameter `name` of the result is computed from: names of source parameters, and their layer.

        Args:
          record: of the transform.
          name: a parameter of the result.
          layer: a layer of the result, for a parameter that has layers; None asks for all of them at once.

        Returns:
          Source parameter to source layer, which is None where `layer` is None and for parameters without layers.
          Empty for what the transform makes by itself.
        """
        ...

    def parameter(self, record: Record, name: str, arrays: dict[str, Array], layer: int | None = None) -> Array:
        """Parameter `name` of the result.

        Args:
          record: of the transform.
          name: a parameter of the result.
          arrays: what `sources` named; with `layer`, slices [1, ...] of one layer.
          layer: as given to `sources`; the result is then [1, ...] too.

        Returns:
          The kind of array that was given. What is made without a source is numpy.
        """
        ...


def configs(record: Record) -> tuple[models.ModelConfig, models.ModelConfig]:
    """The models before and after, from a record; UserError if they cannot be read."""
    try:
        return models.ModelConfig.from_dict(record["config_before"]), models.ModelConfig.from_dict(
            record["config_after"]
        )
    except KeyError as error:
        raise UserError(f"the record has no {error}", where="record", remedy="use what a transform returned") from error


def replay(transform: Transform, params: models.Params, config: models.ModelConfig, record: Record) -> models.Params:
    """All parameters of the result, in memory; can be traced.

    Args:
      transform: the module that made the record.
      params: numpy, device or sharded arrays; the result is of the same kind. What is unchanged is passed on.
      config: of `params`; has to be the record's.
      record: as the transform returned it, also one read back from JSON.
    """
    models.check(params, config)
    before, after = configs(record)
    if before != config:
        raise UserError("the record is of another model", where="record", remedy="use the config that it was made for")
    flat, declared = models.flatten(params), models.declarations(after)
    example = next(iter(flat.values()))
    result = {}
    for name, declaration in declared.items():
        arrays = {source: flat[source] for source in transform.sources(record, name)}
        array = transform.parameter(record, name, arrays)
        if not arrays:
            dtype = example.dtype if declaration.dtype == np.dtype(after.param_dtype) else declaration.dtype
            array = like(example, np.asarray(array).astype(dtype))
        result[name] = array
    models.check(tree := models.unflatten(result), after, where="record")
    return tree
