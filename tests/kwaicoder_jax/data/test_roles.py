"""Roles of tokens against splits that were assembled, and rows that are shown whole."""

import numpy as np
import pytest

from kwaicoder_jax import data
from kwaicoder_jax.data import fill_in_the_middle as fim
from kwaicoder_jax.data.roles import Role, roles, segments


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_parts_of_a_split(corpus, order):
    tokenizer = corpus.tokenizer
    split = fim.Split("def f(x):\n", "    y = x\n", "    return y\n", order)
    ids = [*fim.assemble(tokenizer, split), tokenizer.special_id(tokenizer.specials.end_of_text)]
    found = roles(ids, tokenizer)
    assert found.count(Role.SENTINEL) == 3
    assert found[-1] is Role.END

    def text(role):
        return tokenizer.decode([token for token, each in zip(ids, found) if each is role])

    assert text(Role.SUFFIX) == split.suffix
    if order == "psm":
        assert (text(Role.PREFIX), text(Role.MIDDLE)) == (split.prefix, split.middle)
    else:
        assert (text(Role.PREFIX), text(Role.MIDDLE)) == ("", split.prefix + split.middle)


def test_plain_text(corpus):
    tokenizer = corpus.tokenizer
    assert set(roles(tokenizer.encode("x = 1\n"), tokenizer)) == {Role.TEXT}
    assert roles([], tokenizer) == []


def test_rows_are_shown_whole(corpus):
    """Joined, the runs of all segments are the targets; a masked token is a run of its own."""
    phase = data.PhaseSpec(
        3, 4, 64, {name: 1 / len(corpus.sources) for name in corpus.sources}, data.FimOptions(rate=0.5)
    )
    batch = next(iter(data.TrainingLoader(corpus, [phase], seed=0, streams=2)))
    batch["loss_mask"][0, 2] = 0.0
    for row in range(4):
        shown = segments(batch, row, corpus.tokenizer)
        assert len(shown) == batch["segment_ids"][row].max()
        for number, runs in enumerate(shown, 1):
            place = np.flatnonzero(batch["segment_ids"][row] == number)
            assert sum(run.tokens for run in runs) == len(place)
            plain = "".join(run.text for run in runs if run.role not in (Role.SENTINEL, Role.END))
            targets = batch["targets"][row, place]
            known = [roles([token], corpus.tokenizer)[0] for token in targets.tolist()]
            text = [token for token, role in zip(targets.tolist(), known) if role is Role.TEXT]
            if all(run.has_loss for run in runs) and "\ufffd" not in plain:
                assert plain == corpus.tokenizer.decode(text)
    assert [run.tokens for run in segments(batch, 0, corpus.tokenizer)[0] if not run.has_loss] == [1]
