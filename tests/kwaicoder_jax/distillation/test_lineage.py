"""What the student kept, through one pruning or several, against arrays that are cut the same way."""

import numpy as np

from kwaicoder_jax import distillation


def config(layers, width):
    return {"layers": layers, "model_dim": width, "name": f"{layers}x{width}"}


def pruned(before, layers, channels):
    after = config(len(layers), len(channels))
    return {"config_before": before, "config_after": after, "kept": {"layers": layers, "embed": channels}}


TEACHER = config(6, 9)
FIRST = pruned(TEACHER, [0, 2, 3, 5], [0, 1, 4, 5, 7, 8])
SECOND = pruned(FIRST["config_after"], [0, 2, 3], [1, 2, 5])


def test_one_pruning_is_its_own_record():
    kept = distillation.kept_of([FIRST], FIRST["config_after"], TEACHER)
    assert kept == (FIRST["kept"]["layers"], FIRST["kept"]["embed"])


def test_two_prunings_count_as_the_first_teacher_does():
    states = np.arange(6 * 9).reshape(6, 9)
    for record in (FIRST, SECOND):
        cut = states if record is FIRST else cut  # noqa: F821
        cut = cut[np.ix_(record["kept"]["layers"], record["kept"]["embed"])]
    layers, channels = distillation.kept_of([FIRST, SECOND], SECOND["config_after"], TEACHER)
    np.testing.assert_array_equal(states[np.ix_(layers, channels)], cut)


def test_the_pruned_model_in_between_may_teach():
    kept = distillation.kept_of([FIRST, SECOND], SECOND["config_after"], FIRST["config_after"])
    assert kept == (SECOND["kept"]["layers"], SECOND["kept"]["embed"])
    # What was upcycled after pruning is taught by what it was upcycled from.
    assert distillation.kept_of([FIRST], FIRST["config_after"], FIRST["config_after"]) == ([0, 1, 2, 3], [*range(6)])


def test_a_model_that_was_never_cut_matches_one_of_its_sizes():
    assert distillation.kept_of([], TEACHER, {**TEACHER, "name": "other"}) == ([*range(6)], [*range(9)])
    assert distillation.kept_of([], TEACHER, config(5, 9)) is None


def test_a_stranger_is_no_ancestor():
    assert distillation.kept_of([FIRST, SECOND], SECOND["config_after"], config(7, 9)) is None
