"""Continuous batching: whatever runs beside a request, it gets the tokens of the model that is run anew for each token."""

import dataclasses
import time

import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference import Engine, Request, engine, prepare, sizes
from kwaicoder_jax.testing.reference import document_logits
from tests.kwaicoder_jax.inference.greedy import answer, is_answer, random_prompts

CONFIG = testing.dense_config()
PARAMS = testing.random_params(CONFIG)
WEIGHTS = prepare(PARAMS, CONFIG)


def make(**changes):
    """Engines of few programs: four rows, as many slots as are needed."""
    return Engine(WEIGHTS, CONFIG, **({"max_rows": 4, "max_tokens": 128, "fixed_rows": True} | changes))


def submit(into, prompts, new=6, **settings):
    return [into.submit(Request(tuple(prompt), new, **settings)) for prompt in prompts]


def check(*generations):
    for generation in generations:
        assert is_answer(PARAMS, CONFIG, generation.request.prompt, generation.ids)


def counted(into, monkeypatch):
    """Replaces the programs of an engine by ones that note how often each is called."""
    calls = []

    def noted(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    programs = into._programs
    wrapped = {each.name: noted(each.name, getattr(programs, each.name)) for each in dataclasses.fields(programs)}
    monkeypatch.setattr(into, "_programs", dataclasses.replace(programs, **wrapped))
    return calls


@pytest.mark.parametrize("name", ["mistral", "qwen2", "deepseek_v3", "llama_dynamic"])
def test_families(name):
    """Windows of 5 and 7, biases, latent attention with two stacks; dynamic positions within their first length."""
    config = testing.family_configs()[name]
    params, new = testing.random_params(config), 6
    prompts = random_prompts(config, [4, 1] if name == "llama_dynamic" else [4, 12])
    served = Engine(prepare(params, config), config, max_rows=2, max_tokens=64, fixed_rows=True)
    generations = submit(served, prompts, new)
    served.run()
    assert [g.ids for g in generations] == [answer(params, config, prompt, new) for prompt in prompts]


def test_requests_that_come_and_go_at_random():
    """Around the ring several times; some are cancelled, in the queue or on the way."""
    rng, served = np.random.default_rng(0), make()
    lengths, news = rng.integers(1, 65, 80), rng.integers(1, 50, 80)
    generations, cancelled, steps = [], set(), 0
    left = list(zip(random_prompts(CONFIG, lengths), news.tolist()))
    while left or served.running or served.waiting:
        if left and rng.random() < 0.15:
            for _ in range(min(len(left), int(rng.integers(1, 5)))):
                prompt, new = left.pop()
                generations += submit(served, [prompt], new)
        if generations and rng.random() < 0.03:
            victim = generations[int(rng.integers(len(generations)))]
            victim.cancel()
            cancelled.add(id(victim))
        served.step()
        steps += 1
        assert len(served.running) <= 4
        assert served.slots in (0, 128)
    assert steps > 3 * 128
    check(*generations)
    ended = [g.reason for g in generations]
    assert ended.count("cancelled") >= 3
    assert len(generations) == 80
    for generation in generations:
        if generation.reason == "cancelled":
            assert id(generation) in cancelled
        else:
            assert generation.reason == "length"
            assert len(generation.ids) == generation.request.max_new_tokens


def test_prompts_of_about_one_length_are_run_together(monkeypatch):
    """Four and four of the first ten, and two alone; a shorter one does not go with a longer one."""
    served = make(max_rows=16)
    calls = counted(served, monkeypatch)
    prompts = random_prompts(CONFIG, [20, 3, 9, 31, 17, 8, 2, 12, 32, 1, 40, 5])
    generations = submit(served, prompts, 4)
    served.run()
    check(*generations)
    assert [calls.count(name) for name in ("prefill", "join", "decode")] == [6, 6, 3]
    calls.clear()
    generations = submit(served, [prompts[9], prompts[6], prompts[4], prompts[6], prompts[11]], 4)
    served.run()
    check(*generations)
    assert [calls.count(name) for name in ("prefill", "join", "decode")] == [2, 5, 3]  # two were kept, one twice needed


def test_prompts_that_were_run_together_are_kept_until_they_have_joined(monkeypatch):
    served = make(prefixes=0)
    calls = counted(served, monkeypatch)
    generations = submit(served, random_prompts(CONFIG, [20, 3, 9, 31]), 4)
    served.run()
    check(*generations)
    assert [calls.count(name) for name in ("prefill", "join")] == [1, 1]


def test_no_more_prompts_together_than_tokens_fit():
    sizing = make(max_tokens=4096)._sizes
    assert [sizing.prompts_together(32, n) for n in (0, 1, 3, 4, 15, 16, 99)] == [1, 1, 1, 4, 4, 16, 16]
    assert [sizing.prompts_together(slots, 99) for slots in (64, 128, 256, 512, 2048)] == [4, 4, 1, 1, 1]


def test_the_cache_grows_and_shrinks(monkeypatch):
    monkeypatch.setattr(sizes, "PATIENCE", 5)
    served, seen = make(max_tokens=512, fixed_rows=False, max_rows=2, ahead=8), []
    (short,) = submit(served, random_prompts(CONFIG, [3]), 60)
    served.step()
    (long,) = submit(served, random_prompts(CONFIG, [120]), 25)
    while served.step():
        seen.append((len(served._running), served.slots))
    assert list(dict.fromkeys(seen)) == [(1, 128), (2, 128), (2, 256), (1, 128)] or list(dict.fromkeys(seen)) == [
        (2, 128), (2, 256), (1, 128)
    ]  # fmt: skip
    check(short, long)
    assert (len(short.ids), len(long.ids)) == (60, 25)


def test_a_sample_is_the_same_alone_and_in_a_crowd():
    prompt, others = random_prompts(CONFIG, [7])[0], random_prompts(CONFIG, [3, 20, 9, 30, 5, 8], seed=1)
    settings = {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "seed": 5, "sample": 3}
    alone, crowd = make(), make()
    (expected,) = submit(alone, [prompt], 20, **settings)
    alone.run()
    submit(crowd, others[:3], 9, temperature=0.7, seed=9)
    crowd.step()
    (got,) = submit(crowd, [prompt], 20, **settings)
    for at, other in enumerate(others[3:]):
        submit(crowd, [other], 4 + at)
    crowd.run()
    assert got.ids == expected.ids
    different = (
        submit(crowd, [prompt] * 2, 20, **(settings | {"sample": 4})),
        submit(crowd, [prompt], 20, **(settings | {"seed": 6})),
    )
    crowd.run()
    (one, same), (other,) = different
    assert one.ids == same.ids
    assert len({tuple(g.ids) for g in (expected, one, other)}) == 3


def test_top_k_and_top_p_hold_in_every_step():
    """Of what was drawn, each token was allowed; and k = 1 is greedy at any temperature."""
    served, prompts = make(), random_prompts(CONFIG, [5, 11])
    three = submit(served, prompts * 4, 12, temperature=5.0, top_k=3)
    nucleus = submit(served, prompts * 4, 12, temperature=4.0, top_p=0.6)
    greedy = submit(served, prompts, 12, temperature=9.0, top_k=1)
    served.run()
    check(*greedy)
    ranks = []
    for generation in three + nucleus:
        logits = document_logits(PARAMS, CONFIG, np.array([*generation.request.prompt, *generation.ids]))[:-1]
        for row, token in zip(logits[-12:], generation.ids):
            rank, p = np.sum(row > row[token]), np.exp(row / generation.request.temperature)
            ranks.append(rank)
            if generation.request.top_k:
                assert rank < 3
            else:
                assert p[row > row[token]].sum() / p.sum() < 0.6 + 1e-5
    assert max(ranks) > 2
    assert len({tuple(g.ids) for g in three}) == 2, "the same seed and sample give the same draws"


def test_equal_prompts_are_run_once(monkeypatch):
    served = make(prefixes=2)
    calls, prompts = counted(served, monkeypatch), random_prompts(CONFIG, [9, 8, 7])
    generations = submit(served, [prompts[0]] * 6, 3)
    served.run()
    assert (calls.count("prefill"), calls.count("join")) == (1, 2), "four rows, then the two that are left"
    generations += submit(served, [prompts[1], prompts[0]], 3)
    served.run()
    assert calls.count("prefill") == 2, "the first prompt is still there"
    generations += submit(served, [prompts[2], prompts[0], prompts[1]], 3)
    served.run()
    assert calls.count("prefill") == 4, "the second was the older one when the third came"
    check(*generations)


def test_long_prompts_are_run_in_pieces_while_others_go_on(monkeypatch):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", 16)
    served = make()
    short, long = random_prompts(CONFIG, [5, 60])
    (first,) = submit(served, [short], 30)
    while not first.tokens:
        served.step()
    (second,) = submit(served, [long], 5)
    drawn = []
    while not second.tokens:
        drawn.append(len(first.ids))
        served.step()
    assert drawn == [2, 3, 4, 5], "a token for each quarter of 64"
    served.run()
    check(first, second)


def test_stops_callbacks_and_ends():
    served, prompt, events = make(), tuple(random_prompts(CONFIG, [6])[0]), []
    expected = answer(PARAMS, CONFIG, prompt, 6)
    place = next(at for at in range(1, 6) if expected[at] not in expected[:at])
    common = {"on_end": lambda g: events.append(g.reason)}
    stopped = served.submit(Request(prompt, 6, stop_tokens=frozenset({expected[place]}), **common))
    told = served.submit(Request(prompt, 6, on_token=lambda token: token.id == expected[place], **common))
    at_once = served.submit(Request(prompt, 6, stop_tokens=frozenset(range(CONFIG.vocab_size)), **common))
    one = served.submit(Request(prompt, 1, **common))
    served.run()
    assert [g.ids for g in (stopped, told, at_once, one)] == [expected[:place], expected[: place + 1], [], expected[:1]]
    assert [g.reason for g in (stopped, told, at_once, one)] == ["stop", "stop", "stop", "length"]
    assert sorted(events) == ["length", "stop", "stop", "stop"]
    assert not served.step()


def test_cancelled_before_and_on_the_way():
    served, prompts, ends = make(), random_prompts(CONFIG, [4] * 6), []
    generations = [served.submit(Request(tuple(p), 10, on_end=ends.append)) for p in prompts]
    generations[1].cancel()
    generations[5].cancel()
    served.step()
    assert [g.reason for g in generations] == [None, "cancelled", None, None, None, "cancelled"]
    generations[2].cancel()
    before = len(generations[2].ids)
    served.run()
    assert generations[2].reason == "cancelled"
    assert len(generations[2].ids) == before
    assert {id(g) for g in ends} == {id(g) for g in generations}
    assert len(ends) == 6
    check(*generations)
    generations[0].cancel()
    assert not served.step()
    assert generations[0].reason == "length"


def test_log_probabilities():
    """Of drawn tokens and of the most probable ones, before temperature, beside a row that wants none."""
    served, (prompt, other) = make(), random_prompts(CONFIG, [6, 6])
    (got,) = submit(served, [prompt], 5, temperature=3.0, logprobs=3)
    (none,) = submit(served, [prompt], 5, temperature=3.0, logprobs=0)
    (without,) = submit(served, [other], 5)
    served.run()
    logits = document_logits(PARAMS, CONFIG, np.array([*prompt, *got.ids]))[len(prompt) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, token, bare in zip(expected, got.tokens, none.tokens):
        assert token.logprob == pytest.approx(row[token.id], abs=1e-4)
        assert [id for id, _ in token.top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([p for _, p in token.top], np.sort(row)[::-1][:3], atol=1e-4)
        assert (bare.id, bare.logprob, bare.top) == (token.id, token.logprob, ())
    assert {(token.logprob, token.top) for token in without.tokens} == {(None, ())}


def test_the_longest_prompt_and_the_shortest():
    served = make()
    generations = submit(served, random_prompts(CONFIG, [127]), 1) + submit(served, random_prompts(CONFIG, [1]), 127)
    served.run()
    check(*generations)
    assert [len(g.ids) for g in generations] == [1, 127]
    with pytest.raises(UserError, match="row: 127 tokens and 2 new ones are more than 128"):
        served.submit(Request((1,) * 127, 2), where="row")
    assert served.waiting == 0


def test_thousands_in_the_queue():
    """No more rows than there may be; and to cancel them all takes no longer than to look at them once."""
    served = make()
    submit(served, [[at % CONFIG.vocab_size] for at in range(200)], 2)
    waiting = submit(served, [[1]] * 20_000, 2)
    for generation in waiting[:-1]:
        generation.cancel()
    start, steps = time.process_time(), 0
    while served.step():
        steps += 1
        assert len(served.running) <= 4
    assert time.process_time() - start < 20
    assert waiting[-1].reason == "length"
    assert {g.reason for g in waiting[:-1]} == {"cancelled"}
    assert steps == 51, "two tokens each: the first as a row is given, the second in the same step"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"max_rows": 0}, "max_rows"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"ahead": 0}, "ahead"),
        ({"prefixes": -1}, "prefixes"),
    ],
)
def test_sizes_that_cannot_be(changes, where):
    with pytest.raises(UserError) as error:
        make(**changes)
    assert error.value.where == where
