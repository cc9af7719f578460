"""What every back end of the grouped matmul is held against."""

import numpy as np

from kernels.grouped_matmul import PLATFORMS, Backend

# What runs on CPU; the kernels for Hopper and TPU have tests of their own.
BACKENDS = [backend for backend in Backend if backend not in PLATFORMS]


def slopes(function, arguments, directions, step=1e-5):
    """d function / d arguments along each direction, by central differences in float64."""
    wide = [np.asarray(array, np.float64) for array in arguments]

    def moved(place, direction, by):
        return function(*(array + by * direction if i == place else array for i, array in enumerate(wide)))

    return [
        (moved(place, direction, step) - moved(place, direction, -step)) / (2 * step)
        for place, direction in enumerate(directions)
    ]


def products(lhs, rhs, sizes, dout):
    """Output, dlhs and drhs in float64, group by group; rows behind the last group give zeros."""
    lhs, rhs, dout = (np.asarray(array, np.float64) for array in (lhs, rhs, dout))
    out, dlhs, drhs = np.zeros_like(dout), np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for group, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        out[rows], dlhs[rows] = lhs[rows] @ rhs[group], dout[rows] @ rhs[group].T
        drhs[group] = lhs[rows].T @ dout[rows]
        start += size
    return out, dlhs, drhs


def layer(x_MD, weight_MX, expert_MX, gate_EDF, up_EDF, down_EFD, dy_MD):
    """Output and gradients of a mixture layer with SiLU in float64, token by token; experts that are not here add nothing."""
    arrays = [np.asarray(array, np.float64) for array in (x_MD, weight_MX, gate_EDF, up_EDF, down_EFD, dy_MD)]
    x_MD, weight_MX, gate_EDF, up_EDF, down_EFD, dy_MD = arrays
    y_MD, gradients = np.zeros_like(x_MD), [np.zeros_like(array) for array in arrays[:-1]]
    dx_MD, dweight_MX, dgate_EDF, dup_EDF, ddown_EFD = gradients
    for (token, choice), expert in np.ndenumerate(expert_MX):
        if expert >= len(gate_EDF):
            continue
        x, dy, weight = x_MD[token], dy_MD[token], weight_MX[token, choice]
        gate, up = x @ gate_EDF[expert], x @ up_EDF[expert]
        sigmoid = 1 / (1 + np.exp(-gate))
        h = gate * sigmoid * up
        y_MD[token] += weight * (h @ down_EFD[expert])
        dh = down_EFD[expert] @ dy
        dweight_MX[token, choice] = dh @ h
        ddown_EFD[expert] += np.outer(h, weight * dy)
        dgate = weight * dh * up * sigmoid * (1 + gate * (1 - sigmoid))
        dup = weight * dh * gate * sigmoid
        dgate_EDF[expert] += np.outer(x, dgate)
        dup_EDF[expert] += np.outer(x, dup)
        dx_MD[token] += gate_EDF[expert] @ dgate + up_EDF[expert] @ dup
    return y_MD, *gradients
