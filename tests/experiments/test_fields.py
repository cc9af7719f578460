"""Types and ranges of config sections, against what Python's own annotations say."""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pytest

from experiments import command, contract, display, fields, stopping
from kwaicoder_jax.errors import UserError
from tests.experiments import tiny_config


@dataclasses.dataclass
class Inner:
    depth: int


@dataclasses.dataclass
class Outer:
    count: fields.Count
    share: fields.Share = 0.5
    bounded: Annotated[float, fields.Range(0, 1)] = 0.0
    maybe: fields.Natural | None = None
    flag: bool = False
    names: Sequence[str] = ()
    which: int | Sequence[int] | None = None
    sizes: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    inner: Inner | None = None
    other: Any = None


GOOD = [
    ("count", 1), ("share", 1), ("bounded", 0), ("maybe", None), ("maybe", 0), ("flag", True), ("names", ("a", "b")),
    ("names", []), ("which", 3), ("which", (1, 2)), ("which", ()), ("sizes", {"a": 1, "b": None}), ("inner", None),
    ("inner", {"depth": 1}), ("inner", Inner(2)), ("other", None), ("other", object()),
]  # fmt: skip
BAD = [
    ("count", 0, "count: 0 is out of range; use 1 or more"), ("count", True, "count: True is not of type int"),
    ("count", 2.0, "count: 2.0 is not of type int"), ("count", "4", "count: '4' is not of type int"),
    ("count", None, "count: None is not of type int"), ("share", 0.0, "share: 0.0 is out of range; use more than 0, at"),
    ("share", 1.5, "out of range"), ("share", float("nan"), "share: nan is not a finite number"),
    ("bounded", -0.1, "bounded: -0.1 is out of range; use 0 to 1"), ("bounded", float("inf"), "finite"),
    ("maybe", -1, "maybe: -1 is out of range"), ("maybe", "x", "maybe: 'x' is not of type int or None"),
    ("flag", None, "flag: None is not of type bool"), ("flag", 1, "flag: 1 is not"), ("names", "ab", "list of str"),
    ("names", (1,), "list of str"), ("which", ("a",), "of type int or list of int or None"), ("which", (True,), "type"),
    ("sizes", {"a": "x"}, "sizes.a: 'x' is not of type float or None"), ("sizes", None, "sizes: None is not of type sec"),
    ("sizes", {"a": float("nan")}, "sizes.a: nan"), ("inner", {"depth": "x"}, "inner.depth: 'x'"),
    ("inner", {}, "inner.depth: is missing"), ("inner", 3, "inner: 3 is no section"), ("more", 1, "more: no such field"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_what_fits(name, value):
    fields.check(fields.of_class(Outer), {"count": 1, name: value}, "here")


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_what_does_not_fit_is_named(name, value, words):
    with pytest.raises(UserError, match=r"^here\.") as error:
        fields.check(fields.of_class(Outer), {"count": 1, name: value}, "here")
    assert words in str(error.value)


def test_the_arguments_of_a_function():
    def function(given, *, size: int, share: float = 0.5):
        del given, size, share

    known = fields.of_function(function, ("given",))
    fields.check(known, {"size": 1}, "here")
    for values, words in (({}, "here.size: is missing"), ({"size": 1, "given": 2}, "here.given: no such field")):
        with pytest.raises(UserError, match=words):
            fields.check(known, values, "here")


def config(**changes):
    values = tiny_config.get_config().to_dict()
    for name, value in changes.items():
        *places, last = name.split("__")
        place = values
        for part in places:
            place = place[part]
        place[last] = value
    return contract.Section(command._lists(values))


def test_every_section_of_the_demo_fits():
    for name in config()["stages"]:
        fields.check(importlib.import_module(f"experiments.{name}").STAGE.fields, config()[name], name)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": -1}, {"seed": 2**70}, {"seed": None}, {"upcycle__seed": -1}, {"upcycle__granularity": None},
        {"upcycle__granularity": "4"}, {"upcycle__granularity": 2.0}, {"upcycle__replicas": True},
        {"upcycle__replicas": None}, {"upcycle__top_replicas": None}, {"upcycle__shared_neurons": None},
        {"upcycle__drop_ratio": None}, {"upcycle__drop_replicas": ("a",)}, {"upcycle__router_std": "x"},
        {"upcycle__coactivation": None}, {"upcycle__steps": 0}, {"upcycle__other": 1}, {"prune__steps": None},
        {"prune__steps": 2.5}, {"prune__protect_ends": None}, {"prune__calibration__mixture": None},
        {"prune__importance": None}, {"prune__target": None}, {"prune__search__least": float("nan")},
        {"prune__search__least": 2.0}, {"prune__search__granularity": 0}, {"prune__search__batches": -1},
        {"prune__search__batch": 0}, {"prune__search__context": -5}, {"prune__search__distill_top": -1},
        {"prune__search__max_latency": float("nan")}, {"evaluate__num_samples": None}, {"evaluate__num_samples": 0},
        {"evaluate__benchmarks": "infilling"}, {"evaluate__infilling_tasks": -1}, {"evaluate__infilling_window": -5},
        {"pretrain__optimizer": None}, {"distill__baseline": "x"}, {"cpt__continue_data": 1},
        {"prepare_data__vocab_size": "4"}, {"prepare_data__seed": 0.5}, {"report__title": None},
    ],
    ids=lambda change: "=".join(map(str, *change.items())),
)  # fmt: skip
def test_a_value_of_a_wrong_type_or_range_stops_a_stage_before_it_does_anything(tmp_path, change):
    ((name, _),) = change.items()
    where = name.replace("__", ".")
    stage = importlib.import_module(f"experiments.{'upcycle' if where == 'seed' else where.split('.')[0]}").STAGE
    place = contract.files.path(tmp_path)
    with pytest.raises(UserError) as error:
        contract.run(contract.Context(stage, config(**change), place, display.Display(), stopping.Stop()))
    assert error.value.where == where
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
