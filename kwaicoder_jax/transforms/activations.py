"""What every layer's MLP is given on calibration data, reduced inside the forward pass: no activation has to leave it."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from kwaicoder_jax import models
from kwaicoder_jax.models.statistics import COLLECTION

Tokens = tuple[Any, Any, Any]
# (normed inputs x_BTD, parameters of that MLP or mixture, mask_BT) to a tree of arrays
Reduce = Callable[[jax.Array, Mapping[str, Any], jax.Array], Any]

_MODULES, _ENTRY = ("mlp", "moe"), "observed"


def observe(
    params: models.Params, config: models.ModelConfig, tokens: Tokens, reduce: Reduce, *, runtime: models.Runtime,
    collect_layers: bool = False,
) -> tuple[models.Output, Any]:  # fmt: skip
    """Runs the model and shows `reduce` the inputs of every MLP on the way; call it under `jax.jit`.

    `reduce` is traced into the model's own layer, so that what it computes again (router logits, neurons) is what the
    model computes: the compiler finds the two to be one.

    Args:
      params: of any model.
      config: the model.
      tokens: inputs, positions and segments, each [B, T].
      reduce: see `Reduce`.
      runtime: how to compute it.
      collect_layers: as in `models.forward`.

    Returns:
      The model's output, and what `reduce` returned with a leading layer axis.
    """

    wanted = _MODULES[config.experts is not None]  # the dense first layers of a mixture are not shown

    def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name == "__call__" and module.name == wanted and not module.is_initializing():
            seen = reduce(args[0], module.variables["params"], args[1])
            module.sow(COLLECTION, _ENTRY, seen, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        output = models.forward(
            params, config, *tokens, runtime=runtime, statistics=True, collect_layers=collect_layers
        )
    return output, output.statistics["layers"][wanted][_ENTRY]
