"""Every law against its formula in float64, at the borders and between."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.training import Law, PhaseRate, join, phase_rate

FALL = {
    Law.CONSTANT: lambda x: 1.0,
    Law.COSINE: lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    Law.LINEAR: lambda x: 1 - x,
    Law.ONE_MINUS_SQRT: lambda x: 1 - math.sqrt(x),
}


def closed_form(phase, step):
    if step < phase.warmup:
        return phase.start + (phase.peak - phase.start) * (step + 1) / phase.warmup
    x = min((step - phase.warmup) / max(phase.steps - phase.warmup, 1), 1.0)
    return phase.end + (phase.peak - phase.end) * FALL[Law(phase.law)](x)


@pytest.mark.parametrize("law", Law)
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_every_step_follows_the_closed_form(law, warmup):
    phase = PhaseRate(40, 3e-3, 2e-4, warmup, law, start=1e-4)
    expected = [closed_form(phase, step) for step in range(45)]
    np.testing.assert_allclose(phase_rate(phase, jnp.arange(45)), expected, rtol=1e-5)  # float32 cosine, near `end`


@pytest.mark.parametrize("law", Law)
def test_borders(law):
    phase = PhaseRate(100, 1.0, 0.25, 10, law)
    first, last_of_warmup, peak, after = (float(phase_rate(phase, jnp.asarray(s))) for s in (0, 9, 10, 100))
    np.testing.assert_allclose(first, 0.1, rtol=1e-6)  # the first step already learns
    assert (last_of_warmup, peak) == (1.0, 1.0)
    assert after == (1.0 if law == Law.CONSTANT else 0.25)


@pytest.mark.parametrize("law", Law)
def test_after_the_warmup_the_rate_never_rises(law):
    rates = np.asarray(phase_rate(PhaseRate(200, 1.0, 0.1, 20, law), jnp.arange(200)))
    assert (np.diff(rates[:20]) > 0).all()
    assert (np.diff(rates[20:]) <= 0).all()
    assert rates.min() > 0


PHASES = [
    PhaseRate(10, 1.0, warmup=4, law="constant"),
    PhaseRate(1, 0.5, law="constant"),
    PhaseRate(20, 1.0, 0.1, law="cosine"),
    PhaseRate(7, 0.1, 0.0, law="1-sqrt"),
]


def test_join_is_exact_at_the_borders():
    rate, step = join(PHASES), 0
    for phase in PHASES:
        for inside in (0, phase.steps - 1):
            assert float(rate(jnp.asarray(step + inside))) == float(phase_rate(phase, jnp.asarray(inside)))
        step += phase.steps
    np.testing.assert_array_equal(rate(jnp.arange(step, step + 50)), 0.0)


def test_join_under_jit_and_over_a_vector_of_steps_is_the_same():
    rate = join(PHASES)
    alone = [float(rate(jnp.asarray(step))) for step in range(45)]
    for function in (rate, jax.jit(rate)):  # a vectorised cosine differs in the last bits
        np.testing.assert_allclose(alone, function(jnp.arange(45)), rtol=1e-6)


def test_phases_that_meet_have_no_jump():
    """Where a phase starts at the rate at which the one before ended, no step changes the rate by more than one phase's
    own largest step does."""
    phases = [PhaseRate(50, 1.0, 0.4, 10, "linear"), PhaseRate(30, 0.4, 0.0, 0, "linear")]
    jumps = np.abs(np.diff(join(phases)(jnp.arange(90))))
    assert jumps.max() <= 0.1 + 1e-6  # the warm-up's step
    assert jumps[9:].max() <= 0.6 / 40 + 1e-6


@pytest.mark.parametrize("law", Law)
@pytest.mark.parametrize("warmup", [0, 3, 8])
def test_after_the_last_phase_the_rate_stays(law, warmup):
    rates = np.asarray(join([PhaseRate(8, 1.0, 0.2, warmup, law)])(jnp.arange(8, 40)))
    assert len(set(rates.tolist())) == 1
    if warmup < 8:
        np.testing.assert_allclose(rates[0], 1.0 if law == Law.CONSTANT else 0.2, rtol=1e-6)


def test_bad_phases_are_user_errors():
    with pytest.raises(UserError, match=r"rate.law: no law 'cubic'; one of .*cosine"):
        PhaseRate(10, 1.0, law="cubic")
    for warmup in (-1, 11):
        with pytest.raises(UserError, match=f"rate.warmup_share: {warmup} of 10 steps"):
            PhaseRate(10, 1.0, warmup=warmup)
