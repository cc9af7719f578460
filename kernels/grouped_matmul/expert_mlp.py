"""The whole expert MLP of a mixture layer as one differentiable function: gather, three products, weighted sum.

y[m] = sum over x of weight[m, x] * down_e(activation(x[m] gate_e) * (x[m] up_e)),  e = expert of (m, x)

Its gradient saves the two projections only, not the gathered rows, the activations or the expert outputs: the gradient
of a combine weight is <dy, down(h)> = <dy down^T, h>, which the backward pass has at hand (ScatterMoE, Tan et al. 2024;
SonicMoE, Guo et al. 2025).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import composed_mlp, cpu_mlp, tpu_mlp
from kernels.grouped_matmul.api import Backend
from kernels.grouped_matmul.mlp_types import Activation, Arguments, Gradients, Saved, named
from kernels.grouped_matmul.scaled import Matrices, ScaledMatrices
from kernels.routing import Routing, combine


def expert_mlp(
    x_MD: jax.Array,
    weight_MX: jax.Array,
    routing: Routing,
    gate_EDF: Matrices,
    up_EDF: Matrices,
    down_EFD: Matrices,
    *,
    activation: Activation = jax.nn.silu,
    backend: Backend | str = Backend.AUTO,
) -> jax.Array:
    """Applies each token's experts and adds their outputs; differentiable in everything but `routing`.

    Args:
      x_MD: tokens, in token order.
      weight_MX: combine weights, float32.
      routing: from `sort_by_expert`; pairs that are in no group contribute zero.
      gate_EDF: gate projections, in the dtype of `x_MD`; or all three from `quantize`, and then constants.
      up_EDF: up projections.
      down_EFD: down projections.
      activation: elementwise function of the gate projection; a module-level function, so that it hashes equal.
      backend: a Backend or its value.

    Returns:
      [M, D] in the dtype of `x_MD`; sums in float32.

    Raises:
      ValueError: shapes that do not fit together, or only some matrices quantized.
    """
    arguments = Arguments(x_MD, weight_MX.astype(jnp.float32), gate_EDF, up_EDF, down_EFD)
    _check(arguments, routing)
    return _expert_mlp(Backend(backend), activation, arguments, routing)


def expert_rows(
    arguments: Arguments,
    routing: Routing,
    *,
    activation: Activation = jax.nn.silu,
    backend: Backend | str = Backend.AUTO,
) -> tuple[jax.Array, Saved]:
    """`expert_mlp` before its weighted sum, for those who look into it; not differentiable.

    Args:
      arguments: those of `expert_mlp`.
      routing: as there, like what follows.
      activation: as there.
      backend: as there.

    Returns:
      The experts' outputs [R, D], of which `routing.combine` makes the result, and the projections [R, F]: rows in
      expert order.

    Raises:
      ValueError: shapes that do not fit together.
    """
    _check(arguments, routing)
    return _compute(Backend(backend), activation, arguments, routing)


def _check(arguments: Arguments, routing: Routing) -> None:
    x_MD, weight_MX, gate_EDF, up_EDF, down_EFD = arguments
    if arguments.is_scaled and not all(isinstance(each, ScaledMatrices) for each in arguments[2:]):
        raise ValueError("gate, up and down are quantized all three, or none of them")
    experts, width, neurons = gate_EDF.shape
    shapes = (x_MD.shape[1:], up_EDF.shape, down_EFD.shape, routing.group_sizes_E.shape, routing.row_MX.shape)
    wanted = ((width,), gate_EDF.shape, (experts, neurons, width), (experts,), (x_MD.shape[0], weight_MX.shape[1]))
    if shapes != wanted:
        raise ValueError(f"shapes of x, up, down, group sizes and routing are {shapes}, gate and weights need {wanted}")


def _compute(
    backend: Backend, activation: Activation, arguments: Arguments, routing: Routing
) -> tuple[jax.Array, Saved]:
    """Rows in expert order, and the projections."""
    on_cpu = functools.partial(cpu_mlp.forward, activation)
    composed = functools.partial(composed_mlp.forward, backend, activation)
    return _dispatch(backend, on_cpu, composed, composed, arguments, routing)  # type: ignore[return-value]


def _output(
    backend: Backend, activation: Activation, keep: bool, arguments: Arguments, routing: Routing
) -> tuple[jax.Array, Saved | None]:
    """The layer's output, and the projections with `keep`."""

    def combined(forward: Callable[..., tuple[jax.Array, Saved]]) -> Callable[..., tuple[jax.Array, Saved | None]]:
        def call(arguments: Arguments, routing: Routing) -> tuple[jax.Array, Saved | None]:
            rows_RD, saved = forward(arguments, routing)
            return combine(rows_RD, arguments.weight_MX, routing), saved if keep else None

        return call

    on_cpu = combined(functools.partial(cpu_mlp.forward, activation))
    composed = combined(functools.partial(composed_mlp.forward, backend, activation))
    on_tpu = functools.partial(tpu_mlp.forward, activation, keep=keep) if tpu_mlp.fits(arguments) else composed
    return _dispatch(backend, on_cpu, on_tpu, composed, arguments, routing)  # type: ignore[return-value]


def _dispatch(
    backend: Backend, on_cpu: Callable[..., object], on_tpu: Callable[..., object], composed: Callable[..., object],
    *operands: object,
) -> object:  # fmt: skip
    if backend is Backend.AUTO:
        return jax.lax.platform_dependent(*operands, cpu=on_cpu, tpu=on_tpu, default=composed)
    return {Backend.CPU: on_cpu, Backend.TPU: on_tpu}.get(backend, composed)(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_mlp(backend: Backend, activation: Activation, arguments: Arguments, routing: Routing) -> jax.Array:
    return _output(backend, activation, False, arguments, routing)[0]


_Residuals = tuple[Arguments, Routing, Saved]


def _forward(
    backend: Backend, activation: Activation, arguments: Arguments, routing: Routing
) -> tuple[jax.Array, _Residuals]:
    y_MD, saved = _output(backend, activation, True, arguments, routing)
    assert saved is not None
    return y_MD, (arguments, routing, named(saved))


def _backward(
    backend: Backend, activation: Activation, residuals: _Residuals, dy_MD: jax.Array
) -> tuple[Gradients, None]:
    on_cpu = functools.partial(cpu_mlp.backward, activation)
    composed = functools.partial(composed_mlp.backward, backend, activation)
    if residuals[0].is_scaled:
        return composed(*residuals, dy_MD), None
    on_tpu = functools.partial(tpu_mlp.backward, activation) if tpu_mlp.fits(residuals[0]) else composed
    return _dispatch(backend, on_cpu, on_tpu, composed, *residuals, dy_MD), None  # type: ignore[return-value]


_expert_mlp.defvjp(_forward, _backward)
