"""What an engine holds and how fast it can be at most, against closed forms."""

import types

import jax
import pytest

from configs import kwaicoder_23b_a4b
from experiments import compile_generate
from experiments.contract import Section
from kwaicoder_jax import hardware, models
from kwaicoder_jax.errors import UserError

TINY = {
    "model.layers": 1, "model.model_dim": 64, "model.mlp_dim": 128, "model.heads": 4, "model.kv_heads": 2,
    "model.head_dim": 16, "model.vocab_size": 96, "prune.target.layers": 1, "prune.target.model_dim": 32,
    "prune.target.mlp_dim": 64, "upcycle.granularity": 4, "upcycle.replicas": 2,
}  # fmt: skip
ROWS, SLOTS, PROMPT = 4, 128, 64


@pytest.fixture(scope="module")
def engine():
    config = kwaicoder_23b_a4b.get_config()
    config.update_from_flattened_dict(TINY)
    context = types.SimpleNamespace(config=Section(config.to_dict() | {"generate": {"max_rows": 3}}))
    machine = hardware.Topology("cpu:1", hardware.chip("v5e"), jax.devices()[:1], (1,), (False,))
    return compile_generate.make(context, machine, None, 100, 50)


def report(**values):
    given = {
        "hbm_bytes": 1000, "capacity": 16e9, "hbm_bandwidth": 1e9, "model_flops": 0.0, "hidden_seconds": 0.0,
        "exposed_seconds": 0.0,
    }  # fmt: skip
    return types.SimpleNamespace(**given | values)


def test_sizes_and_caches(engine):
    assert (engine.load.rows, engine.load.slots, engine.load.prompt_slots) == (ROWS, SLOTS, PROMPT)
    row = 2 * 2 * 16 * 4 + 2 * 4  # a slot: keys and values of 2 heads in float32 (on CPU), its position and segment
    assert engine.rows_bytes == ROWS * SLOTS * row + 4
    assert engine.prefix_bytes == PROMPT * row + 4


def test_weights_that_have_to_be_read(engine):
    """2 bytes each; of 8 experts of 16 neurons, 4 a token, those that 4 tokens hit; the head and not the embedding."""
    attention, head, router = 32 * 16 * (4 + 2 + 2 + 4), 96 * 32, 32 * 8
    hit = 1 - 0.5**ROWS
    expected = 2 * (attention + head + hit * 8 * 3 * 32 * 16) + 4 * (router + 3 * 32)  # router and norms in float32
    assert engine.least_bytes["decode"] - engine.rows_bytes == pytest.approx(expected, rel=1e-12)


def test_a_bound_is_the_longest_of_arithmetic_and_memory_and_what_is_waited_for(engine):
    read = engine.least_bytes["decode"] / 1e9
    slow = report(model_flops=197e12 * 2.0, exposed_seconds=0.5)
    found = compile_generate.summary_of(engine, {"prefill": slow, "decode": report(exposed_seconds=0.25)})
    assert found["decode_tokens_per_second_bound"] == pytest.approx(ROWS / (read + 0.25))
    assert found["prefill_tokens_per_second_bound"] == pytest.approx(PROMPT / 2.5)


def test_what_an_engine_holds(engine):
    kept = 4 * engine.prefix_bytes
    small, large = report(hbm_bytes=10**6), report(hbm_bytes=10**7)
    held = {
        name: compile_generate.summary_of(engine, {"prefill": a, "decode": b})["engine_bytes_per_chip"]
        for name, a, b in (("prefill", large, small), ("decode", small, large))
    }
    assert held == {"prefill": 10**7 + engine.rows_bytes + kept, "decode": 10**7 + kept}
    full = {"prefill": small, "decode": report(hbm_bytes=10**6, capacity=(10**6 + kept) / 0.9 - 1)}
    assert not compile_generate.summary_of(engine, full)["fits"]


def test_model_flops(engine):
    config = kwaicoder_23b_a4b.get_config()
    config.update_from_flattened_dict(TINY)
    mixture = compile_generate.recipe_models.model_before(Section(config.to_dict()), "generate")
    assert engine.steps["decode"].model_flops == ROWS * models.decode_flops_per_token(mixture, SLOTS)


def test_a_field_that_there_is_not():
    context = types.SimpleNamespace(config=Section({"generate": {"row": 3}}))
    machine = hardware.Topology("cpu:1", hardware.chip("v5e"), jax.devices()[:1], (1,), (False,))
    with pytest.raises(UserError, match=r"^generate\.row: no such field"):
        compile_generate.make(context, machine, None, 100, 50)
