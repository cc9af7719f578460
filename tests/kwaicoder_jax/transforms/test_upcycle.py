"""Upcycling in float64 against the reference: what is exact, what is not, and by how much."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import Target, importance, prune, upcycle

from . import reference
from .upcycling import CONFIG, LOSSLESS, LOSSY, SCORES, scores_of

EXACT = 1e-12  # float64


@pytest.fixture(scope="module")
def params():
    return reference.float64(testing.random_params(CONFIG))


@pytest.fixture(scope="module")
def tokens():
    """Inputs of an MLP: [B, T, D], one of them zero, where all router logits tie."""
    x = np.random.default_rng(1).standard_normal((2, 6, CONFIG.model_dim))
    x[1, 3] = 0
    return x


def layer(params, name, index):
    return jax.tree.map(lambda x: x[index], params["layers"][name])


def errors(params, moe, config, tokens):
    """Largest relative error of the mixture layer over the layers of the stack."""
    dense = [reference.dense_mlp(tokens, layer(params, "mlp", i))[0] for i in range(CONFIG.layers)]
    mixed = [reference.moe(tokens, layer(moe, "moe", i), config.experts) for i in range(CONFIG.layers)]
    return max(reference.relative(m, d) for m, d in zip(mixed, dense))


@pytest.mark.parametrize("granularity", [1, 2, 4, 8])
@pytest.mark.parametrize(("replicas", "top"), [(1, 1), (2, 1), (2, 2), (8, 1), (8, 2)])
def test_the_function_is_the_same(params, tokens, granularity, replicas, top):
    moe, config, record = upcycle.apply(
        params, CONFIG, granularity=granularity, replicas=replicas, top_replicas=top, router_std=0.3, seed=granularity
    )
    models.check(moe, config)
    assert config.experts == models.ExpertsConfig(granularity * replicas, granularity * top, 48 // granularity)
    assert record["lossless"]
    assert all(x.dtype == np.float64 for x in jax.tree.leaves(moe))
    assert errors(params, moe, config, tokens) < EXACT


@pytest.mark.parametrize("name", LOSSLESS)
def test_every_exact_choice_is_exact(params, tokens, name):
    options = {"router_std": 0.3} | LOSSLESS[name]
    moe, config, record = upcycle.apply(params, CONFIG, granularity=4, replicas=3, **options)
    models.check(moe, config)
    assert record["lossless"]
    assert record["lossy_because"] == []
    assert record["top_replicas"] * 4 == record["experts_per_token"] == config.experts.experts_per_token
    assert errors(params, moe, config, tokens) < EXACT
    assert record == json.loads(json.dumps(record))


@pytest.mark.parametrize("placement", ["balanced", "down", "up"])
@pytest.mark.parametrize(
    "router",
    [
        {"router": "topk_softmax"},
        {"router": "softmax_topk_renormalised"},
        {"router": "sigmoid", "routed_scale": 2.5},
        {"router": "sigmoid", "router_bias": True},
    ],
    ids=str,
)
def test_every_router_with_every_placement(params, tokens, router, placement):
    for granularity, replicas, top in ((2, 8, 2), (8, 2, 1)):
        moe, config, _ = upcycle.apply(
            params, CONFIG, granularity=granularity, replicas=replicas, top_replicas=top, router_std=0.3,
            scale_placement=placement, **router,
        )  # fmt: skip
        assert errors(params, moe, config, tokens) < EXACT


@pytest.mark.parametrize("name", LOSSY)
def test_control_what_is_lossy_is_refused_and_differs(params, tokens, name):
    """In one line with the remedy; with allow_lossy the layer is further off than any tolerance here."""
    options, field, remedy = LOSSY[name]
    with pytest.raises(UserError, match=rf"upcycle\.{field}.*{remedy}.*allow_lossy=True") as caught:
        upcycle.apply(params, CONFIG, granularity=4, replicas=3, **options)
    assert "\n" not in str(caught.value)
    moe, config, record = upcycle.apply(params, CONFIG, granularity=4, replicas=3, allow_lossy=True, **options)
    assert not record["lossless"]
    assert len(record["lossy_because"]) == 1
    assert errors(params, moe, config, tokens) > 0.01


def test_what_would_be_lossy_but_changes_nothing(params, tokens):
    """Nothing to scale, and too few neurons to drop one."""
    for options in ({"granularity": 1, "scale_placement": "cube_root"}, {"granularity": 8, "drop_ratio": 0.05}):
        moe, config, record = upcycle.apply(params, CONFIG, replicas=2, **options)
        assert record["lossless"]
        assert errors(params, moe, config, tokens) < EXACT


def test_shared_expert(params):
    """The most important neurons of each layer, unscaled, or doubled behind a gate of one half."""
    options = {"granularity": 4, "replicas": 2, "shared_neurons": 8, "scores": SCORES}
    best = [sorted(np.argsort(-row)[:8]) for row in SCORES.neurons_LF]
    for gate, placement, up, down in (
        (False, "balanced", 1, 1),
        (True, "down", 1, 2),
        (True, "balanced", 2**0.5, 2**0.5),
    ):
        moe, config, record = upcycle.apply(params, CONFIG, shared_gate=gate, scale_placement=placement, **options)
        shared = moe["layers"]["moe"]["shared"]
        for layer_, neurons in enumerate(best):
            np.testing.assert_array_equal(shared["gate"][layer_], params["layers"]["mlp"]["gate"][layer_][:, neurons])
            np.testing.assert_allclose(shared["up"][layer_], up * params["layers"]["mlp"]["up"][layer_][:, neurons])
            np.testing.assert_allclose(shared["down"][layer_], down * params["layers"]["mlp"]["down"][layer_][neurons])
        assert record["shared"]["neurons"] == np.array(best).tolist()
        assert (config.experts.mlp_dim, config.experts.shared_mlp_dim) == (10, 8)
        if gate:
            assert not moe["layers"]["moe"]["shared_gate"].any()


def test_router_starts(params):
    """One row per replica; zero, at right angles, or along the clusters of the layer's inputs."""
    options = {"granularity": 4, "replicas": 3, "router_std": 0.05}
    rows = {}
    for method in ("normal", "zeros", "orthogonal"):
        moe, _, _ = upcycle.apply(params, CONFIG, router_init=method, **options)
        router_LDRG = moe["layers"]["moe"]["router"].reshape(2, 32, 3, 4)
        assert (router_LDRG == router_LDRG[..., :1]).all()
        rows[method] = router_LDRG[..., 0]
    assert not rows["zeros"].any()
    gram = np.einsum("ldr,lds->lrs", rows["orthogonal"], rows["orthogonal"])
    np.testing.assert_allclose(gram, np.tile(0.05**2 * 32 * np.eye(3), (2, 1, 1)), atol=1e-8)
    with pytest.raises(UserError, match=r"upcycle\.router_init: 33 rows of 32"):
        upcycle.apply(params, CONFIG, granularity=4, replicas=33, router_init="orthogonal")

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2, 3, 32)) + 3  # with a large mean, which the rows must not see
    cluster = np.arange(90) % 3
    inputs = centres[:, cluster] + 0.1 * rng.standard_normal((2, 90, 32))
    moe, _, record = upcycle.apply(params, CONFIG, router_init="centroids", mlp_inputs=inputs, **options)
    assert np.shape(record["router_rows"]) == (2, 3, 32)
    taken = (inputs @ moe["layers"]["moe"]["router"])[..., ::4].argmax(-1)
    for layer_ in range(2):
        assert len({(int(a), int(b)) for a, b in zip(cluster, taken[layer_])}) == 3  # a replica each
    np.testing.assert_allclose(np.linalg.norm(record["router_rows"], axis=-1), 0.05 * 32**0.5, rtol=1e-6)


def test_the_whole_model(params):
    batch = testing.random_batch(CONFIG, 2, 8)
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=2, replicas=3)
    a, b = (reference.forward(p, c, batch)["logits"] for p, c in ((params, CONFIG), (moe, config)))
    assert reference.relative(b, a) < EXACT


def test_pruned_then_upcycled_composes(params):
    """The three lines of the design page."""
    batch = testing.random_batch(CONFIG, 3, 16)
    single = jax.tree.map(lambda x: x.astype(np.float32), params)
    scores = importance.collect(single, CONFIG, [batch])

    student, student_config, _ = prune.apply(params, CONFIG, scores, Target(model_dim=24, mlp_dim=32, heads=4))
    moe, config, _ = upcycle.apply(student, student_config, granularity=4, replicas=2)
    a, b = (reference.forward(p, c, batch)["logits"] for p, c in ((student, student_config), (moe, config)))
    assert reference.relative(b, a) < EXACT


@pytest.mark.parametrize("taken", [1, 3, 5])
def test_control_part_of_a_replica_is_not_exact(params, tokens, taken):
    moe, config, record = upcycle.apply(
        params, CONFIG, granularity=4, replicas=2, experts_per_token=taken, allow_lossy=True
    )
    assert not record["lossless"]
    assert errors(params, moe, config, tokens) > 0.1


def test_control_shard_major_order_breaks_ties(params, tokens):
    """With all router logits equal, replica-major takes one whole replica and shard-major two halves of the same."""
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=2, replicas=2, router_std=0.0)
    assert errors(params, moe, config, tokens) < EXACT
    shard_major = [0, 2, 1, 3]  # e = g*R + r
    axis = {"router": -1}
    moe["layers"]["moe"] = {n: np.take(x, shard_major, axis.get(n, 1)) for n, x in moe["layers"]["moe"].items()}
    assert errors(params, moe, config, tokens) > 0.1


@pytest.mark.parametrize(("granularity", "least", "most"), [(2, 0.03, 0.15), (4, 0.05, 0.3), (8, 0.08, 0.5)])
def test_control_cube_root_scaling_is_not_exact(params, tokens, granularity, least, most):
    moe, config, record = upcycle.apply(
        params, CONFIG, granularity=granularity, replicas=2, scale_placement="cube_root", allow_lossy=True
    )
    assert set(record["factors"].values()) == {granularity ** (1 / 3)}
    assert least < errors(params, moe, config, tokens) < most


@pytest.mark.parametrize(
    "fault", ["one expert by 0.98", "two shards swapped", "factor on the gate", "order of experts"]
)
def test_control_faults_of_one_expert_are_seen(params, tokens, fault):
    """Each of these is far beyond the tolerance; the layer without it is within."""
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=4, replicas=2, router_std=0.3, scale_placement="down")
    assert errors(params, moe, config, tokens) < EXACT
    w = moe["layers"]["moe"]
    if fault == "one expert by 0.98":
        w["down"][:, 1] *= 0.98
    elif fault == "two shards swapped":  # of one matrix only: of all three it would be another partition
        w["up"][:, [0, 1]] = w["up"][:, [1, 0]]
    elif fault == "factor on the gate":
        w["gate"], w["down"] = w["gate"] * 4, w["down"] / 4
    else:
        w["router"] = w["router"][:, :, [0, 4, 1, 5, 2, 6, 3, 7]]
    assert errors(params, moe, config, tokens) > 1e-3


@pytest.mark.parametrize(("replicas", "top"), [(4, 1), (4, 2), (8, 2), (8, 8)])
@pytest.mark.parametrize("std", [0.003, 0.14])
def test_unnormalised_softmax_gains_exactly(params, tokens, replicas, top, std):
    granularity = 4
    moe, config, record = upcycle.apply(
        params, CONFIG, granularity=granularity, replicas=replicas, top_replicas=top, router="softmax_topk",
        router_std=std, allow_lossy=True,
    )  # fmt: skip
    assert record["lossless"] is (replicas == top)
    w = layer(moe, "moe", 0)
    share = -np.sort(-reference.softmax(tokens @ w["router"][:, ::granularity]), axis=-1)[..., :top].sum(-1)
    gain = share * replicas / top
    assert (gain > 1 - 1e-12).all()
    expected = gain[..., None] * reference.dense_mlp(tokens, layer(params, "mlp", 0))[0]
    assert reference.relative(reference.moe(tokens, w, config.experts), expected) < EXACT


def test_layout_of_experts_and_router(params):
    """e = r*G + g: expert e is shard e % G, its router column that of replica e // G."""
    moe, _, record = upcycle.apply(params, CONFIG, granularity=4, replicas=3, scale_placement="down")
    w, dense = moe["layers"]["moe"], params["layers"]["mlp"]
    for e in range(12):
        shard = slice((e % 4) * 12, (e % 4 + 1) * 12)
        np.testing.assert_array_equal(w["gate"][:, e], dense["gate"][:, :, shard])
        np.testing.assert_array_equal(w["up"][:, e], dense["up"][:, :, shard])
        np.testing.assert_array_equal(w["down"][:, e], 4.0 * dense["down"][:, shard])
        np.testing.assert_array_equal(w["router"][:, :, e], w["router"][:, :, e // 4 * 4])
    assert len(np.unique(w["router"][0, 0])) == 3
    assert abs(np.std(w["router"][:, :, ::4]) / CONFIG.initializer_range - 1) < 0.2  # 192 draws
    assert record["factors"] == {"layers/moe/gate": 1.0, "layers/moe/up": 1.0, "layers/moe/down": 4.0}


def test_record(params):
    moe, config, record = upcycle.apply(params, CONFIG, granularity=4, replicas=3, top_replicas=2)
    assert record == json.loads(json.dumps(record))
    assert record["scale"] == 4.0
    assert record["factors"]["layers/moe/up"] == record["factors"]["layers/moe/down"] == 2.0
    assert record["partition"] == {"method": "contiguous", "order": None}
    assert record["expert_order"] == "replica_major"
    assert record["params_total"] == sum(x.size for x in jax.tree.leaves(moe))
    assert record["params_before"] == sum(x.size for x in jax.tree.leaves(params))
    per_replica = record["params_total"] - record["params_active"]  # one replica of three is idle
    assert per_replica == sum(x.size for x in jax.tree.leaves(params["layers"]["mlp"]))
    assert models.ModelConfig.from_dict(record["config_after"]) == config
    random, _, record = upcycle.apply(params, CONFIG, granularity=4, replicas=3, partition="random_per_replica")
    order = np.array(record["partition"]["order"])
    shard = order[2, 0].reshape(4, 12)[1]
    np.testing.assert_array_equal(random["layers"]["moe"]["gate"][1, 9], params["layers"]["mlp"]["gate"][1][:, shard])


@pytest.mark.parametrize("partition", ["contiguous", "balanced", "random_per_replica"])
def test_kinds_agree_to_the_bit(params, partition):
    """numpy and device arrays, in bf16; with "down" and a power of two, scaling costs no bit at all."""
    host = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
    options = {"granularity": 4, "replicas": 2, "partition": partition, "scores": SCORES}
    a, config, _ = upcycle.apply(host, CONFIG, **options, scale_placement="down")
    b, _, _ = upcycle.apply(jax.tree.map(jnp.asarray, host), CONFIG, **options, scale_placement="down")
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert isinstance(x, np.ndarray)
        assert isinstance(y, jax.Array)
        assert x.dtype == y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x, np.asarray(y))
    down = a["layers"]["moe"]["down"][:, :4].astype(np.float64).reshape(2, 48, 32)
    dense = host["layers"]["mlp"]["down"].astype(np.float64)
    np.testing.assert_array_equal(np.sort(down, axis=1), np.sort(4 * dense, axis=1))
    models.check(jax.eval_shape(lambda p: upcycle.apply(p, CONFIG, **options)[0], host), config)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"granularity": 5}, r"upcycle\.granularity: 5 does not divide the 48 .* 3, 4, 6, 8"),
        ({"granularity": 0}, r"upcycle\.granularity"),
        ({"replicas": 0}, r"upcycle\.replicas"),
        ({"top_replicas": 3}, r"upcycle\.top_replicas: 3 of 2"),
        ({"top_replicas": 0}, r"upcycle\.top_replicas"),
        ({"experts_per_token": 3}, r"upcycle\.experts_per_token: 3 is not a multiple of granularity 4.*allow_lossy"),
        ({"experts_per_token": 9, "allow_lossy": True}, r"upcycle\.experts_per_token: 9 of 8"),
        ({"router": "softmax_topk"}, r"upcycle\.router: softmax_topk does not renormalise.*allow_lossy"),
        ({"router": "argmax"}, r"upcycle\.router: no router 'argmax'"),
        ({"routed_scale": 2.0}, r"upcycle\.routed_scale"),
        ({"router": "sigmoid", "routed_scale": 0.0}, r"upcycle\.routed_scale"),
        ({"scale_placement": "gate"}, r"upcycle\.scale_placement: no placement 'gate'"),
        ({"router_bias": True}, r"upcycle\.router_bias.*use router sigmoid"),
        ({"router_init": "best"}, r"upcycle\.router_init: no such start 'best'"),
        ({"router_init": "centroids"}, r"upcycle\.router_init.*pass what router_init.mlp_inputs returns"),
        ({"router_init": "centroids", "mlp_inputs": np.ones((2, 1, 32))}, r"upcycle\.router_init: inputs of shape"),
        ({"shared_neurons": 6, "scores": SCORES}, r"upcycle\.shared_neurons: 6 of 48 .* 0, 4, 8, 12"),
        ({"shared_neurons": 8}, r"upcycle\.shared_neurons.*pass scores"),
        ({"shared_gate": True}, r"upcycle\.shared_gate.*set shared_neurons"),
        ({"drop_ratio": 1.5}, r"upcycle\.drop_ratio"),
        ({"drop_ratio": 0.5, "drop_replicas": 3}, r"upcycle\.drop_replicas: 3 of 2"),
        ({"drop_ratio": 0.5, "drop_replicas": [2]}, r"upcycle\.drop_replicas.*0 to 1"),
        ({"granularty": 4}, r"upcycle\.granularty: no such field.*'granularity'"),
        ({"partition": "alphabetic"}, r"upcycle\.partition"),
        ({"partition": "balanced"}, r"upcycle\.partition: a balanced partition needs scores"),
        ({"partition": "balanced", "scores": scores_of(CONFIG.replace(layers=5))}, r"upcycle\.scores"),
    ],
)
def test_errors_name_the_field(params, options, words):
    with pytest.raises(UserError, match=words):
        upcycle.apply(params, CONFIG, **({"granularity": 4, "replicas": 2} | options))


def test_a_mixture_is_refused(params):
    with pytest.raises(UserError, match="a mixture already"):
        upcycle.apply(params, testing.moe_config(), granularity=2, replicas=2)
