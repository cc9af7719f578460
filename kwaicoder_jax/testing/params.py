"""Random parameters that behave like trained ones: fresh initialisation hides mistakes behind flat logits."""

import math
import zlib

import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.models import Declaration, ModelConfig, Params, declarations, unflatten

LOGIT_STD = 3.0  # about that of a trained model's logits over its vocabulary, nats


def random_params(config: ModelConfig, seed: int = 0, scale: float = 1.0) -> Params:
    """Parameters of "trained" scale as `config` declares them: every layer matters and logits are not flat.

    Norm scales are spread around 1 (0.5 to 1.5); a matrix has standard deviation scale / sqrt(fan-in), so that each
    sublayer adds about as much as the residual stream holds; logits spread by about 3 nats * scale. Each parameter
    depends only on (seed, its name, its shape), so adding a parameter does not change the others.

    Args:
      config: the model.
      seed: any non-negative integer.
      scale: multiplies every matrix; norms keep theirs.
    """
    flat = {}
    for name, declaration in declarations(config).items():
        rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
        if declaration.kind == "scale":
            values = rng.uniform(0.5, 1.5, declaration.shape)
        else:
            values = rng.standard_normal(declaration.shape) * (scale * _standard_deviation(declaration))
        flat[name] = jnp.asarray(values, declaration.dtype)
    return unflatten(flat)


def _standard_deviation(declaration: Declaration) -> float:
    """1 / sqrt(fan-in), read off the logical axes: a matrix maps to `embed` where that axis is last, else from its first.

    Biases are smaller than what they are added to: activations of size 1, or sigmoids of spread 0.2 in a router.
    """
    sizes = dict(zip(declaration.axes, declaration.shape))
    if declaration.kind == "bias":
        return 0.1 if declaration.inner_axes == ("experts",) else 0.3
    if "vocab" in sizes:
        return LOGIT_STD / math.sqrt(sizes["embed"])
    inner = [axis for axis in declaration.inner_axes if axis != "experts" or declaration.axes[-1] == "experts"]
    incoming = inner[:-1] if inner[-1] == "embed" else inner[:1]
    return 1.0 / math.sqrt(math.prod(sizes[axis] for axis in incoming))
