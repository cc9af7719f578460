"""The cleaning stage: a document in, a verdict out, with all the rules that it breaks."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kwaicoder_jax.data.cleaning import generated, headers, redaction, statistics
from kwaicoder_jax.data.cleaning.rules import DEFAULT, Rule, table
from kwaicoder_jax.data.documents import Document, Verdict
from kwaicoder_jax.errors import UserError

_WHERE = "prepare_data.cleaning"
_LARGEST = 8_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cleaner:
    """The stage with its settings; it can be pickled, and works the same in any process.

    Attributes:
      rules: bounds on statistics; see `rules.table`.
      syntax: whether to parse, where the language's grammar is installed.
      generated: whether generated, minified and bundled code is dropped.
      headers: what becomes of licence banners: "keep", "shorten" or "remove".
      emails: whether e-mail addresses are replaced.
      addresses: whether IP addresses are replaced.
      secrets: whether keys and passwords are replaced.
      max_bytes: larger documents break "too_large" and are not looked at further, so that memory is bounded; at most 8 MB.
    """

    rules: tuple[Rule, ...] = DEFAULT
    syntax: bool = True
    generated: bool = True
    headers: str = "remove"
    emails: bool = True
    addresses: bool = True
    secrets: bool = True
    max_bytes: int = 3_000_000

    def __post_init__(self) -> None:
        for field in ("syntax", "generated", "emails", "addresses", "secrets"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"{getattr(self, field)!r} is not True or False", where=f"{_WHERE}.{field}")
        if self.headers not in headers.HANDLING:
            raise UserError(
                f"{self.headers!r} is unknown", where=f"{_WHERE}.headers", remedy=f"one of {list(headers.HANDLING)}"
            )
        size = self.max_bytes
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= _LARGEST:
            raise UserError(f"{size!r} is not a number from 1 to {_LARGEST}", where=f"{_WHERE}.max_bytes")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Cleaner":
        """Makes the stage of a plain dict, as in {"headers": "keep", "rules": {"digits": {"at_most": 0.3}}}.

        Raises:
          UserError: an unknown field or rule, or a value that cannot be.
        """
        fields = dict(config)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise UserError(f"unknown field {unknown[0]!r}", where=_WHERE, remedy=f"cleaning has {known}")
        overrides = fields.pop("rules", None)
        if overrides is not None and not isinstance(overrides, Mapping):
            raise UserError(f"{overrides!r} is not a mapping of rules", where=f"{_WHERE}.rules")
        return cls(rules=table(overrides), **fields)

    def rule_names(self) -> tuple[str, ...]:
        """Every name that a verdict may say is broken."""
        marks = generated.NAMES if self.generated else ()
        return ("too_large", *(rule.name for rule in self.rules), *marks)

    def __call__(self, document: Document) -> Verdict:
        """Cleans the text, then measures it as it would be trained on; marks of generated code are read before."""
        text = document.text
        if len(text) > self.max_bytes or (not text.isascii() and len(text.encode()) > self.max_bytes):
            return Verdict(document, ("too_large",))
        counts: Counter[str] = Counter()
        cleaned, banners = headers.strip(text, document.language, document.licence, self.headers)
        redacted = redaction.redact(cleaned, emails=self.emails, addresses=self.addresses, keys=self.secrets)
        counts.update(redacted.counts)
        counts["banner"] += banners
        measured = statistics.measure(redacted.text, document.language, parse=self.syntax)
        counts["not_parsed"] += math.isnan(measured.syntax_errors)
        broken = tuple(
            rule.name for rule in self.rules if rule.holds_for(document.language) and rule.broken_by(measured)
        )
        if self.generated:
            broken += generated.broken(document.path, text, document.language, measured)
        if redacted.text != text:
            document = dataclasses.replace(document, text=redacted.text)
        return Verdict(document, broken, {kind: count for kind, count in counts.items() if count})
