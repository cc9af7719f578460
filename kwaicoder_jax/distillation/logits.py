"""Losses between teacher and student through both vocabulary projections, a slice of time at a time.

No array of [tokens, vocabulary] exists outside one slice. The student's gradients are computed in the forward pass,
where the probabilities are at hand: the backward pass only scales them, so nothing is computed twice.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kwaicoder_jax.distillation import support
from kwaicoder_jax.distillation.divergences import LogitsLoss, divergence
from kwaicoder_jax.distillation.support import TopK
from kwaicoder_jax.models import vocabulary_sharding

SLICE_TOKENS = 1024  # tokens per slice and device: large enough to fill a matmul, small enough to stay in cache or VMEM


@dataclasses.dataclass(frozen=True)
class LogitsSettings:
    """What is compared, and how it is cut.

    Attributes:
      form: the loss.
      temperature: divides both logits; the loss is multiplied by its square, so that gradients keep their size (Hinton
        et al. 2015). Cosine and MSE do not depend on it: the one by its nature, the other because the square cancels.
      skew: the teacher's share in the mixture of SKEWED_KL.
      top_k: compare the teacher's K likeliest tokens and the rest as one bucket; None for the whole vocabulary.
      shards: devices that the rows of the batch are spread over; a slice has `SLICE_TOKENS` for each.
    """

    form: LogitsLoss = LogitsLoss.FORWARD_KL
    temperature: float = 1.0
    skew: float = 0.1
    top_k: int | None = None
    shards: int = 1

    @property
    def divisor(self) -> float:
        """What logits are divided by."""
        return self.temperature if self.form.of_distributions else 1.0


def logits_loss(
    settings: LogitsSettings,
    student_BTD: jax.Array,
    student_VD: jax.Array,
    teacher_BTC: jax.Array,
    teacher_VC: jax.Array,
    mask_BT: jax.Array,
) -> jax.Array:
    """Sum over positions of mask * loss(teacher, student), float32.

    Args:
      settings: which loss.
      student_BTD: final hidden states of the student.
      student_VD: its vocabulary projection.
      teacher_BTC: final hidden states of the teacher, of its own width C; no gradient flows to it.
      teacher_VC: its vocabulary projection.
      mask_BT: weight of each position; no gradient flows to it.
    """
    return _fused(settings, student_BTD, student_VD, (teacher_BTC, teacher_VC), mask_BT)


def cached_logits_loss(
    settings: LogitsSettings, student_BTD: jax.Array, student_VD: jax.Array, teacher: TopK, mask_BT: jax.Array
) -> jax.Array:
    """The same from the teacher's K likeliest tokens of each position, as `support.top_k` found them."""
    return _fused(settings, student_BTD, student_VD, teacher, mask_BT)


def teacher_top_k(settings: LogitsSettings, teacher_BTC: jax.Array, teacher_VC: jax.Array) -> TopK:
    """The `settings.top_k` likeliest tokens of each position; what a cache holds."""
    if not vocabulary_sharding.can_split(teacher_BTC, vocabulary=False):
        return _top_k_on_one_device(settings, teacher_BTC, teacher_VC)
    local_settings = dataclasses.replace(settings, shards=1)
    found, _ = vocabulary_sharding.on_each_device(
        lambda tokens, projections, _: (_top_k_on_one_device(local_settings, *tokens, *projections), []),
        [teacher_BTC],
        [teacher_VC.astype(teacher_BTC.dtype)],
        sums=0,
    )
    return found


def _top_k_on_one_device(settings: LogitsSettings, teacher_BTC: jax.Array, teacher_VC: jax.Array) -> TopK:
    guide, guide_of = _guide(settings, (teacher_BTC, teacher_VC))
    _, pieces = jax.lax.scan(lambda _, piece: (None, guide_of(piece)), None, time_slices(settings.shards, guide))
    return joined(pieces, teacher_BTC.shape[1])


def forward_kl(
    student_BTD: jax.Array,
    student_VD: jax.Array,
    teacher_BTC: jax.Array,
    teacher_VC: jax.Array,
    mask_BT: jax.Array,
    temperature: float = 1.0,
) -> jax.Array:
    """`logits_loss` with KL(teacher || student), nats (Hinton et al. 2015; Minitron, 2407.14679, section 3)."""
    settings = LogitsSettings(temperature=temperature)
    return logits_loss(settings, student_BTD, student_VD, teacher_BTC, teacher_VC, mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(settings, student_BTD, student_VD, teacher, mask_BT):
    return _scan(settings, False, student_BTD, student_VD, teacher, mask_BT)[0]


def _forward(settings, student_BTD, student_VD, teacher, mask_BT):
    total, d_student_BTD, d_student_VD = _scan(settings, True, student_BTD, student_VD, teacher, mask_BT)
    return total, (d_student_BTD, d_student_VD.astype(student_VD.dtype))


def _backward(settings, saved, gradient):
    del settings
    # `gradient` is float32 and may be as fine as 1 / tokens: scale in float32, then round once.
    d_student_BTD, d_student_VD = ((x * gradient).astype(x.dtype) for x in saved)
    return d_student_BTD, d_student_VD, None, None


_fused.defvjp(_forward, _backward)


def _scan(settings, with_gradient, student_BTD, student_VD, teacher, mask_BT):
    """The loss, and its gradients; on a mesh by each device for its own rows, with the projections gathered once."""
    if not vocabulary_sharding.can_split(student_BTD, vocabulary=False):
        return _on_one_device(settings, with_gradient, student_BTD, student_VD, teacher, mask_BT)
    is_stored = isinstance(teacher, TopK)
    arrays, form = jax.tree.flatten(teacher if is_stored else teacher[0])
    weights = [] if is_stored else [teacher[1].astype(teacher[0].dtype)]
    local_settings = dataclasses.replace(settings, shards=1)

    def local(tokens, projections, _):
        own_BTD, own_mask_BT, *rest = tokens
        own = jax.tree.unflatten(form, rest)
        guide = own if is_stored else (own, projections[1])
        total, d_BTD, d_VD = _on_one_device(local_settings, with_gradient, own_BTD, projections[0], guide, own_mask_BT)
        # The sum of this device's rows, spread over them: what leaves has a row for each, and a place for its part of time.
        rows = own_BTD.shape[0]
        return (jnp.full((rows, 1), total / rows), d_BTD), [d_VD] if with_gradient else []

    (total_BC, d_BTD), sums = vocabulary_sharding.on_each_device(
        local,
        [student_BTD, mask_BT, *arrays],
        [student_VD.astype(student_BTD.dtype), *weights],
        sums=int(with_gradient),
    )
    return jnp.sum(total_BC), d_BTD, sums[0].astype(student_VD.dtype) if with_gradient else None


def _on_one_device(settings, with_gradient, student_BTD, student_VD, teacher, mask_BT):
    student_weights_VD = student_VD.astype(student_BTD.dtype)
    guide, guide_of = _guide(settings, teacher)

    def piece(student_BWD, guide_piece, mask_BW):
        compare = _compare(settings, guide_of(guide_piece))
        return _piece(settings, with_gradient, student_weights_VD, student_BWD, compare, mask_BW)

    def body(carry, pieces):
        total, d_VD = carry
        value, d_hidden, d_piece_VD = piece(*pieces)
        return (total + value, d_VD + d_piece_VD if with_gradient else d_VD), d_hidden

    start = (jnp.zeros((), jnp.float32), jnp.zeros(student_VD.shape if with_gradient else (), jnp.float32))
    parts = time_slices(settings.shards, (student_BTD, guide, mask_BT))
    (total, d_VD), d_hidden = jax.lax.scan(body, start, parts)
    if not with_gradient:
        return total, None, None
    return total, joined(d_hidden, student_BTD.shape[1]), d_VD


def _guide(settings: LogitsSettings, teacher: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What is cut along time, and the function from a slice of it to the teacher's logits [V, B, W] or TopK."""
    if isinstance(teacher, TopK):
        return teacher, lambda piece: piece
    teacher_BTC, teacher_VC = teacher
    weights_VC = teacher_VC.astype(teacher_BTC.dtype)

    def logits_of(teacher_BWC):
        logits_VBW = _logits(weights_VC, teacher_BWC, settings.divisor)
        return logits_VBW if settings.top_k is None else support.top_k(logits_VBW, settings.top_k)

    return teacher_BTC, logits_of


def _compare(settings: LogitsSettings, guide: Any) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """The loss and its gradient as a function of the student's logits [V, B, W]."""
    if isinstance(guide, TopK):
        compare = functools.partial(divergence, settings.form, skew=settings.skew)
        return lambda student_VBW: support.through_buckets(compare, student_VBW, guide)
    return lambda student_VBW: divergence(settings.form, student_VBW, guide, settings.skew)


def _piece(settings, with_gradient, weights_VD, student_BWD, compare, mask_BW):
    value_BW, d_VBW = compare(_logits(weights_VD, student_BWD, settings.divisor))
    present_BW = mask_BW != 0  # what is masked may be infinite
    value = settings.divisor**2 * jnp.sum(jnp.where(present_BW, mask_BW * value_BW, 0.0))
    if not with_gradient:
        return value, None, None
    scale_BW = (settings.divisor * mask_BW)[None]
    d_VBW = jnp.where(present_BW[None], scale_BW * d_VBW, 0.0).astype(student_BWD.dtype)
    # No float32 result here: XLA on CPU has no bfloat16 product of that kind in this layout.
    d_hidden_BWD = jnp.einsum("VD,VBW->DBW", weights_VD, d_VBW).transpose(1, 2, 0)
    d_VD = jnp.einsum("VBW,BWD->VD", d_VBW, student_BWD, preferred_element_type=jnp.float32)
    return value, d_hidden_BWD, d_VD


def _logits(weights_VD: jax.Array, hidden_BWD: jax.Array, divisor: float) -> jax.Array:
    # Vocabulary first, as in models.vocabulary: the large matrix is then never a transposed operand, which XLA on CPU
    # would copy before each product.
    logits_VBW = jnp.einsum("VD,BWD->VBW", weights_VD, hidden_BWD, preferred_element_type=jnp.float32)
    return logits_VBW * (1.0 / divisor)


def time_slices(shards: int, tree: Any) -> Any:
    """Arrays [B, T, ...] as [slices, B, W, ...], zeros behind the end; over time, so that a sharded batch stays so."""
    batch, time = jax.tree.leaves(tree)[0].shape[:2]
    count = -(-time // max(1, SLICE_TOKENS * shards // batch))
    width = -(-time // count)
    count = -(-time // width)

    def cut(x):
        padding = [(0, 0), (0, count * width - time)] + [(0, 0)] * (x.ndim - 2)
        return jnp.moveaxis(jnp.pad(x, padding).reshape(batch, count, width, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def joined(tree: Any, time: int) -> Any:
    """The inverse of `time_slices`."""

    def join(x):
        count, batch, width = x.shape[:3]
        return jnp.moveaxis(x, 0, 1).reshape(batch, count * width, *x.shape[3:])[:, :time]

    return jax.tree.map(join, tree)
