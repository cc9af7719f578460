"""What sizes are chosen, by hand."""

import pytest

from kwaicoder_jax.inference.requests import Generation, Request, Token
from kwaicoder_jax.inference.sizes import PATIENCE, Sizes, bucket


def generation(prompt, new, drawn=0):
    return Generation(Request((0,) * prompt, new), [Token(0)] * drawn)


def test_buckets_are_few():
    assert [bucket(n, 32) for n in (1, 31, 32, 33, 64, 65, 1000)] == [32, 32, 32, 64, 64, 128, 1024]
    assert [bucket(n) for n in (1, 2, 3, 5)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("max_rows", "shares", "expected"), [(1, 1, 1), (3, 1, 4), (8, 1, 8), (8, 6, 12), (5, 4, 8), (1, 4, 4)]
)
def test_most_rows_are_a_power_of_two_for_each_share(max_rows, shares, expected):
    assert Sizes(max_rows, 100, 128, False, shares).max_rows == expected


def test_grows_ahead_of_the_longest_and_not_beyond_its_end():
    sizes = Sizes(8, 1024, 128, False, 1)
    assert sizes.fitting([generation(10, 20)], 0, 0, 0) == (1, 128)
    assert sizes.fitting([generation(100, 28)], 0, 0, 0) == (1, 128)
    assert sizes.fitting([generation(100, 29)], 0, 0, 0) == (1, 256)
    assert sizes.fitting([generation(100, 900)], 4, 0, 0) == (8, 256)
    assert sizes.fitting([generation(100, 900, drawn=400)], 70, 0, 0) == (8, 1024)
    one = generation(100, 900, drawn=27)
    assert sizes.fitting([one], 0, 1, 128) == (1, 128)
    one.add(Token(0))
    assert sizes.fitting([one], 0, 1, 128) == (1, 256), "128 tokens and one to come"


def test_a_row_more_than_there_are():
    sizes = Sizes(8, 1024, 128, False, 1)
    assert sizes.fitting([generation(10, 20)] * 2, 0, 1, 512) == (2, 512), "slots do not shrink while rows grow"


def test_fixed_rows():
    sizes = Sizes(6, 1024, 128, True, 1)
    assert sizes.fitting([generation(10, 20)], 0, 0, 0) == (8, 128)
    assert {sizes.fitting([generation(10, 20)], 0, 8, 128) for _ in range(3 * PATIENCE)} == {(8, 128)}


def test_shrinks_when_half_would_have_done_for_long():
    sizes, members = Sizes(8, 1024, 128, False, 1), [generation(10, 500), generation(10, 20)]
    seen = [sizes.fitting(members, 0, 8, 1024) for _ in range(PATIENCE + 1)]
    assert seen == [(8, 1024)] * (PATIENCE - 1) + [(2, 256), (8, 1024)]
    sizes.fitting(members, 6, 8, 256)  # for once all are needed
    assert sizes.fitting(members, 0, 8, 256) == (8, 256)


def test_rows_shared_by_devices_come_in_multiples():
    sizes = Sizes(16, 128, 128, False, 3)
    rows = [sizes.fitting([generation(10, 20)] * count, 0, 0, 0)[0] for count in (1, 3, 4, 7, 13, 24)]
    assert rows == [3, 3, 6, 12, 24, 24]
