"""How far the student's distribution over one token is from the teacher's, and the gradient, in closed form.

Every function takes logits of student and teacher with the vocabulary as the first axis, [V, ...], in float32, and
returns the value [...] in nats (for cosine and MSE in their own units) and its gradient by the student's logits [V, ...].
Adding a constant to all logits of a token changes nothing, but for cosine and MSE, which compare the logits themselves.
"""

import enum
from collections.abc import Callable

import jax
import jax.numpy as jnp

Pair = tuple[jax.Array, jax.Array]


class LogitsLoss(enum.StrEnum):
    """Losses between logits; p is the teacher's distribution, q the student's.

    FORWARD_KL: sum p log(p / q) (Hinton et al. 2015).
    REVERSE_KL: sum q log(q / p) (MiniLLM, 2306.08543).
    JENSEN_SHANNON: the mean of KL(p || m) and KL(q || m), m = (p + q) / 2; at most log 2.
    SKEWED_KL: KL(p || a p + (1 - a) q) (DistiLLM, 2402.03898, equation 4); a is `skew`.
    COSINE: 1 - cosine of the two vectors of logits (Minitron, 2407.14679, section 3).
    MSE: mean over the vocabulary of the squared difference of logits (the same place).
    """

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JENSEN_SHANNON = "jensen_shannon"
    SKEWED_KL = "skewed_kl"
    COSINE = "cosine"
    MSE = "mse"

    @property
    def of_distributions(self) -> bool:
        """Whether it compares distributions: a temperature means something then, and the tail can be one bucket."""
        return self not in (LogitsLoss.COSINE, LogitsLoss.MSE)


def divergence(form: LogitsLoss, student_V: jax.Array, teacher_V: jax.Array, skew: float) -> Pair:
    """The value [...] and its gradient by the student's logits [V, ...]."""
    if form is LogitsLoss.SKEWED_KL:
        return _skewed_kl(student_V, teacher_V, skew)
    return _FUNCTIONS[form](student_V, teacher_V)


def _forward_kl(student_V: jax.Array, teacher_V: jax.Array) -> Pair:
    q_log_V, p_log_V = _log_softmax(student_V, teacher_V)
    p_V = jnp.exp(p_log_V)
    return jnp.sum(p_V * (p_log_V - q_log_V), axis=0), jnp.exp(q_log_V) - p_V


def _reverse_kl(student_V: jax.Array, teacher_V: jax.Array) -> Pair:
    q_log_V, p_log_V = _log_softmax(student_V, teacher_V)
    return _by_logits(q_log_V, q_log_V - p_log_V)


def _jensen_shannon(student_V: jax.Array, teacher_V: jax.Array) -> Pair:
    q_log_V, p_log_V = _log_softmax(student_V, teacher_V)
    m_log_V = jnp.logaddexp(q_log_V, p_log_V) - jnp.log(2.0)
    of_student, d_V = _by_logits(q_log_V, 0.5 * (q_log_V - m_log_V))
    return of_student + 0.5 * jnp.sum(jnp.exp(p_log_V) * (p_log_V - m_log_V), axis=0), d_V


def _skewed_kl(student_V: jax.Array, teacher_V: jax.Array, skew: float) -> Pair:
    q_log_V, p_log_V = _log_softmax(student_V, teacher_V)
    m_log_V = jnp.logaddexp(jnp.log(skew) + p_log_V, jnp.log1p(-skew) + q_log_V)
    p_V = jnp.exp(p_log_V)
    # By q the gradient is -(1 - a) p / m, by its logits q times that less its mean; q / m stays below 1 / (1 - a).
    share_V = -(1.0 - skew) * p_V * jnp.exp(q_log_V - m_log_V)
    d_V = share_V - jnp.exp(q_log_V) * jnp.sum(share_V, axis=0)[None]
    return jnp.sum(p_V * (p_log_V - m_log_V), axis=0), d_V


def _cosine(student_V: jax.Array, teacher_V: jax.Array) -> Pair:
    (s_V, s_length), (t_V, _) = _unit(student_V), _unit(teacher_V)
    cosine = jnp.sum(s_V * t_V, axis=0)
    return 1.0 - cosine, (cosine[None] * s_V - t_V) / s_length


def _mse(student_V: jax.Array, teacher_V: jax.Array) -> Pair:
    error_V = student_V - teacher_V
    return jnp.mean(jnp.square(error_V), axis=0), error_V * (2.0 / len(error_V))


_FUNCTIONS: dict[LogitsLoss, Callable[[jax.Array, jax.Array], Pair]] = {
    LogitsLoss.FORWARD_KL: _forward_kl,
    LogitsLoss.REVERSE_KL: _reverse_kl,
    LogitsLoss.JENSEN_SHANNON: _jensen_shannon,
    LogitsLoss.COSINE: _cosine,
    LogitsLoss.MSE: _mse,
}


def _log_softmax(*logits_V: jax.Array) -> list[jax.Array]:
    return [jax.nn.log_softmax(x_V, axis=0) for x_V in logits_V]


def _by_logits(q_log_V: jax.Array, cost_V: jax.Array) -> Pair:
    """sum q cost, and its gradient by q's logits where the gradient by q is `cost` and a constant."""
    q_V = jnp.exp(q_log_V)
    mean = jnp.sum(q_V * cost_V, axis=0)
    return mean, q_V * (cost_V - mean[None])


def _unit(x_V: jax.Array) -> Pair:
    """`x` over its length, and the length [1, ...]; below a length of 1e-6 over that, so that zeros stay zeros."""
    largest = jnp.maximum(jnp.max(jnp.abs(x_V), axis=0, keepdims=True), 1e-20)  # squares of huge logits would overflow
    length = jnp.maximum(largest * jnp.sqrt(jnp.sum(jnp.square(x_V / largest), axis=0, keepdims=True)), 1e-6)
    return x_V / length, length
