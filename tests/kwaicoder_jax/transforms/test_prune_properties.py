"""Any axes together, any head layout, tied or not: a sliced model is the full one with the dropped units at zero."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kwaicoder_jax import models, testing
from kwaicoder_jax.transforms import Target, prune

from . import masks, reference

# float64 on both sides. The norms' epsilon of 1e-18 is small against one channel of 0.005 among 20 (energy 1e-6).
EXACT = 1e-9
SETTINGS = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw):
    """A model (one KV head, heads that each have their own, groups), and a target on any combination of its axes."""
    groups, per_group = draw(st.sampled_from([(1, 4), (4, 1), (2, 3), (3, 2), (1, 1)]))
    config = testing.dense_config(
        layers=draw(st.sampled_from([1, 4])), model_dim=20, heads=groups * per_group, kv_heads=groups, head_dim=4,
        mlp_dim=14, vocab_size=23, tie_embeddings=draw(st.booleans()), norm_epsilon=1e-18,
    )  # fmt: skip
    to_groups = draw(st.integers(1, groups))
    sizes = {"heads": to_groups * draw(st.integers(1, per_group)), "kv_heads": to_groups}
    for field in ("layers", "model_dim", "mlp_dim"):
        sizes[field] = draw(st.integers(1, getattr(config, field)))
    cut = set(draw(st.lists(st.sampled_from(["layers", "model_dim", "mlp_dim", "attention"]), unique=True)))
    if "attention" in cut:
        cut |= {"heads", "kv_heads"}
    return config, {field: size for field, size in sizes.items() if field in cut}, draw(st.integers(0, 2**32 - 1))


def logits(params, config, batch):
    return reference.forward(params, config, batch)["logits"][batch["segment_ids"] > 0]


@SETTINGS
@given(cases())
def test_sliced_equals_masked(case):
    config, sizes, seed = case
    rng = np.random.default_rng(seed)
    params, batch = reference.float64(testing.random_params(config, seed % 7)), testing.random_batch(config, 1, 8, seed)
    kept = masks.draw(rng, config, sizes)
    full = masks.masked(params, config, kept)
    options = {"protect_ends": False}
    student, new, record = prune.apply(params, config, masks.scores_of(rng, config, kept), Target(**sizes), **options)
    models.check(student, new)
    for field, size in sizes.items():
        assert getattr(new, field) == size
    assert record["kept"]["layers"] == kept["layers"].tolist()
    for axis in ("heads", "kv_heads", "mlp"):
        assert record["kept"][axis] == kept[axis][kept["layers"]].tolist()
    assert reference.relative(logits(student, new, batch), logits(full, config, batch)) < EXACT


@SETTINGS
@given(cases())
def test_the_names_of_units_do_not_matter(case):
    """Units renamed, scores renamed with them: the same function comes out."""
    config, sizes, seed = case
    rng = np.random.default_rng(seed)
    params, batch = reference.float64(testing.random_params(config, seed % 7)), testing.random_batch(config, 1, 8, seed)
    kept = masks.draw(rng, config, sizes)
    scores = masks.scores_of(rng, config, kept)
    flat, per_group = models.flatten(params), config.heads // config.kv_heads
    channels, renamed = rng.permutation(config.model_dim), {}
    for name, array in flat.items():
        renamed[name] = np.take(array, channels, models.declarations(config)[name].axes.index("embed"))
    neurons, heads, groups = [], [], []
    for layer in range(config.layers):
        neurons.append(rng.permutation(config.mlp_dim))
        groups.append(rng.permutation(config.kv_heads))
        heads.append(np.concatenate([k * per_group + rng.permutation(per_group) for k in groups[-1]]))
        for name, axis, order in (
            ("mlp/gate", 1, neurons), ("mlp/up", 1, neurons), ("mlp/down", 0, neurons), ("attention/query", 1, heads),
            ("attention/out", 0, heads), ("attention/key", 1, groups), ("attention/value", 1, groups),
        ):  # fmt: skip
            renamed[f"layers/{name}"][layer] = np.take(renamed[f"layers/{name}"][layer], order[-1], axis)
    rows = np.arange(config.layers)[:, None]
    changed = masks.permute(
        scores, channels_D=scores.channels_D[channels], neurons_LF=scores.neurons_LF[rows, neurons],
        heads_LH=scores.heads_LH[rows, heads], groups_LK=scores.groups_LK[rows, groups],
        attention_norm_LD=scores.attention_norm_LD[:, channels], mlp_norm_LD=scores.mlp_norm_LD[:, channels],
        final_norm_D=scores.final_norm_D[channels],
    )  # fmt: skip
    target = Target(**sizes)
    one, config_one, _ = prune.apply(params, config, scores, target, protect_ends=False)
    other, config_other, _ = prune.apply(models.unflatten(renamed), config, changed, target, protect_ends=False)
    assert config_one == config_other
    assert reference.relative(logits(other, config_one, batch), logits(one, config_one, batch)) < EXACT


@SETTINGS
@given(cases())
def test_one_layer_at_a_time_gives_the_same_parameters(case):
    """What streaming from disk relies on."""
    config, sizes, seed = case
    rng = np.random.default_rng(seed)
    params = reference.float64(testing.random_params(config, seed % 7))
    scores = masks.scores_of(rng, config, masks.draw(rng, config, sizes))
    stay = sizes.get("heads", config.heads) // sizes.get("kv_heads", config.kv_heads)
    merge = 2 * stay >= config.heads // config.kv_heads
    student, new, record = prune.apply(params, config, scores, Target(**sizes), protect_ends=False, head_merge=merge)
    flat = models.flatten(params)
    for name, whole in models.flatten(student).items():
        for layer in range(new.layers) if name.startswith("layers/") else (None,):
            arrays = {
                source: flat[source] if place is None else flat[source][place : place + 1]
                for source, place in prune.sources(record, name, layer).items()
            }
            part = prune.parameter(record, name, arrays, layer)
            np.testing.assert_array_equal(part, whole if layer is None else whole[layer : layer + 1])
