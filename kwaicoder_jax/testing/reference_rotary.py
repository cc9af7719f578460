"""Rotary positions of one document in float64 numpy, one frequency at a time, for the reference."""

import math

import numpy as np

from kwaicoder_jax.models import ModelConfig, RopeScaling


def rotate(x_TN: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The pair (i, i + N/2) as one complex number, turned by position times frequency i."""
    time, width = x_TN.shape
    turn_TP = np.exp(
        1j * np.outer(np.arange(time), [frequency(i, width // 2, time, config) for i in range(width // 2)])
    )
    turned_TP = (x_TN[:, : width // 2] + 1j * x_TN[:, width // 2 :]) * turn_TP
    if config.rope_scaling is not None and config.rope_scaling.kind == "yarn":
        turned_TP = turned_TP * _yarn_length(config.rope_scaling)
    return np.concatenate([turned_TP.real, turned_TP.imag], axis=-1)


def frequency(i: int, half: int, time: int, config: ModelConfig) -> float:
    """Radians per position of pair i of `half`, in a document of `time` tokens."""
    theta, scaling = config.rope_theta, config.rope_scaling
    plain = theta ** (-i / half)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "dynamic":
        assert config.max_length is not None
        longer = max(1.0, time / config.max_length)
        return (theta * (1 + scaling.factor * (longer - 1)) ** (half / (half - 1))) ** (-i / half)
    assert scaling.original_length is not None
    if scaling.kind == "llama3":
        turns = scaling.original_length * plain / (2 * math.pi)
        if turns > scaling.high_freq_factor:
            return plain
        if turns < scaling.low_freq_factor:
            return plain / scaling.factor
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return (1 - smooth) * plain / scaling.factor + smooth * plain
    return _yarn(i, half, theta, scaling)


def _yarn(i: int, half: int, theta: float, scaling: RopeScaling) -> float:
    """Interpolated where a dimension turns less than beta_slow times over the first length, as it is above beta_fast."""
    assert scaling.original_length is not None

    def dimension(turns: float) -> float:
        return half * math.log(scaling.original_length / turns / 2 / math.pi, theta)  # type: ignore[operator]

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    low, high = (math.floor(low), math.ceil(high)) if scaling.truncate else (low, high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = min(max((i - low) / ((high - low) or 0.001), 0.0), 1.0)
    plain = theta ** (-i / half)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _yarn_length(scaling: RopeScaling) -> float:
    """What queries and keys are multiplied with."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    log = math.log(scaling.factor) / 10
    if scaling.mscale and scaling.mscale_all_dim:
        return (1 + scaling.mscale * log) / (1 + scaling.mscale_all_dim * log)
    return 1 + log
