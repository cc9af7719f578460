"""The search against brute force: the same shapes, the same costs, the same winner."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kwaicoder_jax import hardware, models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models import ExpertsConfig
from kwaicoder_jax.transforms import Target, importance, prune, retained, search, shapes, verify
from kwaicoder_jax.transforms.costs import Costs, Serving
from kwaicoder_jax.transforms.divergence import Teacher
from kwaicoder_jax.transforms.target import present

from .test_prune import made_scores

CONFIG = testing.dense_config(layers=3, model_dim=24, mlp_dim=32, heads=4, kv_heads=2, vocab_size=41)
SPACE = shapes.Space(multiples={"model_dim": 8, "mlp_dim": 16}, least=0.5)
KINDS = testing.small_configs() | {
    "bf16": testing.moe_config(param_dtype="bfloat16", dtype="bfloat16", tie_embeddings=False,
                               experts=ExpertsConfig(6, 2, 10, "sigmoid", router_bias=True, shared_mlp_dim=5)),
}  # fmt: skip


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_costs_in_closed_form_are_the_counts_of_the_cut_model(data):
    config = KINDS[data.draw(st.sampled_from(sorted(KINDS)))]
    have = present(config)
    sizes = {name: data.draw(st.integers(1, size)) for name, size in have.items() if name != "heads"}
    sizes["heads"] = sizes["kv_heads"] * data.draw(st.integers(1, config.heads // config.kv_heads))
    if "experts" in sizes:
        sizes["experts_per_token"] = min(sizes["experts"], sizes["experts_per_token"])
    context, batch = data.draw(st.integers(0, 10_000)), data.draw(st.integers(1, 64))
    target, chip = Target(**sizes), hardware.Chip("slow arithmetic", data.draw(st.sampled_from([1e3, 1e30])), 1e9, 1e9)
    cut = target.apply(config)
    cost = Costs(config).of(target, Serving(chip, context, batch))
    declared = models.declarations(cut)
    assert cost.params == models.count(cut)
    assert cost.active == models.count_active(cut)
    assert cost.bytes == sum(np.prod(d.shape) * d.dtype.itemsize for d in declared.values())
    if chip.bf16_flops == 1e3:  # FLOPs decide; the causal half of a square of 2 * context is one full row
        assert cost.latency == pytest.approx(batch * models.forward_flops_per_token(cut, 2 * context) / 1e3, rel=1e-9)
        return
    cache = jax.eval_shape(lambda: models.empty_cache(cut, batch, context))
    moved = sum(np.prod(x.shape) * x.dtype.itemsize for x in (cache.key_LBKSN, cache.value_LBKSN))
    for name, d in declared.items():
        idle = 1.0
        if "expert_mlp" in d.axes:
            idle = 1 - (1 - cut.experts.experts_per_token / cut.experts.num_experts) ** batch
        if name != "embedding" or cut.tie_embeddings:
            moved += idle * np.prod(d.shape) * d.dtype.itemsize
    assert cost.latency == pytest.approx(moved / 1e9, rel=1e-9)


def brute_force(config, limit, granularity=1, attention=True):
    """The same rules, by counting every model there is; without `attention`, heads are left alone."""
    found = {}
    for layers, dim, mlp, heads, kv in itertools.product(
        range(1, 4), range(1, 25), range(1, 33), range(1, 5), range(1, 3)
    ):
        sizes = {"layers": layers, "model_dim": dim, "mlp_dim": mlp, "heads": heads, "kv_heads": kv}
        if layers < 2 or dim not in (16, 24) or mlp not in (16, 32) or mlp % granularity:
            continue
        if heads < 2 or heads % kv or heads // kv > 2 or (not attention and (heads, kv) != (4, 2)):
            continue
        count = models.count(config.replace(**sizes))
        if count <= limit:
            found[tuple(sizes.values())] = count
    return found


@pytest.fixture(scope="module")
def limit():
    return int(models.count(CONFIG) * 0.7)


def test_enumeration_is_the_brute_force_list(limit):
    expected = brute_force(CONFIG, limit)
    assert len(expected) > 10
    found = shapes.enumerate_shapes(CONFIG, made_scores(CONFIG), shapes.Budget(max_params=limit), SPACE)
    keys = [tuple(dataclasses.asdict(shape.target)[name] for name in ("layers", "model_dim", "mlp_dim", "heads",
            "kv_heads")) for shape in found]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert {key: shape.cost.params for key, shape in zip(keys, found)} == expected
    fine = dataclasses.replace(SPACE, granularity=32)
    budget = shapes.Budget(max_params=int(models.count(CONFIG) * 0.9))
    found = shapes.enumerate_shapes(CONFIG, made_scores(CONFIG), budget, fine)
    assert len(found) == len(brute_force(CONFIG, budget.max_params, 32))
    assert {shape.target.mlp_dim for shape in found} == {32}


@pytest.fixture(scope="module")
def teacher():
    params = testing.random_params(CONFIG)
    batches = [testing.random_batch(CONFIG, 2, 12, seed) for seed in (0, 1)]
    return params, importance.collect(params, CONFIG, batches), batches


def test_the_winner_is_the_brute_force_argmin_of_kl(teacher, limit):
    params, scores, batches = teacher
    space = dataclasses.replace(SPACE, minimum={"heads": 1, "kv_heads": 1})
    budget = shapes.Budget(max_params=limit)
    result = search.run(params, CONFIG, scores, batches, budget=budget, space=space, candidates=1000)
    expected = {}
    for layers, dim, mlp, heads, kv in brute_force(CONFIG, limit, attention=False):
        target = Target(layers, dim, mlp, heads, kv)
        student, config, _ = prune.apply(params, CONFIG, scores, target)
        expected[target] = verify.verify(params, CONFIG, student, config, batches)
    assert len(result.rows) == len(expected) == result.shapes > 3
    for row in result.rows:
        report = expected[Target(**row.sizes)]
        assert row.kl == pytest.approx(report.kl_dense_to_moe, rel=1e-4)  # float32 sums in another order
        assert row.loss == pytest.approx(report.valid_loss_moe, rel=1e-5)
    best = min(expected, key=lambda target: expected[target].kl_dense_to_moe)
    assert Target(**result.best.sizes) == best
    front = result.pareto
    assert front[-1] == result.best
    for row in result.rows:
        assert any(other.params <= row.params and other.kl <= row.kl for other in front)
    assert all(a.params < b.params and a.kl > b.kl for a, b in itertools.pairwise(front))


def test_what_is_known_is_not_measured_again_and_distillation_decides(teacher, limit):
    params, scores, batches = teacher
    arguments = {"budget": shapes.Budget(max_params=limit), "space": SPACE, "candidates": 5, "distil_top": 3}
    seen, losses = [], iter([3.0, 1.0, 2.0])
    first = search.run(
        params, CONFIG, scores, batches, **arguments, distil=lambda *pruned: next(losses), on_row=seen.append
    )
    assert len(seen) == 5 + 3
    assert first.best.distilled_loss == 1.0
    assert first.best.kl == sorted(row.kl for row in first.rows)[1]
    rows = [search.Row(**json.loads(json.dumps(row.to_dict()))) for row in seen]
    again, distilled = [], rows[5]
    others = [row for row in rows[:5] if row.name != distilled.name]
    known = [*others[:3], distilled]  # killed with one measurement missing, and one distillation that was saved
    losses = iter([1.0, 2.0])
    second = search.run(
        params, CONFIG, scores, batches, **arguments, distil=lambda *pruned: next(losses), on_row=again.append,
        known=known,
    )  # fmt: skip
    assert [row.name for row in again] == [others[3].name, rows[6].name, rows[7].name]
    assert list(second.rows) == list(first.rows)


def test_candidates_are_spread_over_depths_and_widths_and_keep_most_of_each():
    config = testing.dense_config(layers=12, model_dim=256, mlp_dim=1024, heads=8, kv_heads=4, head_dim=32)
    budget = shapes.Budget(max_params=int(models.count(config) * 0.6))
    found = shapes.enumerate_shapes(config, made_scores(config), budget, shapes.Space())
    chosen = shapes.spread(found, 12)
    depths = {shape.target.layers for shape in found}
    assert {shape.target.layers for shape in chosen} == depths
    assert len({shape.target.model_dim for shape in chosen}) > 2
    for depth in depths:
        first = next(shape for shape in chosen if shape.target.layers == depth)
        assert first.kept == max(shape.kept for shape in found if shape.target.layers == depth)
    largest = sorted(found, key=lambda shape: -shape.cost.params)[:12]
    assert len({shape.target.layers for shape in largest}) < len(depths)  # what taking the largest would see


def test_what_a_shape_keeps_is_shares_of_influence_and_of_squared_scores():
    scores = made_scores(CONFIG)
    share = retained.kept_share(CONFIG, scores, protect_ends=False, layer_scores="influence")

    def of(values, kept):
        return np.log(values[kept].sum() / values.sum())

    def most(values, count):
        return np.sort(np.square(values), axis=-1)[..., ::-1], np.s_[..., :count]

    whole = Target().resolve(CONFIG)
    expected = {
        "layers": (2, of(scores.layers_L, np.argsort(scores.layers_L)[1:])),
        "model_dim": (16, of(*most(scores.channels_D, 16))),
        "mlp_dim": (16, of(*most(scores.neurons_LF, 16))),
        "heads": (2, of(*most(scores.heads_LH.reshape(3, 2, 2), 1))),  # one in each of the two groups
    }
    for field, (size, value) in expected.items():
        assert share(dataclasses.replace(whole, **{field: size})) == pytest.approx(value, rel=1e-12), field
    together = dataclasses.replace(whole, **{field: size for field, (size, _) in expected.items()})
    assert share(together) == pytest.approx(sum(value for _, value in expected.values()), rel=1e-12)


def test_options_of_pruning_hold_in_the_search(teacher):
    """In the shapes that are looked at, in what is measured, and in what is handed on to be distilled."""
    params, scores, batches = teacher
    budget, space = shapes.Budget(max_params=int(models.count(CONFIG) * 0.9)), shapes.Space(least=0.3)
    options = {"norm_correction": False, "protect_ends": False, "head_merge": True}

    def looked_at(**options):
        rows, _ = search.table(CONFIG, scores, budget, space, 10**6, options)
        return {(row.sizes["layers"], row.sizes["heads"] // row.sizes["kv_heads"]) for row in rows}

    assert {layers for layers, _ in looked_at()} == {2, 3}
    assert {layers for layers, _ in looked_at(protect_ends=False)} == {1, 2, 3}
    assert {heads for _, heads in looked_at(head_merge=True)} == {1, 2}
    given, channels = [], dict.fromkeys(("layers", "mlp_dim", "heads", "kv_heads"), 1)  # which alone may be cut
    result = search.run(
        params, CONFIG, scores, batches, budget=budget, space=dataclasses.replace(SPACE, minimum=channels), candidates=1,
        options=options, distil=lambda *pruned: given.append(pruned) or 1.0, distil_top=1,
    )  # fmt: skip
    ((student, config, record),) = given
    assert {name: record[name] for name in options} == options
    expected, _, _ = prune.apply(params, CONFIG, scores, Target(**result.best.sizes), **options)
    jax.tree.map(np.testing.assert_array_equal, student, expected)
    same = Teacher(params, CONFIG, batches).distance(expected, config)
    assert result.best.kl == pytest.approx(same.kl, rel=1e-6)
    corrected, _, _ = prune.apply(params, CONFIG, scores, Target(**result.best.sizes))
    assert abs(Teacher(params, CONFIG, batches).distance(corrected, config).kl - same.kl) > 1e-3


def test_elsewhere_than_on_cpu_candidates_are_cut_on_the_device(teacher, monkeypatch):
    params, scores, _ = teacher
    record = prune.plan(CONFIG, scores, Target(layers=2, model_dim=16, mlp_dim=16, heads=2))
    here, config, _ = search._pruned(params, CONFIG, record)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    there, same, _ = search._pruned(params, CONFIG, record)
    assert config == same
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        assert isinstance(a, np.ndarray)
        assert isinstance(b, jax.Array)
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_mixtures_are_searched_along_their_own_axes():
    config = testing.moe_config(experts=ExpertsConfig(6, 2, 16, shared_mlp_dim=8))
    made = made_scores(config.replace(experts=None), neurons_LF=None)
    rng = np.random.default_rng(0)
    scores = dataclasses.replace(
        made, experts_LE=rng.uniform(size=(3, 6)), expert_neurons_LEF=rng.uniform(size=(3, 6, 16))
    )
    space = shapes.Space(multiples={"expert_dim": 4, "model_dim": 32}, minimum={"experts": 0.1, "layers": 1})
    active = int(models.count_active(config) * 0.8)
    found = shapes.enumerate_shapes(config, scores, shapes.Budget(max_active_params=active), space)
    assert {shape.target.experts for shape in found} == {2, 3, 4, 5, 6}
    assert {shape.target.expert_dim for shape in found} <= {8, 12, 16}
    assert {shape.target.shared_dim for shape in found} == {8}  # no scores of the shared expert: left alone
    every = len(found) // 8  # a count traces the model, which takes a moment
    assert all(models.count_active(shape.target.apply(config)) <= active for shape in found[::every])


@pytest.mark.parametrize(
    ("budget", "space", "words"),
    [
        ({}, {}, r"prune\.search\.max_params: there is no budget"),
        ({"max_params": 10}, {}, r"prune\.search: no shape of the \d+ .*least params of any is"),
        ({"max_params": 10**9}, {}, r"prune\.search: the model is inside the budget"),
        ({"max_latency": 1.0}, {}, r"prune\.search\.chip: a latency needs a chip"),
        ({"max_latency": 1.0, "chip": "tpu"}, {}, r"prune\.search\.chip: no chip 'tpu'"),
        ({"max_params": 10**4}, {"granularity": 7}, r"prune\.search\.granularity: no size of mlp_dim"),
        ({"max_params": 10**4}, {"minimum": {"width": 0.5}}, r"prune\.search\.minimum\.width: no such size"),
        ({"max_params": 10**4}, {"minimum": {"layers": 1.5}}, r"prune\.search\.minimum\.layers: 1\.5"),
        ({"max_params": 10**4}, {"multiples": {"layers": 0}}, r"prune\.search\.multiples\.layers: 0"),
    ],
)
def test_budgets_and_rules_that_cannot_be_are_named(budget, space, words):
    with pytest.raises(UserError, match=words):
        shapes.enumerate_shapes(CONFIG, made_scores(CONFIG), shapes.Budget(**budget), shapes.Space(**space))


def test_the_teacher_is_kept_or_run_again_with_the_same_result(teacher):
    params, scores, batches = teacher
    student, config, _ = prune.apply(params, CONFIG, scores, Target(mlp_dim=16))
    kept = Teacher(params, CONFIG, batches)
    anew = Teacher(params, CONFIG, batches, cache_elements=0, logit_elements=200)
    one, other = kept.distance(student, config), anew.distance(student, config)
    assert one.kl == pytest.approx(other.kl, rel=1e-5)  # float32 sums in slices of another width
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert kept.distance(params, CONFIG).kl == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UserError, match="no 'targets'"):
        Teacher(params, CONFIG, [{name: x for name, x in batches[0].items() if name != "targets"}])
