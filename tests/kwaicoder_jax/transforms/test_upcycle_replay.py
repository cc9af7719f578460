"""One record, one result: numpy or device arrays, whole or one layer at a time, there and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import drop, fold, upcycle

from . import reference
from .upcycling import CONFIG, LOSSLESS, LOSSY

REQUESTS = LOSSLESS | {name: options | {"allow_lossy": True} for name, (options, _, _) in LOSSY.items()}
EVERY_FEATURE = ("default", "sigmoid_bias", "orthogonal", "centroids", "free_diversity", "shared_gate", "one_dropped")
FOLDED = EVERY_FEATURE + ("down", "up", "balanced_per_replica", "shared", "shared_gate_clusters", "cube_root")
FACTOR_2 = ("default", "down", "shared")  # G = 4: every factor is 1, 2 or 4


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, testing.random_params(CONFIG))


def upcycled(params, name, **more):
    return upcycle.apply(params, CONFIG, **({"granularity": 4, "replicas": 3} | REQUESTS[name] | more))


def layer_by_layer(transform, params, record):
    """The result from the record as JSON and single layers of single parameters."""
    record, flat = json.loads(json.dumps(record)), models.flatten(params)
    result = {}
    for name, d in models.declarations(models.ModelConfig.from_dict(record["config_after"])).items():
        if "layers" not in d.axes:
            result[name] = transform.parameter(record, name, {n: flat[n] for n in transform.sources(record, name)})
            continue
        parts = []
        for layer in range(d.shape[0]):
            named = transform.sources(record, name, layer)
            arrays = {n: flat[n][at : at + 1] for n, at in named.items()}
            parts.append(np.asarray(transform.parameter(record, name, arrays, layer)))
            assert parts[-1].shape == (1, *d.shape[1:])
        result[name] = np.concatenate(parts)
    return result


def assert_same(a, b):
    a, b = models.flatten(a), models.flatten(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name], np.float32), np.asarray(b[name], np.float32), err_msg=name)


@pytest.mark.parametrize("name", EVERY_FEATURE)
def test_whole_or_in_parts_numpy_or_device(params, name):
    moe, moe_config, record = upcycled(params, name)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(moe))
    assert_same(moe, layer_by_layer(upcycle, params, record))
    device = jax.tree.map(jnp.asarray, params)
    on_device, _, again = upcycled(device, name)
    assert again == record
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(on_device))
    assert_same(moe, on_device)
    assert_same(moe, layer_by_layer(upcycle, device, record))

    back, _, undone = fold.apply(moe, moe_config, record)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(back))
    assert_same(back, layer_by_layer(fold, moe, undone))
    from_device, _, _ = fold.apply(on_device, moe_config, record)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(from_device))
    assert_same(back, from_device)
    assert_same(back, fold.replay(moe, moe_config, json.loads(json.dumps(undone)))[0])


def ulps(value, expected):
    """Largest difference in units of the last place of the expected value."""
    value, expected = np.asarray(value), np.asarray(expected)
    info = jnp.finfo(expected.dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(expected.astype(np.float64)), float(info.tiny))))
    return np.max(np.abs(value.astype(np.float64) - expected.astype(np.float64)) / 2.0 ** (exponent - info.nmant))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FOLDED)
def test_there_and_back(params, name, dtype):
    """To the bit where factors are powers of two, else within one ulp; from every replica and from their mean."""
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    moe, moe_config, record = upcycled(params, name)
    exact = {n: float(np.log2(f)).is_integer() for n, f in record["factors"].items()}
    assert all(exact.values()) or name not in FACTOR_2
    intact = [r for r in range(3) if r not in record["drop"]["replicas"]]
    for replica in (None, intact[-1], fold.AVERAGE):
        dense, config, undone = fold.apply(moe, moe_config, record, replica=replica)
        assert config == CONFIG
        for n, x in models.flatten(dense).items():
            matrix = n.rsplit("/", 1)[-1]
            whole = all(e for m, e in exact.items() if m.rsplit("/", 1)[1] == matrix)
            assert ulps(x, models.flatten(params)[n]) <= (0 if whole or "/mlp/" not in n else 1), (n, replica)
        if replica == fold.AVERAGE:
            assert undone["spread"].keys() == {f"layers/mlp/{m}" for m in ("gate", "up", "down")}
            assert max(undone["spread"].values()) < 1e-12
            assert undone["replicas"] == intact


def test_average_of_replicas_that_went_apart(params):
    """The mean neuron by neuron, although every replica has its neurons in another order; and the spread."""
    options = {"granularity": 4, "replicas": 2, "partition": "random_per_replica", "scale_placement": "down"}
    moe, config, record = upcycle.apply(params, CONFIG, **options)
    moe["layers"]["moe"]["up"] = moe["layers"]["moe"]["up"] * np.repeat([1.0, 1.5], 4)[None, :, None, None]
    dense, _, undone = fold.apply(moe, config, record, replica="average")
    np.testing.assert_allclose(dense["layers"]["mlp"]["up"], 1.25 * params["layers"]["mlp"]["up"], rtol=1e-6)
    np.testing.assert_array_equal(dense["layers"]["mlp"]["down"], params["layers"]["mlp"]["down"])
    assert undone["spread"]["layers/mlp/up"] == pytest.approx(0.25 / 1.25)
    assert undone["spread"]["layers/mlp/gate"] == 0.0
    for replica, factor in ((0, 1.0), (1, 1.5)):
        up = fold.apply(moe, config, record, replica=replica)[0]["layers"]["mlp"]["up"]
        np.testing.assert_allclose(up, factor * params["layers"]["mlp"]["up"], rtol=1e-6)


def test_fold_refuses(params):
    moe, config, record = upcycled(params, "one_dropped")
    assert fold.plan(record)["replicas"] == [0]
    assert fold.plan(record, "average")["replicas"] == [0, 2]
    for replica in (1, 3, -1):
        with pytest.raises(UserError, match=r"fold\.replica: .* use one of \[0, 2\]"):
            fold.apply(moe, config, record, replica=replica)
    with pytest.raises(UserError, match=r"fold\.replica: no replica 'best'"):
        fold.plan(record, "best")
    moe, config, record = upcycled(params, "dropped")
    with pytest.raises(UserError, match=r"fold\.replica: neurons of every replica"):
        fold.apply(moe, config, record)
    with pytest.raises(UserError, match="another model"):
        fold.apply(moe, config, upcycled(params, "one_dropped", replicas=4)[2])


@pytest.mark.parametrize("chosen", [None, [1], 2])
def test_dropped_neurons(params, chosen):
    """The same neurons of all three matrices, a share of each expert, with the statistics of what they replace."""
    wide = CONFIG.replace(mlp_dim=256)
    params = reference.float64(testing.random_params(wide))
    options = {"granularity": 4, "replicas": 3, "seed": 7}
    exact, config, _ = upcycle.apply(params, wide, **options)
    moe, _, record = upcycle.apply(params, wide, drop_ratio=0.25, drop_replicas=chosen, allow_lossy=True, **options)
    replicas = {None: [0, 1, 2], 2: [1, 2]}.get(chosen if not isinstance(chosen, list) else -1, [1])
    assert record["drop"] == {"ratio": 0.25, "replicas": replicas, "neurons_per_expert": 16}
    changed = []
    for matrix, axis in (("gate", 2), ("up", 2), ("down", 3)):
        old, new = exact["layers"]["moe"][matrix], moe["layers"]["moe"][matrix]
        changed.append((old != new).any(axis=axis))
        neuron_last = 3 if axis == 2 else 2
        assert ((old != new).all(axis=axis) == changed[-1]).all()
        for r in replicas:
            for at in range(2):
                before = np.moveaxis(old[at, r * 4], neuron_last - 2, 0)[changed[-1][at, r * 4]]
                after = np.moveaxis(new[at, r * 4], neuron_last - 2, 0)[changed[-1][at, r * 4]]
                deviation = before.std()  # of 512 entries
                assert abs(after.mean() - before.mean()) < 5 * deviation / 512**0.5
                assert abs(after.std() / deviation - 1) < 5 / 1024**0.5
    assert (changed[0] == changed[1]).all()
    assert (changed[0] == changed[2]).all()
    count_LRG = changed[0].sum(-1).reshape(2, 3, 4)
    assert (count_LRG == 16 * np.isin(np.arange(3), replicas)[None, :, None]).all()
    for at, expert in ((0, 5), (1, 6)):
        np.testing.assert_array_equal(np.flatnonzero(changed[0][at, expert]), drop.neurons(7, at, expert, 64, 16))
    assert (changed[0][0, 4] != changed[0][1, 4]).any()
    models.check(moe, config)


def test_dropping_under_jit_is_refused(params):
    with pytest.raises(UserError, match=r"upcycle\.drop_ratio: .*under jit"):
        jax.jit(lambda p: upcycled(p, "one_dropped")[0])(params)
    jitted = jax.jit(lambda p: upcycled(p, "shared_gate")[0])(params)
    assert_same(jitted, upcycled(params, "shared_gate")[0])
