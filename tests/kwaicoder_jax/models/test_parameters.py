"""What a config declares, counted by hand."""

import jax
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError

CONFIGS = testing.small_configs() | testing.family_configs()
SMALL = pytest.mark.parametrize("name", testing.small_configs())
EACH = pytest.mark.parametrize("name", CONFIGS)


@EACH
def test_init_makes_what_is_declared(name):
    config = CONFIGS[name]
    shapes = jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(lambda k: models.init(config, k), jax.random.key(0))
    )
    assert models.flatten(shapes) == {n: (d.shape, d.dtype) for n, d in models.declarations(config).items()}
    assert jax.tree.structure(models.abstract(config)) == jax.tree.structure(testing.random_params(config))
    models.check(models.abstract(config), config)


@EACH
def test_every_axis_is_named_and_sized_as_the_config_says(name):
    c = CONFIGS[name]
    sizes = {
        "layers": c.layers - c.dense_layers, "dense_layers": c.dense_layers, "embed": c.model_dim, "heads": c.heads,
        "kv_heads": c.kv_heads, "head_dim": c.head_dim, "mlp": c.mlp_dim, "vocab": c.vocab_size,
    }  # fmt: skip
    if m := c.mla:
        sizes |= {"q_latent": m.q_rank, "kv_latent": m.kv_rank, "kv_latent_and_rope": m.kv_rank + m.rope_dim}
        sizes |= {"nope_and_value": m.nope_dim + m.value_dim, "value_dim": m.value_dim}
    if c.experts is not None:
        sizes |= {"experts": c.experts.num_experts, "expert_mlp": c.experts.mlp_dim}
        sizes |= {"shared_mlp": c.experts.shared_mlp_dim, "shared": 1}
    for parameter, d in models.declarations(c).items():
        assert d.shape == tuple(sizes[axis] for axis in d.axes), parameter
        assert (d.axis("layers") == 0) == parameter.startswith("layers/")
        assert (d.axis("dense_layers") == 0) == parameter.startswith("dense_layers/")
        assert d.axis("no such axis") is None


@SMALL
def test_count_by_hand(name):
    c = CONFIGS[name]
    attention = c.model_dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    outside = c.vocab_size * c.model_dim * (1 if c.tie_embeddings else 2) + c.model_dim
    if c.experts is None:
        mlp = active = 3 * c.model_dim * c.mlp_dim
    else:
        router, expert = c.model_dim * c.experts.num_experts, 3 * c.model_dim * c.experts.mlp_dim
        router += c.experts.num_experts * c.experts.router_bias
        router += 3 * c.model_dim * c.experts.shared_mlp_dim + c.model_dim * c.experts.shared_gate
        mlp, active = router + expert * c.experts.num_experts, router + expert * c.experts.experts_per_token
    layer = attention + 2 * c.model_dim
    assert models.count(c) == outside + c.layers * (layer + mlp)
    assert models.count_active(c) == outside + c.layers * (layer + active)
    assert models.count(c) == sum(leaf.size for leaf in jax.tree.leaves(testing.random_params(c)))


def test_active_parameters_of_families():
    """All but what 7 of 9 experts, and 5 of 7 with biases, have in each mixture layer."""
    v3, biased = CONFIGS["deepseek_v3"], CONFIGS["mixtral_with_biases"]
    assert models.count(v3) - models.count_active(v3) == 2 * 7 * 3 * 32 * 14
    assert models.count(biased) - models.count_active(biased) == 3 * 5 * (3 * 32 * 14 + 2 * 14 + 32)


def test_kinds_and_what_writes_to_the_residual_stream():
    declared = models.declarations(CONFIGS["mixtral_with_biases"]) | models.declarations(CONFIGS["deepseek_v3"])
    kinds = {name: d.kind for name, d in declared.items()}
    assert (
        kinds["layers/attention/out_bias"] == kinds["layers/moe/router_bias"] == kinds["layers/moe/gate_bias"] == "bias"
    )
    assert kinds["layers/attention/kv_down_norm/scale"] == kinds["final_norm/scale"] == "scale"
    assert kinds["embedding"] == kinds["layers/moe/router"] == kinds["dense_layers/attention/kv_up"] == "matrix"
    writing = {name.split("/", 1)[1] for name, d in declared.items() if d.writes}
    assert writing == {
        "attention/out", "attention/out_bias", "mlp/down", "moe/down", "moe/down_bias", "moe/shared/down"
    }  # fmt: skip
    of_experts = {name.rsplit("/", 1)[1] for name, d in declared.items() if d.of_experts}
    assert of_experts == {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"}


def test_count_of_a_published_model():
    smollm2_135m = models.ModelConfig(49152, 30, 576, 9, 3, 64, 1536, tie_embeddings=True)
    assert models.count(smollm2_135m) == 134_515_008  # numel over the published checkpoint


def test_initialisation_scale():
    """Matrices of std `initializer_range`; those that write to the residual stream are smaller by sqrt(2 layers)."""
    config = testing.dense_config(model_dim=64, layers=4, qkv_bias=True, mlp_bias=True, qk_norm="head")
    for name, leaf in models.flatten(jax.jit(models.init, static_argnums=0)(config, jax.random.key(1))).items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
        elif name.endswith("bias"):
            np.testing.assert_array_equal(leaf, 0)
        else:
            expected = 0.02 / 8**0.5 if name.endswith(("out", "down")) else 0.02
            np.testing.assert_allclose(np.std(leaf), expected, rtol=0.05, err_msg=name)
            layers = np.asarray(leaf)
            assert name in ("embedding",) or not np.array_equal(layers[0], layers[1]), "layers must differ"


def scanned(program):
    """What all loops over layers or time give."""
    for equation in program.eqns:
        if equation.primitive.name == "scan":
            yield from (variable.aval for variable in equation.outvars)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from scanned(inner)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_stacked_in_the_dtype_of_the_computation(dtype):
    """A scan over layers reads and gives matrices in `dtype`; the router, scales and what comes out are float32."""
    config = testing.moe_config().replace(dtype=dtype)
    params, batch = testing.random_params(config), testing.random_batch(config, 2, 16)
    gradient_of = jax.grad(testing.mean_loss)
    program = jax.make_jaxpr(lambda params: gradient_of(params, config, batch))(params)
    stacked = {(aval.shape, str(aval.dtype)) for aval in scanned(program.jaxpr)}
    moe = params["layers"]["moe"]
    assert {(moe["down"].shape, dtype), (moe["router"].shape, "float32")} <= stacked
    assert dtype == "float32" or (moe["down"].shape, "float32") not in stacked
    gradients = gradient_of(params, config, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}


def test_parameters_narrower_than_the_computation_stay_as_they_are():
    config = testing.dense_config().replace(param_dtype="bfloat16")
    params, batch = testing.random_params(config), testing.random_batch(config, 1, 4)
    program = str(jax.make_jaxpr(lambda params: testing.run(params, config, batch).hidden_BTD)(params))
    stacked = ",".join(map(str, params["layers"]["mlp"]["gate"].shape))
    assert f"bf16[{stacked}]" in program
    assert f"f32[{stacked}]" not in program


def test_flatten_and_back():
    params = testing.random_params(testing.moe_config())
    flat = models.flatten(params)
    assert "layers/moe/gate" in flat
    assert jax.tree.structure(models.unflatten(flat)) == jax.tree.structure(params)


def test_check_names_the_parameter():
    config = testing.dense_config()
    flat = models.flatten(testing.random_params(config))
    with pytest.raises(UserError, match="layers/mlp/gate: missing"):
        models.check(models.unflatten({n: v for n, v in flat.items() if n != "layers/mlp/gate"}), config)
    with pytest.raises(UserError, match="head: not a parameter of this config"):
        models.check(models.unflatten(flat | {"head": flat["embedding"]}), config)
    with pytest.raises(
        UserError, match=r"layers/attention/key has shape \(3, 32, 2, 8\), the config says \(3, 32, 3, 8\)"
    ):
        models.check(models.unflatten(flat), config.replace(kv_heads=3))
    with pytest.raises(UserError, match=r"^workdir/prune: "):
        models.check({}, config, where="workdir/prune")
