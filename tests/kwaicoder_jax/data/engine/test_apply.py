"""What judges drop is counted by every rule, and alone; counts and examples do not depend on shards."""

import dataclasses
from collections import Counter

import pytest

from kwaicoder_jax.data.documents import Document, Verdict
from kwaicoder_jax.data.engine import shards, tally
from kwaicoder_jax.data.engine.apply import Apply
from kwaicoder_jax.data.engine.runners import InProcess, run
from kwaicoder_jax.data.engine.steps import Task
from kwaicoder_jax.data.engine.store import Store


@dataclasses.dataclass(frozen=True)
class Judge:
    """Numbers that 2 or 3 divides go; stars are removed."""

    def __call__(self, document: Document) -> Verdict:
        number = int(document.identifier)
        broken = tuple(name for name, divisor in (("two", 2), ("three", 3)) if number % divisor == 0)
        stars = document.text.count("*")
        text = document.text.replace("*", "")
        return Verdict(dataclasses.replace(document, text=text), broken, {"star": stars} if stars else {})


DOCUMENTS = [
    Document(f"source{number % 2}", str(number), "é" + "*" * (number % 4), language="c/c++" if number % 5 else "")
    for number in range(200)
]


def done(store, sizes):
    parts, first = [], 0
    for size in sizes:
        parts.append(shards.write(store, DOCUMENTS[first : first + size]))
        first += size
    results = run(store, [Task(Apply(Judge(), "judge"), (part,)) for part in parts], InProcess())
    kept = [document for each in results for document in shards.read(store.path(each.outputs["shard"]))]
    return kept, tally.merged(each.facts for each in results)


def test_counts(tmp_path):
    kept, facts = done(Store(tmp_path), [200])
    assert [int(document.identifier) for document in kept] == [n for n in range(200) if n % 2 and n % 3]
    assert not any("*" in document.text for document in kept)
    (total,) = tally.totals(facts["counts"]).values()
    twos, threes = set(range(0, 200, 2)), set(range(0, 200, 3))
    sizes = Counter({number: 2 + number % 4 for number in range(200)})
    assert total["in"] == [200, sizes.total()]
    assert total["out"] == [len(kept), 2 * len(kept)]
    assert total["rule two"] == [100, sum(sizes[number] for number in twos)]
    assert total["only two"][0] == len(twos - threes)
    assert total["only three"][0] == len(threes - twos)
    assert total["done star"][0] == sum(number % 4 for number in range(200))
    assert tally.totals(facts["counts"], by="source")["source1"]["in"][0] == 100


@pytest.mark.parametrize("sizes", [[1, 199], [100, 0, 100], [30] * 6 + [20]])
def test_shards_change_nothing(tmp_path, sizes):
    assert done(Store(tmp_path / "a"), sizes) == done(Store(tmp_path / "b"), [200])


def test_a_language_with_a_slash_is_a_key_of_its_own(tmp_path):
    _, facts = done(Store(tmp_path), [200])
    assert set(tally.totals(facts["counts"], by="language")) == {"c/c++", ""}


def test_examples_are_few_and_of_every_kind(tmp_path):
    _, facts = done(Store(tmp_path), [50] * 4)
    assert set(facts["examples"]) == {"out", "rule two", "rule three"}
    assert all(len(each) == tally.EXAMPLES for each in facts["examples"].values())
    assert all(int(identifier) % 2 == 0 for _, _, identifier, _, _ in facts["examples"]["rule two"])
