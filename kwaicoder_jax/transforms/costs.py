"""What a shape costs, in closed form: parameters, bytes, and the time of a decode step on one chip.

A search weighs more shapes than could be traced, so the sums are taken over the axes that the unpruned model declares:
a parameter's size is the product of the sizes of its axes, whatever the parameter is.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import hardware, models
from kwaicoder_jax.transforms.target import Target, axes, present


@dataclasses.dataclass(frozen=True)
class Serving:
    """How the model would be served.

    Attributes:
      chip: of the chip table.
      context: tokens in the cache of each sequence.
      batch: sequences decoded together.
    """

    chip: hardware.Chip
    context: int = 4096
    batch: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one shape.

    Attributes:
      params: parameters.
      active: those that one token uses.
      bytes: of all weights, as they are stored (`param_dtype`).
      latency: seconds of a decode step; None unless asked for.
    """

    params: int
    active: int
    bytes: int
    latency: float | None = None


class Costs:
    """Costs of any shape that a model can be cut to."""

    def __init__(self, config: models.ModelConfig):
        """Reads the declarations of `config`, once."""
        self._config = config
        self._terms = [
            (name, d, dict(zip(d.axes, d.shape)), np.dtype(d.dtype).itemsize)
            for name, d in models.declarations(config).items()
        ]

    def of(self, target: Target, serving: Serving | None = None) -> Cost:
        """The cost of the model cut to `target`, which need not be resolved but has to be possible."""
        asked = {name: size for name, size in dataclasses.asdict(target).items() if size is not None}
        sizes = present(self._config) | asked
        params = active = size_bytes = 0
        for _, d, full, itemsize in self._terms:
            count, used = self._count(d, full, sizes)
            params, active, size_bytes = params + count, active + used, size_bytes + count * itemsize
        return Cost(params, active, size_bytes, None if serving is None else self._decode_seconds(sizes, serving))

    def _count(self, d: models.Declaration, full: dict[str, int], sizes: Mapping[str, int]) -> tuple[int, int]:
        """Parameters of one declaration, and those of them that a token uses."""
        cut = axes(dict(sizes))
        count = math.prod(cut.get(name, full[name]) for name in d.axes)
        if not d.of_experts:
            return count, count
        return count, count // sizes["experts"] * sizes["experts_per_token"]

    def _decode_seconds(self, sizes: Mapping[str, int], serving: Serving) -> float:
        """Seconds in which each of B sequences gets one token: max(FLOPs / peak, bytes / HBM bandwidth).

        bytes = weights + B * context * 2 * L * K * N * itemsize of `dtype` (keys and values). Weights are read once a
        step as they are stored; of an untied embedding only the looked-up rows, which are not counted; of E experts
        the share that B tokens touch when each picks X of them evenly, 1 - (1 - X/E)^B.
        FLOPs = B * (2 per active parameter of a product + 4 * L * H * N * context for scores and mix).
        Latent attention caches R + P a layer instead, and all heads attend to that: 2 * L * H * (2R + P) * context.
        Of a windowed layer the cache is read as far as the window goes, on average over the layers as they are.
        The chip's peak is its bf16 peak. A bound from below: no overhead, no interconnect, one chip.
        """
        c, B = self._config, serving.batch
        weights = products = 0.0
        for name, d, full, itemsize in self._terms:
            count, used = self._count(d, full, sizes)
            touched = 1.0
            if d.of_experts:
                touched = 1.0 - (1.0 - sizes["experts_per_token"] / sizes["experts"]) ** B
            lookup_only = name == "embedding" and not c.tie_embeddings
            weights += 0.0 if lookup_only else count * itemsize * touched
            products += used if d.kind == "matrix" and not lookup_only else 0
        reach = [min(window or serving.context, serving.context) for window in c.windows or (0,)]
        visible = sizes["layers"] * sum(reach) / len(reach)
        if c.mla is None:
            cached, attended = 2.0 * c.head_dim * sizes["kv_heads"], 2.0 * c.head_dim
        else:
            cached, attended = c.mla.kv_rank + c.mla.rope_dim, 2.0 * c.mla.kv_rank + c.mla.rope_dim
        cached *= visible * jnp.dtype(c.dtype).itemsize
        flops = 2.0 * products + 2.0 * attended * sizes["heads"] * visible
        return serving.chip.seconds(B * flops, weights + B * cached)
