"""Forward KL from teacher to student through both vocabulary projections, a slice of time at a time.

No array of [tokens, vocabulary] exists outside one slice. The student's gradients are computed in the forward pass,
where the probabilities are at hand: the backward pass only scales them, so nothing is computed twice.
"""

import functools

import jax
import jax.numpy as jnp

SLICE_TOKENS = 1024  # tokens per slice: large enough to fill a matmul, small enough to stay in cache or VMEM


def forward_kl(
    student_BTD: jax.Array,
    student_VD: jax.Array,
    teacher_BTC: jax.Array,
    teacher_VC: jax.Array,
    mask_BT: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """Sum over positions of mask * KL(teacher || student), nats (Hinton et al. 2015; Minitron, 2407.14679, section 3).

    Args:
      student_BTD: final hidden states of the student.
      student_VD: its vocabulary projection.
      teacher_BTC: final hidden states of the teacher, of its own width C; no gradient flows to it.
      teacher_VC: its vocabulary projection.
      mask_BT: weight of each position; no gradient flows to it.
      temperature: divides both logits; the KL is multiplied by its square, so gradients keep their size.
    """
    return _kl(temperature, student_BTD, student_VD, teacher_BTC, teacher_VC, mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(temperature, student_BTD, student_VD, teacher_BTC, teacher_VC, mask_BT):
    return _scan(temperature, False, student_BTD, student_VD, teacher_BTC, teacher_VC, mask_BT)[0]


def _kl_forward(temperature, student_BTD, student_VD, teacher_BTC, teacher_VC, mask_BT):
    total, d_student_BTD, d_student_VD = _scan(
        temperature, True, student_BTD, student_VD, teacher_BTC, teacher_VC, mask_BT
    )
    return total, (d_student_BTD, d_student_VD)


def _kl_backward(temperature, saved, gradient):
    del temperature
    # `gradient` is float32 and may be as fine as 1 / tokens: scale in float32, then round once.
    d_student_BTD, d_student_VD = ((x * gradient).astype(x.dtype) for x in saved)
    return d_student_BTD, d_student_VD, None, None, None


_kl.defvjp(_kl_forward, _kl_backward)


def _scan(temperature, with_gradient, student_BTD, student_VD, teacher_BTC, teacher_VC, mask_BT):
    batch, time, _ = student_BTD.shape
    width = _slice_width(time, max(1, SLICE_TOKENS // batch))
    weights = (student_VD.astype(student_BTD.dtype), teacher_VC.astype(teacher_BTC.dtype))

    def slices(x):  # slice over time, so that a batch axis that is sharded stays sharded
        return jnp.moveaxis(x.reshape(batch, time // width, width, *x.shape[2:]), 1, 0)

    def body(carry, piece):
        total, d_VD = carry
        value, d_hidden, d_piece_VD = _piece(temperature, with_gradient, weights, *piece)
        return (total + value, d_VD + d_piece_VD if with_gradient else d_VD), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros(student_VD.shape if with_gradient else (), jnp.float32))
    (total, d_VD), d_hidden = jax.lax.scan(body, start, (slices(student_BTD), slices(teacher_BTC), slices(mask_BT)))
    if not with_gradient:
        return total, None, None
    d_BTD = jnp.moveaxis(d_hidden, 0, 1).reshape(student_BTD.shape)
    return total, d_BTD, d_VD.astype(student_VD.dtype)


def _piece(temperature, with_gradient, weights, student_BWD, teacher_BWC, mask_BW):
    # Vocabulary first, as in models.vocabulary: the large matrix is then never a transposed operand, which XLA on CPU
    # would copy before each product.
    student_VD, teacher_VC = weights
    scale = 1.0 / temperature
    q_VBW = jnp.einsum("VD,BWD->VBW", student_VD, student_BWD, preferred_element_type=jnp.float32) * scale
    p_VBW = jnp.einsum("VC,BWC->VBW", teacher_VC, teacher_BWC, preferred_element_type=jnp.float32) * scale
    q_log_VBW, p_log_VBW = (jax.nn.log_softmax(logits_VBW, axis=0) for logits_VBW in (q_VBW, p_VBW))
    value = temperature**2 * jnp.sum(mask_BW * jnp.sum(jnp.exp(p_log_VBW) * (p_log_VBW - q_log_VBW), axis=0))
    if not with_gradient:
        return value, None, None
    d_logits = (temperature * mask_BW)[None] * (jnp.exp(q_log_VBW) - jnp.exp(p_log_VBW))
    d_logits = d_logits.astype(student_BWD.dtype)
    # No float32 result here: XLA on CPU has no bfloat16 product of that kind in this layout.
    d_hidden = jnp.einsum("VD,VBW->DBW", student_VD, d_logits).transpose(1, 2, 0)
    d_VD = jnp.einsum("VBW,BWD->VD", d_logits, student_BWD, preferred_element_type=jnp.float32)
    return value, d_hidden, d_VD


def _slice_width(time: int, wanted: int) -> int:
    """The largest divisor of `time` that is not above `wanted`."""
    return max(width for width in range(1, min(time, wanted) + 1) if time % width == 0)
