"""Generation against a float64 model that has no cache, and what must not change it."""

import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference import generate
from kwaicoder_jax.testing.reference import document_logits
from tests.kwaicoder_jax.inference.greedy import answer, random_prompts

NEW = 6


@pytest.fixture(scope="module")
def model():
    config = testing.dense_config()
    return testing.random_params(config), config


@pytest.mark.parametrize("name", ["odd", "moe_topk_softmax"])
def test_greedy_equals_the_float64_model_without_a_cache(name):
    config = testing.small_configs()[name]
    params, prompts = testing.random_params(config), random_prompts(config, [1, 7, 12, 3])
    got = generate(params, config, prompts, max_new_tokens=NEW, batch_size=4)
    assert got == [answer(params, config, prompt, NEW) for prompt in prompts]


def test_alone_in_a_batch_and_in_any_order(model):
    params, config = model
    prompts = random_prompts(config, [5, 31, 2, 32, 9, 40, 33])  # two buckets, a batch that is not full
    together = generate(params, config, prompts, max_new_tokens=NEW, batch_size=4)
    assert together == [answer(params, config, prompt, NEW) for prompt in prompts]
    alone = [prompt for prompt in prompts if len(prompt) <= 32]
    expected = [tokens for prompt, tokens in zip(prompts, together) if len(prompt) <= 32]
    assert expected == [generate(params, config, [prompt], max_new_tokens=NEW)[0] for prompt in alone]
    assert together[::-1] == generate(params, config, prompts[::-1], max_new_tokens=NEW, batch_size=4)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_samples_depend_on_seed_id_and_position_only(model, top_p):
    params, config = model
    settings = {"max_new_tokens": NEW, "temperature": 1.0, "top_p": top_p}
    prompts = random_prompts(config, [5]) * 4 + random_prompts(config, [2, 9], seed=1)
    samples = generate(params, config, prompts, batch_size=4, seed=3, **settings)
    assert len({tuple(s) for s in samples[:4]}) == 4, "samples of one prompt must differ"
    assert samples == generate(params, config, prompts, batch_size=4, seed=3, **settings)
    assert samples == generate(params, config, prompts, batch_size=8, seed=3, **settings)
    assert samples != generate(params, config, prompts, batch_size=4, seed=4, **settings)
    part = generate(params, config, prompts[4:1:-1], batch_size=4, seed=3, prompt_ids=[4, 3, 2], **settings)
    assert part == samples[4:1:-1]


def test_samples_follow_the_model_distribution(model):
    """Second tokens too: they are drawn through the cache, with another key."""
    params, config = model
    prompt, temperature, count = [3, 1, 4], 1.5, 4096
    samples = generate(params, config, [prompt] * count, max_new_tokens=2, temperature=temperature, batch_size=1024)

    def distribution(tokens):
        p = np.exp(document_logits(params, config, np.asarray(tokens))[-1] / temperature)
        return p / p.sum()

    first = distribution(prompt)
    second = sum(first[t] * distribution([*prompt, t]) for t in range(config.vocab_size))
    for position, expected in enumerate((first, second)):
        counts = np.bincount([s[position] for s in samples], minlength=config.vocab_size)
        assert (np.abs(counts - count * expected) <= 5 * np.sqrt(count * expected) + 3).all()


def test_stop_tokens_end_a_row_and_are_left_out(model):
    params, config = model
    prompts = random_prompts(config, [4, 6, 11])
    free = generate(params, config, prompts, max_new_tokens=NEW, batch_size=4)
    stops = (free[0][2], free[1][0])
    expected = [row[: min([row.index(s) for s in stops if s in row], default=NEW)] for row in free]
    assert expected[0] != free[0]
    assert expected[1] == []
    assert generate(params, config, prompts, max_new_tokens=NEW, batch_size=4, stop_tokens=stops) == expected


def test_generation_ends_when_every_row_has_stopped(model):
    """The loop must not run to its bound: a million tokens would not end before the test's time limit."""
    params, config = model
    everything = tuple(range(config.vocab_size))
    assert generate(params, config, [[1], [2, 3]], max_new_tokens=20_000, stop_tokens=everything) == [[], []]


def test_long_prompts_are_refused_or_cut_on_the_left(model):
    params, config = model
    prompt = random_prompts(config, [20])[0]
    with pytest.raises(UserError, match=r"prompts\[1\]: 20 tokens, the limit is 8; .*truncate=True"):
        generate(params, config, [[1], prompt], max_new_tokens=NEW, max_prompt_tokens=8)
    cut = generate(params, config, [prompt], max_new_tokens=NEW, max_prompt_tokens=8, truncate=True)
    assert cut == generate(params, config, [prompt[-8:]], max_new_tokens=NEW)


def test_progress_and_no_prompts(model):
    params, config = model
    seen = []
    prompts = random_prompts(config, [3, 4, 5, 6, 7])
    generate(params, config, prompts, max_new_tokens=NEW, batch_size=4, progress=lambda *done: seen.append(done))
    assert seen == [(4, 5), (5, 5)]
    assert generate(params, config, [], max_new_tokens=NEW) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "where"),
    [
        ([[1], []], {}, "prompts[1]"),
        ([[97]], {}, "prompts[0]"),
        ([[-1]], {}, "prompts[0]"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1]], {"batch_size": 0}, "batch_size"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
        ([[1], [2]], {"prompt_ids": [1]}, "prompt_ids"),
    ],
)
def test_errors_name_the_argument(model, prompts, settings, where):
    params, config = model
    with pytest.raises(UserError) as error:
        generate(params, config, prompts, **({"max_new_tokens": NEW} | settings))
    assert error.value.where == where
    assert error.value.remedy
