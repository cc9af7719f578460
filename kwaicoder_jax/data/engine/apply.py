"""A step that judges the documents of a shard one by one."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from kwaicoder_jax.data.documents import Document, Verdict
from kwaicoder_jax.data.engine import shards
from kwaicoder_jax.data.engine.store import Result, Store
from kwaicoder_jax.data.engine.tally import Tally

Judge = Callable[[Document], Verdict]


@dataclasses.dataclass(frozen=True)
class Apply:
    """Keeps what a judge keeps, as it rewrote it.

    Facts are those of a `Tally`. Kinds: "in" and "out"; "rule NAME", documents that break a rule, and "only NAME", those that
    break no other; "done NAME", what was done to texts, as often as it was done.

    Attributes:
      judge: a frozen dataclass that can be called, see `steps.settings_of`.
      name: of the step.
    """

    judge: Judge
    name: str

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step."""
        tally = Tally()

        def kept() -> Iterator[Document]:
            for document in shards.read(store.path(inputs[0])):
                verdict = self.judge(document)
                tally.add("in", document)
                for what, count in verdict.counts.items():
                    tally.add(f"done {what}", document, count)
                for rule in verdict.broken:
                    tally.add(f"rule {rule}", document, example=True)
                if len(verdict.broken) == 1:
                    tally.add(f"only {verdict.broken[0]}", document)
                if not verdict.broken:
                    tally.add("out", verdict.document, example=True)
                    yield verdict.document

        shard = shards.write(store, kept())
        return Result({"shard": shard}, tally.facts())
