"""What goes through the data engine: documents, and what a stage says of each."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text with where it came from; nothing in it depends on the machine that read it.

    Attributes:
      source: the name that the config gives to where it was found.
      identifier: unique in its source, as in "flask-3.1.0.tar.gz/src/flask/app.py".
      text: valid Unicode, without lone surrogates.
      path: in its repository, package or archive, with "/"; the identifier's end. Empty where there is none.
      repository: what is packed together: a repository's, package's or archive's name. Empty where there is none.
      language: a name of `reading.languages`, as in "python"; empty where it is not known.
      licence: SPDX identifier, as in "MIT"; empty where none was found.
      scores: by name, as in {"quality": 0.7}; what later stages rank and filter by.
    """

    source: str
    identifier: str
    text: str
    path: str = ""
    repository: str = ""
    language: str = ""
    licence: str = ""
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def encoded(self) -> bytes:
        """One line of JSON in UTF-8, without its line break; fields that are empty are left out."""
        fields = {name: value for name in FIELDS if (value := getattr(self, name))}
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def decoded(cls, line: bytes) -> "Document":
        """The inverse of `encoded`."""
        fields: dict[str, Any] = json.loads(line)
        return cls(**({"text": ""} | fields))


FIELDS = tuple(field.name for field in dataclasses.fields(Document))


class Verdict(NamedTuple):
    """What a stage says of a document.

    Attributes:
      document: rewritten perhaps, and kept if nothing is broken.
      broken: names of all the rules that it breaks, not of the first alone; empty if it is kept.
      counts: of what was done to its text, as in {"email": 2} for two replaced addresses.
    """

    document: Document
    broken: tuple[str, ...] = ()
    counts: Mapping[str, int] = {}
