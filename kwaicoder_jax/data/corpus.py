"""A prepared corpus: its manifest, its tokenizer, and random access to its documents."""

import os
from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import grain

from kwaicoder_jax import files
from kwaicoder_jax.data import shards
from kwaicoder_jax.data.prepare import FORMAT
from kwaicoder_jax.data.tokenizer import Tokenizer
from kwaicoder_jax.errors import UserError

Split = Literal["train", "valid"]
_REMEDY = "run prepare_data to make it"


class Documents(Sequence[str]):
    """The texts of one split of one source, read when asked for."""

    def __init__(self, records: Sequence[bytes]):
        """Wraps the records."""
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return shards.text_of(self._records[index % len(self)])


class Corpus:
    """What `prepare` made. Make one with `Corpus.open`.

    Attributes:
      manifest: documents, tokens, duplicates, what was dropped and why, hashes; by source and in total.
      tokenizer: the corpus's own.
      hash: hex digest of the manifest; equal for corpora of the same contents wherever they lie.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: dict[str, Any], tokenizer: Tokenizer):
        """Use `open` instead."""
        self._path, self.manifest, self.tokenizer = files.path(path), manifest, tokenizer
        self.hash = files.digest(manifest)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Corpus":
        """Opens the corpus in folder `path`; UserError when it is missing, incomplete or damaged."""
        root = files.path(path)
        try:
            manifest = files.read_json(root / "manifest.json")
        except FileNotFoundError:
            raise UserError("there is no corpus here", where=str(path), remedy=_REMEDY) from None
        except (ValueError, OSError) as error:
            raise UserError(f"cannot be read ({error})", where=str(root / "manifest.json"), remedy=_REMEDY) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"is not a manifest of format {FORMAT}", where=str(root / "manifest.json"), remedy=_REMEDY)
        corpus = cls(path, manifest, Tokenizer.from_file(root / "tokenizer.json"))
        if corpus.tokenizer.hash != manifest["tokenizer_hash"]:
            raise UserError("is not the corpus's", where=str(root / "tokenizer.json"), remedy=_REMEDY)
        corpus._check_shards()
        return corpus

    @property
    def path(self) -> Any:
        """Its folder."""
        return self._path

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in alphabetical order."""
        return tuple(sorted(self.manifest["sources"]))

    def documents(self, source: str, split: Split) -> Documents:
        """Returns the texts of one split of a source."""
        return Documents(self.records(source, split))

    def records(self, source: str, split: Split) -> Sequence[bytes]:
        """Returns a Grain data source of stored records (see `shards.record`)."""
        if source not in self.manifest["sources"]:
            raise UserError(
                f"the corpus has no source {source!r}", where=str(self._path), remedy=f"it has {self.sources}"
            )
        if split not in shards.SPLITS:
            raise UserError(f"{split!r} is not a split", remedy=f"one of {shards.SPLITS}")
        paths = [str(self._path / shard["file"]) for shard in self.manifest["sources"][source][split]["shards"]]
        return cast(Sequence[bytes], grain.sources.ArrayRecordDataSource(paths))

    def _check_shards(self) -> None:
        """A missing or cut-off file is found here, not in the middle of a run."""
        for entry in self.manifest["sources"].values():
            for shard in (shard for split in shards.SPLITS for shard in entry[split]["shards"]):
                path = self._path / shard["file"]
                if not path.exists():
                    raise UserError("is missing", where=str(path), remedy=_REMEDY)
                if path.stat().length != shard["bytes"]:
                    raise UserError(f"has not its {shard['bytes']} bytes", where=str(path), remedy=_REMEDY)
