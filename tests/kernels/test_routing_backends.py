"""Every back end of routing against numpy, to the bit; the TPU kernels interpreted, and compiled for three chips."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from kernels import routing
from kernels.routing import Backend, reference, tpu, tpu_kernels, xla
from kwaicoder_jax.hardware import schedule
from kwaicoder_jax.hardware.schedule.compilation import compile_text, lower
from kwaicoder_jax.hardware.schedule.prediction import kernel_of

STRICT = {"detect_races": True, "uninitialized_memory": "nan", "out_of_bounds_reads": "raise"}
BACKENDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "xla": (xla, {}), "reference": (reference, {}), "tpu": (tpu, {"interpret": pltpu.InterpretParams(**STRICT)}),
}  # fmt: skip
every_backend = pytest.mark.parametrize("name", BACKENDS)
SPECIAL = np.array(
    [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800000, 0x7F800000, 0x80000000, 0, 1, 0x80000001, 0xFFFFFFFF], np.uint32
).view(np.float32)  # NaNs of both signs, infinities, zeros, the smallest numbers, and the last one in the order


@functools.cache
def jitted(name, function, **options):
    module, interpret = BACKENDS[name]
    return jax.jit(functools.partial(getattr(module, function), **options, **interpret))


def best(scores, choices):
    """A stable sort by falling score, in the total order of IEEE 754 (section 5.10): of sign and magnitude."""
    bits = scores.view(np.uint32).astype(np.int64)
    magnitude = bits & 0x7FFFFFFF
    order = np.where(bits >> 31, -magnitude - 1, magnitude)
    return np.argsort(-order, axis=1, kind="stable")[:, :choices]


def check_top(name, scores, choices):
    score, expert = jitted(name, "top_experts", choices=choices)(scores)
    wanted = best(scores, choices)
    assert expert.dtype == jnp.int32
    np.testing.assert_array_equal(expert, wanted)
    got, had = np.asarray(score), np.take_along_axis(scores, wanted, 1)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(had))
    np.testing.assert_array_equal(got[~np.isnan(had)].view(np.int32), had[~np.isnan(had)].view(np.int32))  # signs of 0


def check_sort(name, chosen, experts):
    slot_R, row_MX, sizes_E = jitted(name, "sort_by_expert", experts=experts)(chosen)
    flat = chosen.reshape(-1)
    wanted = np.argsort(flat, kind="stable")
    assert slot_R.dtype == row_MX.dtype == sizes_E.dtype == jnp.int32
    np.testing.assert_array_equal(slot_R, wanted)
    np.testing.assert_array_equal(np.asarray(row_MX).reshape(-1)[wanted], np.arange(flat.size))
    np.testing.assert_array_equal(sizes_E, np.bincount(flat, minlength=experts + 1)[:experts])


def check(name, scores, choices):
    check_top(name, scores, choices)
    check_sort(name, best(scores, choices).astype(np.int32), scores.shape[1])
    assert not (name == "tpu" and interpret_pallas_call.races.races_found)


def drawn(seed, tokens, experts, steps=4):
    """Few different values, many ties, and numbers that are none."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(tokens, experts)) * steps).astype(np.float32) / steps
    return np.where(rng.random(scores.shape) < 0.2, rng.choice(SPECIAL, scores.shape), scores)


@every_backend
@pytest.mark.parametrize(
    ("tokens", "experts", "choices"),
    [(130, 1, 1), (7, 2, 2), (300, 8, 3), (1100, 64, 8), (300, 20, 10)],
)
def test_against_numpy(name, tokens, experts, choices):
    check(name, drawn(0, tokens, experts), choices)


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize(
    ("tokens", "experts", "choices"), [(256, 128, 4), (1030, 256, 8), (1030, 512, 10), (2100, 20, 17), (9000, 64, 8)]
)
def test_wide_and_long(name, tokens, experts, choices):
    check(name, drawn(0, tokens, experts), choices)


@every_backend
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.sampled_from([0.5, 1, 8]))
def test_many_ties(name, seed, steps):
    check(name, drawn(seed, 260, 8, steps), 3)


@every_backend
def test_tokens_without_a_score(name):
    """Experts that a limit of groups excludes, all equal, or all NaN: the lowest indices, all different."""
    for value in (-np.inf, 0.0, np.nan, *SPECIAL[-1:]):
        check(name, np.full((260, 8), value, np.float32), 3)
    limited = np.full((260, 8), -np.inf, np.float32)
    limited[:, 4:6] = 1.0, 2.0
    assert np.asarray(jitted(name, "top_experts", choices=3)(limited)[1])[0].tolist() == [5, 4, 0]


@every_backend
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["any", "one", "elsewhere", "few"]))
def test_sort_of_any_experts(name, seed, kind):
    """Uneven loads; experts on other devices (8), and choices that a token makes twice."""
    rng = np.random.default_rng(seed)
    experts = {"any": range(9), "one": [rng.integers(9)], "elsewhere": [8, 8, 8, 3], "few": [1, 7]}[kind]
    check_sort(name, rng.choice(experts, (260, 3)).astype(np.int32), 8)


@every_backend
def test_no_tokens(name):
    score, expert = jitted(name, "top_experts", choices=2)(jnp.zeros((0, 8)))
    assert score.shape == expert.shape == (0, 2)
    check_sort(name, np.zeros((0, 2), np.int32), 8)


def test_two_cores_share_the_blocks():
    both = pltpu.InterpretParams(**STRICT, num_cores_or_threads=2)
    scores = drawn(1, 2100, 10)
    _, expert = jax.jit(functools.partial(tpu.top_experts, choices=2, interpret=both))(scores)
    np.testing.assert_array_equal(expert, best(scores, 2))
    slot_R, _, _ = jax.jit(functools.partial(tpu.sort_by_expert, experts=10, interpret=both))(expert)
    np.testing.assert_array_equal(slot_R, np.argsort(np.asarray(expert).reshape(-1), kind="stable"))
    assert not interpret_pallas_call.races.races_found


def test_sorts_of_more_rows_than_packed_keys_have_numbers_for():
    """The other branch gives the same, seen with few rows: (E + 1) * R passes 2^31 only with a million tokens."""
    chosen = np.random.default_rng(0).integers(0, 9, (260, 3)).astype(np.int32)
    row = np.asarray(jitted("tpu", "sort_by_expert", experts=8)(chosen)[1])
    slot = jax.lax.sort((jnp.asarray(row.T.reshape(-1)), jnp.arange(780).reshape(260, 3).T.reshape(-1)), num_keys=1)[1]
    np.testing.assert_array_equal(slot, np.argsort(chosen.reshape(-1), kind="stable"))
    many = jax.eval_shape(
        functools.partial(tpu.sort_by_expert, experts=255), jax.ShapeDtypeStruct((2**20, 8), np.int32)
    )
    assert [each.shape for each in many] == [(2**23,), (2**20, 8), (255,)]


@every_backend
def test_gradients_go_where_the_scores_came_from(name):
    scores, choices = drawn(3, 260, 8), 3
    scores = np.where(np.abs(scores) < 1e-30, np.float32(0), scores)  # sums may flush the smallest numbers to zero
    expert = best(scores, choices).astype(np.int32)
    pull = np.random.default_rng(0).normal(size=expert.shape).astype(np.float32)
    wanted = np.zeros_like(scores)
    np.put_along_axis(wanted, expert, pull, 1)
    module = BACKENDS[name][0]
    np.testing.assert_array_equal(module.spread(jnp.asarray(pull), expert, 8), wanted)
    taken = np.asarray(module.take(jnp.asarray(scores), expert))
    np.testing.assert_array_equal(taken, np.take_along_axis(scores, expert, 1))  # NaN of another expert stays there
    if name == "tpu":
        return
    got = jax.grad(lambda x: jnp.sum(routing.top_experts(x, choices, backend=name)[0] * pull))(jnp.asarray(scores))
    np.testing.assert_array_equal(got, wanted)
    got = jax.grad(lambda x: jnp.sum(routing.take_experts(x, jnp.asarray(expert), backend=name) * pull))(scores)
    np.testing.assert_array_equal(got, wanted)


def test_the_enum_takes_the_kernels_with_remat_and_their_names():
    def loss(scores):
        score, expert = routing.top_experts(scores, 2)
        order = routing.sort_by_expert(expert, 8)
        return jnp.sum(score * order.row_MX)

    kept = jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(routing.ORDER))
    traced = jax.jit(jax.grad(kept)).trace(jax.ShapeDtypeStruct((260, 8), jnp.float32))
    text = traced.lower(lowering_platforms=("tpu",)).as_text(debug_info=True)
    assert text.count(f'kernel_name = "{tpu_kernels.PLACES}"') == 1  # what carries the name is not made twice
    assert tpu_kernels.TOP in text
    assert "stablehlo.scatter" not in text
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert tpu_kernels.TOP not in on_cpu


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"need float32 scores \[M, E\] and 1 to E choices; got bfloat16 \(4, 8\)"):
        routing.top_experts(jnp.zeros((4, 8), jnp.bfloat16), 2)
    with pytest.raises(ValueError, match=r"got float32 \(4, 8\) and 9 choices"):
        routing.top_experts(jnp.zeros((4, 8)), 9)
    with pytest.raises(ValueError, match="2 of 2000 experts: the kernels take up to 1024 experts and 32 choices"):
        routing.top_experts(jnp.zeros((4, 2000)), 2, backend=Backend.TPU)
    assert routing.top_experts(jnp.zeros((4, 2000)), 2)[1].tolist() == [[0, 1]] * 4


def compiled(chip, tokens, experts, choices):
    scores = jax.ShapeDtypeStruct((tokens, experts), jnp.float32)
    function = functools.partial(by_kernels, choices=choices)
    kernels = schedule.compile_kernels(function, [scores], chip=chip, kernel="routing_")
    return {each.name.split(".")[0]: each.predict() for each in kernels}


# Microseconds of the two kernels, predicted, and cores.
PREDICTED = {
    ("v5e", 4096, 64, 8): (5.8, 5.1, 1), ("v6e", 4096, 64, 8): (5.3, 4.6, 1), ("v5p", 16_384, 256, 8): (17.3, 23.3, 2),
}  # fmt: skip
SLOWER = {
    ("v5e", 16_384, 256, 8): (54, 50, 1),
    ("v6e", 16_384, 256, 8): (46, 41, 1),
    ("v5p", 4096, 64, 8): (3.2, 2.8, 2),
}


@pytest.mark.parametrize(
    "shape", [*PREDICTED, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOWER)], ids=str
)
def test_compiled_for(shape):
    found, (top, places, cores) = compiled(*shape), (PREDICTED | SLOWER)[shape]
    print(*shape, found)
    assert found[tpu_kernels.TOP].seconds < 1.1e-6 * top
    assert found[tpu_kernels.PLACES].seconds < 1.1e-6 * places
    assert found[tpu_kernels.TOP].cores_used == found[tpu_kernels.PLACES].cores_used == cores


def by_kernels(scores, choices):
    score, expert = routing.top_experts(scores, choices, backend="tpu")
    return score, expert, routing.sort_by_expert(expert, scores.shape[1], backend="tpu")


def by_xla(scores, choices):
    """What the model did before: top_k, a sort of packed keys, a scatter, a sum over comparisons."""
    score, expert = jax.lax.top_k(scores, choices)
    flat, slots = expert.reshape(-1), jnp.arange(expert.size, dtype=jnp.int32)
    slot_R = jax.lax.sort(flat * flat.size + slots, is_stable=False) % flat.size
    row_R = jnp.zeros_like(slots).at[slot_R].set(slots, unique_indices=True, mode="promise_in_bounds")
    sizes_E = jnp.sum(flat[:, None] == jnp.arange(scores.shape[1])[None], axis=0, dtype=jnp.int32)
    return score, expert, slot_R, row_R.reshape(expert.shape), sizes_E


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v5p"])
@pytest.mark.parametrize("shape", [(4096, 64), (16_384, 64), (16_384, 256)], ids=str)
def test_against_xla(chip, shape):
    """All that XLA compiles is read in the way that kernels are, one operation after the other."""
    cores = schedule.tensor_cores(chip)
    took = {}
    for function in (by_kernels, by_xla):
        text = lower(functools.partial(function, choices=8), [jax.ShapeDtypeStruct(shape, jnp.float32)], cores)
        dumps = compile_text(text, cores)
        found = {name: kernel_of(dump, cores).predict() for name, dump in dumps.items() if name != "TLP"}
        took[function] = sum(each.seconds for each in found.values())
        moved = sum(each.hbm_bytes for each in found.values()) / 1e6
        longest = sorted(((round(1e6 * each.seconds, 1), name) for name, each in found.items()), reverse=True)[:4]
        print(chip, shape, function.__name__, f"{1e6 * took[function]:.0f} us, {moved:.1f} MB in HBM", longest)
    assert took[by_kernels] < 0.25 * took[by_xla]
