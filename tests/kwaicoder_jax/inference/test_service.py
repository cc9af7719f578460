"""The service around an engine: all or none, cancellation at any moment, failures that stay where they belong."""

import asyncio
import threading

import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.data import tokenizer as training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference import Answers, Engine, Full, Request, Service, TextStream, Unavailable, prepare

ROWS = 2


@pytest.fixture(scope="module")
def tokenizer():
    return training.train(["naïve '€' 日本"], 270)


@pytest.fixture(scope="module")
def make(tokenizer):
    config = testing.dense_config(vocab_size=tokenizer.vocab_size)
    weights = prepare(testing.random_params(config), config)
    return lambda: Engine(weights, config, max_rows=ROWS, max_tokens=100, fixed_rows=True)


def alone(make, request):
    engine = make()
    generation = engine.submit(request)
    engine.run()
    return generation


class Ends:
    """What becomes of some requests, to be waited for."""

    def __init__(self):
        self.ends, self.failures, self.changed = [], [], threading.Condition()

    def request(self, prompt=(5,), new=6, **settings):
        return Request(prompt, new, on_end=lambda generation: self._note(self.ends, generation), **settings)

    def fail(self, error):
        self._note(self.failures, error)

    def _note(self, notes, note):
        with self.changed:
            notes.append(note)
            self.changed.notify_all()

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.ends) + len(self.failures) >= count, 300)


def test_from_many_threads_as_alone(make):
    ends = Ends()
    with Service(make(), most=50) as service:

        def ask(number):
            for prompt in ((number + 1, 7), (number + 2,)):
                service.submit([ends.request(prompt, temperature=1.0, seed=number)], ends.fail)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        ends.wait(16)
        assert service.live == 0
    assert not ends.failures
    for generation in ends.ends[::5]:
        assert (
            generation.ids
            == alone(make, Request(generation.request.prompt, 6, temperature=1.0, seed=generation.request.seed)).ids
        )


def test_all_or_none(make):
    ends, held = Ends(), threading.Event()
    with Service(make(), most=3) as service:
        service.submit([Request((1,), 50, on_token=lambda token: held.wait(300) and None)] * 2, ends.fail)
        with pytest.raises(Full, match="2 requests are running or waiting"):
            service.submit([ends.request()] * 2, ends.fail)
        with pytest.raises(UserError, match=r"^n: 4 answers at once, at most 3 are possible"):
            service.submit([ends.request()] * 4, ends.fail)
        with pytest.raises(UserError, match=r"^temperature"):
            service.submit([ends.request(temperature=-1.0)], ends.fail)
        assert service.live == 2
        service.submit([ends.request()], ends.fail)
        held.set()
        ends.wait(1)
    assert [generation.reason for generation in ends.ends] == ["length"]


def test_cancelled_before_it_began_and_after(make):
    ends, held = Ends(), threading.Event()
    with Service(make(), most=9) as service:
        service.submit([Request((1,), 2, on_token=lambda token: held.wait(300) and None)], ends.fail)
        tickets = service.submit([ends.request(new=60)] * 4, ends.fail)
        for ticket in tickets[1:]:
            ticket.cancel()
        held.set()
        ends.wait(3)
        tickets[0].cancel()
        ends.wait(4)
        assert [generation.reason for generation in ends.ends] == ["cancelled"] * 4
        assert not ends.failures
        assert service.live == 0


def test_a_callback_that_fails_ends_its_own_request(make):
    ends = Ends()

    def broken(_):
        raise KeyError("x")

    with Service(make(), most=9) as service:
        service.submit([Request((3,), 6, on_token=broken), Request((3,), 6, on_end=broken), ends.request()], ends.fail)
        ends.wait(3)
        assert service.error is None
        assert service.live == 0
    assert [type(error) for error in ends.failures] == [KeyError, KeyError]
    assert ends.ends[0].ids == alone(make, Request((5,), 6)).ids


def test_a_step_that_fails_is_told_to_everyone(make):
    engine, ends, told = make(), Ends(), []

    def failing():
        raise RuntimeError("out of memory")

    engine.step = failing
    with Service(engine, most=9, on_error=told.append) as service:
        service.submit([ends.request()] * 3, ends.fail)
        ends.wait(3)
        assert [str(error) for error in (service.error, *told, *ends.failures)] == ["out of memory"] * 5
        with pytest.raises(Unavailable, match="failed"):
            service.submit([ends.request()], ends.fail)
        assert service.live == 0


def test_closing_cancels(make):
    ends = Ends()
    service = Service(make(), most=9)
    service.start()
    service.submit([ends.request(new=90)] * 4, ends.fail)
    assert service.close(60)
    assert len(ends.ends) == 4
    with pytest.raises(Unavailable, match="closed"):
        service.submit([ends.request()], ends.fail)


@pytest.mark.parametrize("stops", [(), ("'", "zz"), ("a",)])
def test_answers_are_the_text_in_pieces(make, tokenizer, stops):
    requests = [Request((seed + 6,), 40, temperature=1.5, seed=seed) for seed in range(3)]

    async def collect(service):
        return [piece async for piece in Answers(service, tokenizer, requests, stops)]

    with Service(make(), most=9) as service:
        pieces = asyncio.run(collect(service))
    for index, request in enumerate(requests):
        generation, stream = alone(make, request), TextStream(tokenizer, stops)
        text, drawn = "", 0
        for token in generation.tokens:
            drawn += 1
            text += stream.push(token.id)
            if stream.stopped:
                break
        text += stream.finish()
        mine = [piece for piece in pieces if piece.index == index]
        assert "".join(piece.text for piece in mine) == text
        assert [piece.reason for piece in mine] == [None] * (len(mine) - 1) + ["stop" if stream.stopped else "length"]
        assert mine[-1].drawn == drawn
        tokens = [each for piece in mine for each in piece.tokens]
        assert [token.id for token, _ in tokens] == generation.ids[: len(tokens)]
        assert all(start < len(text) for _, start in tokens) if stream.stopped else len(tokens) == drawn


def test_answers_of_a_closed_service_say_so(make, tokenizer):
    async def collect(service):
        answers = Answers(service, tokenizer, [Request((6,), 90)])
        service.cancel_all()
        return [piece async for piece in answers]

    with Service(make(), most=9) as service, pytest.raises(Unavailable, match="closed"):
        asyncio.run(collect(service))
