"""Upcycling through the mixture layer that is trained: forward, gradients, bf16, ties, and a sharded mesh."""

import functools
import itertools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.models.layers import DenseMLP
from kwaicoder_jax.models.moe import MoE
from kwaicoder_jax.transforms import upcycle

from . import reference
from .upcycling import CONFIG, LOSSLESS, LOSSY, SCORES

GRID = [(g, r, k) for g in (1, 2, 4, 8) for r, k in ((1, 1), (2, 1), (2, 2), (8, 1), (8, 2))]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, testing.random_params(CONFIG))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).standard_normal((2, 40, CONFIG.model_dim)).astype(np.float32)


def weights(params, name):
    return jax.tree.map(lambda x: x[0], params["layers"][name])


def dense_mlp(config, w, x):
    return DenseMLP(config, models.Runtime(), config.mlp_dim).apply({"params": w}, x, jnp.ones(x.shape[:2], bool))


def mixture(config, w, x):
    return MoE(config, models.Runtime()).apply({"params": w}, x, jnp.ones(x.shape[:2], bool))[0]


# Twenty mixtures are compiled here and run once each, so the compiler's time is what counts.
jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
run_dense_mlp, run_mixture = jit(dense_mlp), jit(mixture)


@pytest.mark.parametrize(("granularity", "replicas", "top"), GRID)
def test_forward_float32(params, tokens, granularity, replicas, top):
    moe, config, _ = upcycle.apply(
        params, CONFIG, granularity=granularity, replicas=replicas, top_replicas=top, router_std=0.3
    )
    expected, _ = reference.dense_mlp(tokens.astype(np.float64), reference.float64(weights(params, "mlp")))
    assert reference.relative(run_mixture(config, weights(moe, "moe"), tokens), expected) < 1e-5


@pytest.mark.parametrize("placement", ["balanced", "down", "up"])
@pytest.mark.parametrize("name", ["renormalised", "sigmoid_bias", "centroids", "free_diversity", "shared_gate"])
def test_every_router_and_placement_float32(params, tokens, name, placement):
    """The layer that is trained, not the reference: one compilation for each router, since placement is in the weights."""
    options = {"router_std": 0.3} | LOSSLESS[name] | {"scale_placement": placement}
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=4, replicas=3, **options)
    expected, _ = reference.dense_mlp(tokens.astype(np.float64), reference.float64(weights(params, "mlp")))
    assert reference.relative(run_mixture(config, weights(moe, "moe"), tokens), expected) < 1e-5


@pytest.mark.parametrize("name", LOSSY)
def test_control_what_is_lossy_fails_the_same_tolerance(params, tokens, name):
    """In the layer that is trained, by three orders of magnitude and more."""
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=4, replicas=3, allow_lossy=True, **LOSSY[name][0])
    expected, _ = reference.dense_mlp(tokens.astype(np.float64), reference.float64(weights(params, "mlp")))
    assert reference.relative(run_mixture(config, weights(moe, "moe"), tokens), expected) > 1e-2


@pytest.fixture(scope="module")
def bf16(params, tokens):
    """Config, rounded parameters, tokens, and what the dense layer makes of them in bf16 and exactly."""
    config = CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16")
    rounded, x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), tokens.astype(jnp.bfloat16)
    dense = np.asarray(run_dense_mlp(config, weights(rounded, "mlp"), x), np.float64)
    exact, _ = reference.dense_mlp(x.astype(np.float64), reference.float64(weights(rounded, "mlp")))
    return config, rounded, x, dense, exact


@pytest.mark.parametrize(("granularity", "replicas", "top"), GRID)
def test_forward_bf16_within_a_few_ulp(bf16, granularity, replicas, top):
    """As near to the exact function as the dense layer in bf16 is, and within 4 ulp of a token's largest output.

    Every placement of the factor, and routers of random rows, of rows that replicas share in pairs, and of zeros alone:
    with the latter two, replicas tie exactly, at the border too. One program for all of them.
    """
    config, rounded, x, dense, exact = bf16
    ulp = 2.0**-8 * np.max(np.abs(exact), axis=-1, keepdims=True)
    for placement, ties in itertools.product(("balanced", "down", "up"), ("none", "pairs", "all")):
        moe, moe_config, _ = upcycle.apply(
            rounded, config, granularity=granularity, replicas=replicas, top_replicas=top,
            router_std=0.0 if ties == "all" else 0.3, scale_placement=placement,
        )  # fmt: skip
        w = weights(moe, "moe")
        if ties == "pairs":
            w["router"] = w["router"][:, np.arange(granularity * replicas) // (2 * granularity) * (2 * granularity)]
        y = np.asarray(run_mixture(moe_config, w, x), np.float64)
        assert np.sqrt(np.mean((y - exact) ** 2)) < 2 * np.sqrt(np.mean((dense - exact) ** 2)), (placement, ties)
        assert (np.abs(y - dense) < 4 * ulp).all(), (placement, ties)


def test_control_bf16_fails_shard_major_where_replicas_tie(bf16):
    """The same tolerance sees two copies of one shard."""
    config, rounded, x, dense, exact = bf16
    moe, moe_config, _ = upcycle.apply(rounded, config, granularity=2, replicas=2, router_std=0.0)
    shard_major = [0, 2, 1, 3]  # e = g*R + r
    w = {n: v[..., shard_major] if n == "router" else v[shard_major] for n, v in weights(moe, "moe").items()}
    y = np.asarray(run_mixture(moe_config, w, x), np.float64)
    ulp = 2.0**-8 * np.max(np.abs(exact), axis=-1, keepdims=True)
    assert (np.abs(y - dense) > 4 * ulp).any()
    assert np.sqrt(np.mean((y - exact) ** 2)) > 10 * np.sqrt(np.mean((dense - exact) ** 2))


@pytest.mark.parametrize(
    ("granularity", "replicas", "top", "options"),
    [
        (4, 3, 2, {}),
        (4, 2, 1, {"partition": "random_per_replica", "scale_placement": "down"}),
        (2, 3, 2, {"router": "sigmoid", "routed_scale": 2.5, "scale_placement": "up"}),
        (4, 3, 2, {"router": "softmax_topk_renormalised", "partition": "balanced_per_replica", "scores": SCORES}),
        (4, 3, 2, LOSSLESS["shared_gate"]),
    ],
)
def test_gradient_identity(params, tokens, granularity, replicas, top, options):
    """sum over replicas of s * dL/dw'_{r,g} = dL/dw_dense[shard g], and the layer's input gets the same gradient."""
    moe, config, record = upcycle.apply(
        params, CONFIG,
        **({"granularity": granularity, "replicas": replicas, "top_replicas": top, "router_std": 0.3} | options),
    )  # fmt: skip
    cotangent = np.random.default_rng(2).standard_normal(tokens.shape).astype(np.float32)

    def gradients(layer, config, w):
        return jax.jit(jax.grad(lambda w, x: jnp.sum(layer(config, w, x) * cotangent), argnums=(0, 1)))(w, tokens)

    dense, dense_x = gradients(dense_mlp, CONFIG, weights(params, "mlp"))
    mixed, mixed_x = gradients(mixture, config, weights(moe, "moe"))
    assert reference.relative(mixed_x, dense_x) < 2e-5
    order = record["partition"]["order"]
    width = config.experts.mlp_dim
    for name in ("gate", "up", "down"):
        axis = 0 if name == "down" else 1
        total = np.zeros(dense[name].shape)
        for e in range(granularity * replicas):
            r, g = divmod(e, granularity)
            neurons = np.arange(CONFIG.mlp_dim) if order is None else np.array(order[r][0])
            assert width * granularity == len(neurons)
            shard = neurons[g * width : (g + 1) * width]
            part = record["factors"][f"layers/moe/{name}"] * np.asarray(mixed[name][e], np.float64)
            total[(slice(None),) * axis + (shard,)] += part
        if record["shared"]["neurons"]:
            part = record["factors"][f"layers/moe/shared/{name}"] * np.asarray(mixed["shared"][name], np.float64)
            total[(slice(None),) * axis + (np.array(record["shared"]["neurons"][0]),)] += part
        assert reference.relative(total, dense[name]) < 2e-5, name


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_whole_replicas_are_taken(params, tokens, std):
    """In bf16 router rows too, where ties between replicas are real: every chosen replica brings all its G shards."""
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    moe, config, _ = upcycle.apply(rounded, CONFIG, granularity=4, replicas=8, top_replicas=2, router_std=std)
    x = tokens.reshape(-1, CONFIG.model_dim)
    logits_ME = jnp.einsum("md,de->me", x, weights(moe, "moe")["router"].astype(np.float32))
    _, chosen_MX, _ = models.choose_experts(logits_ME, config.experts)
    counts = np.stack([np.bincount(row // 4, minlength=8) for row in np.asarray(chosen_MX)])
    assert (np.sort(counts, axis=1) == [0] * 6 + [4, 4]).all()


MESH = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_numpy_rank_promotion", "raise")
from kwaicoder_jax import models, testing
from kwaicoder_jax.transforms import upcycle
config = testing.dense_config(layers=2)
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
def sharding(c):
    named = {n: NamedSharding(mesh, P(*("fsdp" if a == "embed" else None for a in d.axes)))
             for n, d in models.declarations(c).items()}
    return models.unflatten(named)
host = jax.tree.map(np.asarray, testing.random_params(config))
params = jax.device_put(host, sharding(config))
options = dict(granularity=4, replicas=3, top_replicas=2)
expected, moe_config, _ = upcycle.apply(host, config, **options)
jitted = jax.jit(lambda p: upcycle.apply(p, config, **options)[0], out_shardings=sharding(moe_config))
text = jitted.lower(params).compile().as_text()
assert not [op for op in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if op in text], text
for result in (jitted(params), upcycle.apply(params, config, **options)[0]):
    jax.tree.map(np.testing.assert_array_equal, result, expected)
    assert len(result["layers"]["moe"]["gate"].sharding.device_set) == 4
    assert result["layers"]["moe"]["gate"].addressable_shards[0].data.size * 4 == expected["layers"]["moe"]["gate"].size
print("fine")
"""


def test_on_a_mesh_nothing_is_gathered():
    """Four pretended devices need a process of their own: the flag counts before JAX starts."""
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=4", JAX_PLATFORMS="cpu")
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", MESH], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stderr[-3000:]
