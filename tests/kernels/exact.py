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
