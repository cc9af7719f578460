"""Attention with its time split over devices, held against float64 on one; prints the largest relative errors as JSON."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kwaicoder_jax.models import context_attention, context_order

AXES = ("data", "fsdp", "expert", "tensor", "context")
HEADS, KV_HEADS = 4, 2


def arrays(batch, time, width):
    rng = np.random.default_rng(0)
    q, k, v, weights = (rng.standard_normal((batch, time, n, width)) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    segments = np.sort(rng.integers(1, 4, (batch, time)))
    segments[0, -time // 6 :] = 0  # padding; a document that crosses every chunk of a row
    segments[1] = 1
    first = np.argmax(segments[:, :, None] == segments[:, None, :], axis=-1)
    return q, k, v, weights, np.arange(time)[None] - first, segments


def reference(q, k, v, weights, positions, segments, scale, window):
    """Output and gradients by q, k, v of sum(weights * output): written out, no positions but the order of a row."""
    del positions
    shared = HEADS // KV_HEADS
    k, v = (np.repeat(x, shared, axis=2) for x in (k, v))
    order = np.arange(q.shape[1])
    see = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order[None])[None]
    see &= (order[:, None] - order[None] < (window or len(order)))[None]
    scores = np.where(see[:, None], np.einsum("BTHN,BSHN->BHTS", q, k) * scale, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("BHTS,BSHN->BTHN", p, v)
    dp = np.einsum("BTHN,BSHN->BHTS", weights, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dq, dk, dv = (
        np.einsum("BHTS,BSHN->BTHN", ds, k),
        np.einsum("BHTS,BTHN->BSHN", ds, q),
        np.einsum("BHTS,BTHN->BSHN", p, weights),
    )
    fold = lambda x: x.reshape(*x.shape[:2], KV_HEADS, shared, -1).sum(3)  # noqa: E731
    return out, dq, fold(dk), fold(dv)


def on(sizes, time, width, window, kernels):
    q, k, v, weights, positions, segments = arrays(2, time, width)
    mask = (segments > 0)[:, :, None, None]
    weights = weights * mask
    mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), AXES)
    place = NamedSharding(mesh, PartitionSpec(AXES[:3], "context"))
    small = [
        jnp.asarray(x, jnp.int32 if x.dtype.kind == "i" else jnp.float32)
        for x in (q, k, v, weights, positions, segments)
    ]
    window_array = None if window is None else jnp.int32(window)

    @functools.partial(jax.jit, in_shardings=place)
    def run(*values):
        q, k, v, weights, positions, segments = map(context_order.balanced, values)

        def total(q, k, v):
            out = context_attention.attention(
                q, k, v, (positions, segments), window_array, scale=0.3, kernels=kernels, interpret=True
            )
            return jnp.sum(out * weights), out

        gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return jax.tree.map(context_order.restored, (out, *gradients))

    expected = reference(q, k, v, weights, positions, segments, 0.3, window)
    got = run(*(jax.device_put(x, place) for x in small))
    return [
        float(np.max(np.abs(a - b) * (mask if number == 0 else 1)) / np.max(np.abs(b)))
        for number, (a, b) in enumerate(zip(got, expected))
    ]


def main():
    context_attention.TILE = 4
    cases = {
        "tiles of 4": ((1, 1, 1, 1, 4), 64, 6, None, False),
        "rows, heads and time": ((1, 2, 1, 2, 2), 16, 6, None, False),
        "window": ((1, 1, 1, 1, 2), 40, 6, 7, False),
        "kernels": ((1, 2, 1, 2, 2), 512, 128, None, True),
    }
    print(json.dumps({name: on(*case) for name, case in cases.items()}))


if __name__ == "__main__":
    main()
