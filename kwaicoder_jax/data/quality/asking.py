"""Labels from a larger model: any server that speaks OpenAI's chat protocol is asked what it thinks of some documents.

What is asked for are four marks from 0 to 10, as Seed-Coder asks (arXiv 2506.03524): readability, modularity, clarity,
reusability. A label is their mean, from 0 to 1. Answers are kept in a store by model, question and text, so that a run that
was stopped asks for nothing twice.
"""

import concurrent.futures
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine.store import Result, Store, action_of
from kwaicoder_jax.errors import UserError

MARKS = ("readability", "modularity", "clarity", "reusability")
QUESTION = """You judge source code for a collection from which people learn to program.
Give four marks from 0 (worst) to 10 (best):
- readability: names, layout, comments where they help, no needless cleverness;
- modularity: parts with one purpose each, small interfaces, no copied stretches;
- clarity: what it is for and how it works can be told from the text itself;
- reusability: complete, without errors, without test data or settings of one machine, of use elsewhere.
Configuration, tables of data, generated code and fragments deserve low marks.
Answer with JSON alone, as in {"readability": 7, "modularity": 5, "clarity": 6, "reusability": 4}.

"""
_LONGEST = 12_000  # characters of a document that are shown
_ANSWER = re.compile(r"\{[^{}]*\}")


class Asked(NamedTuple):
    """What came of asking.

    Attributes:
      rows: {"text", "label", "marks"} of those that were judged, in the order of the documents.
      counts: "judged", "known" (from an earlier run) and "unusable" answers.
    """

    rows: list[dict[str, Any]]
    counts: Counter[str]


@dataclasses.dataclass(frozen=True)
class Judge:
    """A model behind an address.

    Attributes:
      url: of the server, as in "http://localhost:8000/v1".
      model: its name there.
      key: if the server asks for one.
      workers: questions at a time.
      retries: after which a question is given up; waits grow from one to the next.
      timeout: seconds of one answer.
    """

    url: str
    model: str
    key: str = "none"
    workers: int = 8
    retries: int = 5
    timeout: float = 120.0

    def ask(self, store: Store, documents: Iterable[Document], progress: Callable[[int], None] | None = None) -> Asked:
        """Has documents judged; answers that are no marks are counted and left out.

        Args:
          store: for the answers.
          documents: a few thousand, of all languages and kinds.
          progress: called with the number of documents so far.

        Raises:
          UserError: no such server, or it refuses.
        """
        client, rows, counts = self._client(), [], Counter[str]()
        with concurrent.futures.ThreadPoolExecutor(self.workers) as pool:
            for done, (document, marks, was_known) in enumerate(
                _in_order(pool, lambda document: self._marks(store, client, document), documents, 2 * self.workers), 1
            ):
                counts["known" if was_known else "judged" if marks else "unusable"] += 1
                if marks:
                    label = sum(marks.values()) / (10 * len(marks))
                    rows.append({"text": document.text, "label": round(label, 4), "marks": marks})
                if progress is not None:
                    progress(done)
        return Asked(rows, counts)

    def _marks(self, store: Store, client: Any, document: Document) -> tuple[Document, dict[str, float], bool]:
        title = f"{document.language or 'text'}, {document.path or document.identifier}"
        shown = f"{QUESTION}{title}:\n\n{document.text[:_LONGEST]}"
        action = action_of("ask", self.model, shown)
        if (known := store.find(action)) is not None:
            return document, dict(known.facts), True
        answer = self._answer(client, shown)
        marks = parsed(answer)
        if marks:
            store.record(action, Result({}, marks))
        return document, marks, False

    def _answer(self, client: Any, shown: str) -> str:
        import openai

        try:
            made = client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": shown}], temperature=0.0, max_tokens=200
            )
        except openai.OpenAIError as error:
            raise UserError(f"does not answer ({error})", where=f"prepare_data.quality: {self.url}") from error
        return made.choices[0].message.content or "" if made.choices else ""

    def _client(self) -> Any:
        try:
            import openai
        except ImportError:
            remedy = "pip install openai"
            raise UserError("openai is not installed", where="prepare_data.quality", remedy=remedy) from None
        return openai.OpenAI(base_url=self.url, api_key=self.key, max_retries=self.retries, timeout=self.timeout)


def parsed(answer: str) -> dict[str, float]:
    """The four marks of an answer, from its last JSON object that has them; empty if there is none."""
    for text in reversed(_ANSWER.findall(answer)):
        try:
            found = json.loads(text)
            marks = {name: float(found[name]) for name in MARKS}
        except (ValueError, KeyError, TypeError):
            continue
        if all(0 <= mark <= 10 for mark in marks.values()):
            return marks
    return {}


def _in_order(
    pool: concurrent.futures.Executor, function: Callable[[Document], Any], documents: Iterable[Document], ahead: int
) -> Iterator[Any]:
    """Results in the order of the documents, of which few are held at a time."""
    waiting: list[concurrent.futures.Future[Any]] = []
    for document in documents:
        waiting.append(pool.submit(function, document))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
