"""The contract's parts without a process: identities, flattened configs, phases, stopping."""

import signal

import pytest

from experiments import command, contract, stopping, training_stage
from experiments.display import Display
from kwaicoder_jax.errors import UserError


def context(tmp_path, name="one", **section):
    stage = contract.Stage(name, lambda context: {"answer": 42})
    config = {"seed": 0, "stages": (name,), name: {"x": 1, "deep": {"y": (1, 2)}, **section}}
    return contract.Context(stage, config, contract.files.path(tmp_path), Display(), stopping.Stop())


def test_identity_does_not_know_the_place(tmp_path):
    identities = set()
    for place in ("a", "b/c"):
        one = context(tmp_path / place)
        contract.run(one)
        identities.add(one.identity)
    assert len(identities) == 1


def test_a_finished_stage_is_not_run_again(tmp_path):
    first = contract.run(context(tmp_path))

    def never(context):
        raise AssertionError("run again")

    again = context(tmp_path)
    again.stage = contract.Stage("one", never)
    assert contract.run(again) == first


@pytest.mark.parametrize(
    ("change", "field"), [({"x": 2}, "one.x"), ({"deep": {"y": (1, 3)}}, "one.deep.y"), ({"z": 0}, "one.z")]
)
def test_a_changed_field_is_named(tmp_path, change, field):
    contract.run(context(tmp_path))
    with pytest.raises(UserError) as error:
        contract.run(context(tmp_path, **change))
    assert error.value.where == field
    contract.run(context(tmp_path, **change), restart=True)


def test_lists_of_names_may_be_given_with_commas():
    assert command._lists({"a": ("x,y",), "b": ("x", "y"), "c": 3}) == {"a": ("x", "y"), "b": ("x", "y"), "c": 3}


def section(steps, *shares):
    shape = {"batch_size": 4, "sequence_length": 32, "mixture": {"a": 1.0}, "fim": {}, "rate": {"peak": 1.0}}
    return {"steps": steps, "phases": {f"phase{i}": {"share": s, **shape} for i, s in enumerate(shares)}}


def test_phases_add_up_to_the_steps():
    phases = training_stage.phases_of(section(101, 0.5, 0.3, 0.2), "cpt")
    assert [phase.steps for phase in phases.data] == [50, 31, 20]
    assert [phases.phase_of(step) for step in (0, 49, 50, 80, 81, 100)] == [1, 1, 2, 2, 3, 3]
    assert phases.rates[1].start == phases.rates[0].end


@pytest.mark.parametrize(("steps", "shares"), [(2, (1, 1, 1)), (10, (1, 0)), (10, ()), (3, (100, 1, 1))])
def test_phases_without_a_step_are_refused(steps, shares):
    with pytest.raises(UserError, match=r"cpt\."):
        training_stage.phases_of(section(steps, *shares), "cpt")


def test_a_signal_is_deferred_inside_a_loop_and_raised_after_it():
    stop = stopping.Stop()

    def loop():
        with stop.deferred():
            stop._handle(signal.SIGTERM, None)
            assert stop.requested

    with pytest.raises(stopping.Stopped):
        loop()
    with pytest.raises(stopping.Stopped):
        stop._handle(signal.SIGTERM, None)
