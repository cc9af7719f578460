"""What a request may ask for, and how it ends."""

import pytest

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference import Generation, Request, Token


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (1, 97)}, "prompt"),
        ({"prompt": (-1,)}, "prompt"),
        ({"prompt": (1,) * 97}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 100}, "prompt"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"seed": 2**31}, "seed"),
        ({"sample": -1}, "sample"),
        ({"logprobs": 6}, "logprobs"),
    ],
)
def test_what_cannot_be_served(changes, where):
    request = Request(**({"prompt": (1, 2, 3), "max_new_tokens": 5} | changes))
    with pytest.raises(UserError) as error:
        request.check(97, 100)
    assert error.value.where == where
    assert error.value.remedy


def test_the_largest_request():
    Request((96,) * 99, 1, 1e6, 2**31 - 1, 1.0, seed=-(2**31), sample=2**32 - 1, logprobs=5).check(97, 100)
    Request((0,), 99, top_p=1e-9).check(97, 100)


def drawn(request, *ids):
    generation = Generation(request)
    for id in ids:
        generation.add(Token(id))
    return generation


def test_ends():
    ended = []
    common = {"stop_tokens": frozenset({7}), "on_end": ended.append}
    length = drawn(Request((1, 2), 2, **common), 3, 4)
    stop = drawn(Request((1, 2), 2, **common), 3, 7)
    callback = drawn(Request((1, 2), 9, on_token=lambda token: token.id == 5, **common), 3, 5)
    running = drawn(Request((1, 2), 3, **common), 3, 4)
    assert [(g.reason, g.ids) for g in (length, stop, callback, running)] == [
        ("length", [3, 4]), ("stop", [3]), ("stop", [3, 5]), (None, [3, 4])
    ]  # fmt: skip
    assert ended == [length, stop, callback]
    assert (running.length, running.longest) == (4, 5)
