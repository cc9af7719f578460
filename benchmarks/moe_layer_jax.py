"""Worker of `benchmarks.moe_layer`: our layer, with the CPU back end or `jax.lax.ragged_dot`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels import grouped_matmul, routing
from kernels.grouped_matmul import cpu

if TYPE_CHECKING:
    from benchmarks.moe_layer import LayerShape

BACKENDS = {"ours": "cpu", "ragged_dot": "ragged_dot"}


def arrays(shape: LayerShape) -> list[np.ndarray]:
    """Tokens, router [D, E], gate and up [E, D, F], down [E, F, D], and the output's gradient: float32, the same for all."""
    rng = np.random.default_rng(0)
    experts, width, neurons = shape.experts, shape.model_dim, shape.mlp_dim
    tokens, projection = (shape.tokens, width), (experts, width, neurons)
    shapes = [tokens, (width, experts), projection, projection, (experts, neurons, width), tokens]
    scales = [1.0, width**-0.5, width**-0.5, width**-0.5, neurons**-0.5, 1.0]
    return [(scale * rng.normal(size=size)).astype(np.float32) for size, scale in zip(shapes, scales, strict=True)]


def layer(shape: LayerShape, backend: str) -> Callable[..., jax.Array]:
    """The layer as a function of tokens, router, gate, up and down."""

    def apply(x_MD: jax.Array, router_DE: jax.Array, *weights: jax.Array) -> jax.Array:
        weight_MX, expert_MX = jax.lax.top_k(x_MD @ router_DE, shape.experts_per_token)
        order = routing.sort_by_expert(expert_MX, shape.experts)
        weight_MX = jax.nn.softmax(weight_MX, axis=-1)  # as softmax over all and renormalising
        return grouped_matmul.expert_mlp(x_MD, weight_MX, order, *weights, backend=backend)

    return apply


def build(implementation: str, shape: LayerShape, threads: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A function that runs one pass, and what is executed of it over what is needed; XLA takes all cores by itself."""
    *arguments, dy_MD = (jnp.asarray(array) for array in arrays(shape))
    function = layer(shape, BACKENDS[implementation])

    @jax.jit
    def step(arguments: list[jax.Array], dy_MD: jax.Array) -> Any:
        y_MD, pull = jax.vjp(function, *arguments)
        return y_MD, pull(dy_MD)

    def run() -> Any:
        return jax.block_until_ready(step(arguments, dy_MD))

    run()
    _, expert_MX = jax.lax.top_k(arguments[0] @ arguments[1], shape.experts_per_token)
    sizes = np.bincount(np.asarray(expert_MX).reshape(-1), minlength=shape.experts)
    return run, {"executed": round(cpu.executed_rows(sizes.tolist(), sizes.sum()) / sizes.sum(), 3)}
