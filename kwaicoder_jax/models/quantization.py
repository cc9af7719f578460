"""Products of activations and weights in 8 bits while training, by qwix: the master weights stay as they are.

Both operands are scaled to the range of the type along the axis that is contracted (a scale for each token, and one for
each column of the weight), rounded, multiplied and scaled back. The gradient is that of the unrounded product (the
straight-through estimate of Bengio et al. 2013, arXiv 1308.3432). With `gradients` the product of the input's gradient is
quantised in the same way and that of the weight's is not: a sum over all tokens, it needs the range most (SwitchBack,
Wortsman et al. 2023, arXiv 2304.13013, section 2.2); in fp8 gradients are e5m2, the rest e4m3 (Micikevicius et al. 2022,
arXiv 2209.05433).
"""

import enum
import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from kwaicoder_jax.errors import UserError


class Quantization(enum.StrEnum):
    """What dense projections are computed in."""

    NONE = "none"  # the dtype of the computation
    INT8 = "int8"
    FP8 = "fp8"


# qwix scales int8 to 127.5, so that the largest number is on the border of two buckets and falls by chance: to 127 here.
_RANGE = {jnp.int8: f"absmax,{127.5 / 127.0}"}
_TYPES = {  # of operands, and of gradients
    Quantization.INT8: (jnp.int8, jnp.int8),
    Quantization.FP8: (jnp.float8_e4m3fn, jnp.float8_e5m2),
}


def check_installed(quantization: Quantization, where: str) -> None:
    """UserError where qwix is needed and not there."""
    if quantization is not Quantization.NONE and importlib.util.find_spec("qwix") is None:
        raise UserError(
            f"{quantization} needs qwix",
            where=where,
            remedy="pip install 'kwaicoder_jax[quantization]' (qwix), or use none",
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x_MJ: jax.Array, weight_JF: jax.Array, quantization: Quantization, gradients: bool) -> jax.Array:
    """x times the weight in 8 bits, [M, F] in the dtype of `x_MJ`; sums in int32 or float32.

    Args:
      x_MJ: activations.
      weight_JF: in the same dtype.
      quantization: INT8 or FP8.
      gradients: whether the gradient of `x_MJ` is computed in 8 bits too.
    """
    kind, _ = _TYPES[quantization]
    return _product(x_MJ, weight_JF, (kind, kind), 0).astype(x_MJ.dtype)


def _product(left_MJ: jax.Array, right: jax.Array, kinds: tuple[Any, Any], axis: int) -> jax.Array:
    """The last axis of `left_MJ` contracted with `axis` of the matrix `right`, in float32."""
    import qwix  # an extra

    operands = [
        qwix.quantize(
            x.astype(jnp.float32),
            kind,
            channelwise_axes=[1 - contracted],
            calibration_method=_RANGE.get(kind, "absmax"),
        )
        for x, kind, contracted in ((left_MJ, kinds[0], 1), (right, kinds[1], axis))
    ]
    return qwix.dot_general(*operands, (((1,), (axis,)), ((), ())))


_Residuals = tuple[jax.Array, jax.Array]


def _forward(
    x_MJ: jax.Array, weight_JF: jax.Array, quantization: Quantization, gradients: bool
) -> tuple[jax.Array, _Residuals]:
    return product(x_MJ, weight_JF, quantization, gradients), (x_MJ, weight_JF)


def _backward(
    quantization: Quantization, gradients: bool, residuals: _Residuals, dy_MF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_MJ, weight_JF = residuals
    kind, kind_of_gradients = _TYPES[quantization]
    if gradients:
        dx_MJ = _product(dy_MF, weight_JF, (kind_of_gradients, kind), 1).astype(x_MJ.dtype)
    else:
        dx_MJ = dy_MF @ weight_JF.T
    return dx_MJ, x_MJ.T @ dy_MF


product.defvjp(_forward, _backward)
