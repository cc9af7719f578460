"""From sources to a corpus on disk: deduplicated, split, with a tokenizer trained on its training text.

    TARGET/manifest.json  tokenizer.json  SOURCE/train-00000-of-00003.array_record  SOURCE/valid-...

The same inputs give the same bytes. Text streams through: what is held are 16 bytes a document, and one batch.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from kwaicoder_jax import files
from kwaicoder_jax.data import shards, tokenizer
from kwaicoder_jax.data.mathematics import Mathematics
from kwaicoder_jax.data.python_sources import InstalledPackages, Knowledge, StandardLibrary
from kwaicoder_jax.data.sources import Folder, Source, from_config
from kwaicoder_jax.errors import UserError

KINDS: dict[str, type[Source]] = {
    "standard_library": StandardLibrary,
    "installed_packages": InstalledPackages,
    "knowledge": Knowledge,
    "mathematics": Mathematics,
    "folder": Folder,
}
FORMAT = 1
_ENCODE_BATCH = 256  # documents tokenised at once

Progress = Callable[[str, int, int | None], None]


def prepare(
    sources: Mapping[str, Mapping[str, Any] | Source],
    target: str | os.PathLike[str],
    *,
    vocab_size: int = 8192,
    valid_fraction: float = 0.02,
    seed: int = 0,
    shard_bytes: int = 64 * 2**20,
    tokenizer_sample_bytes: int = 32 * 2**20,
    given: tokenizer.Tokenizer | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Builds a corpus and returns its manifest; `target` appears at the end, whole, or not at all.

    Args:
      sources: by name, what `from_config` takes, as in {"code": {"kind": "standard_library", "max_bytes": 10**6}}.
      target: the folder to make; it must not exist.
      vocab_size: tokens of the byte-level BPE, specials included; a small corpus can give fewer.
      valid_fraction: share of the documents to hold out, chosen by the hash of their text and `seed`.
      seed: changes which documents are held out.
      shard_bytes: size at which a new file begins.
      tokenizer_sample_bytes: training text that the tokenizer sees at most, shared among the sources by size.
      given: a tokenizer to use as it is, that of an imported model; none is trained then.
      progress: called with (what is done, documents so far, their number or None).

    Raises:
      UserError: an unknown source or field, a target that exists, a source with no training or no validation document.
    """
    chosen = {name: from_config(name, config, KINDS) for name, config in sources.items()}
    if not chosen:
        raise UserError(
            "there is no source", where="prepare_data.sources", remedy=f"name at least one of {sorted(KINDS)}"
        )
    if not 0.0 < valid_fraction < 1.0:
        raise UserError(f"{valid_fraction} is not between 0 and 1", where="prepare_data.valid_fraction")
    if shard_bytes <= 0:
        raise UserError(f"{shard_bytes} is not a positive number", where="prepare_data.shard_bytes")
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("exists already", where=str(target), remedy="choose another folder or remove it")
    partial = target.parent / f".{target.name}.partial"  # a fixed name, so that the next run finds what a kill left
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        manifest = _build(
            chosen, partial, vocab_size, valid_fraction, seed, shard_bytes, tokenizer_sample_bytes, given, progress
        )
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):  # a full disk, a folder without permission
            raise UserError(f"cannot be written ({error})", where=str(target)) from error
        raise
    return manifest


def _build(
    sources: Mapping[str, Source],
    folder: Path,
    vocab_size: int,
    valid_fraction: float,
    seed: int,
    shard_bytes: int,
    sample_bytes: int,
    given: tokenizer.Tokenizer | None,
    progress: Progress | None,
) -> dict[str, Any]:
    seen: set[bytes] = set()
    entries: dict[str, dict[str, Any]] = {}
    forbidden = given.special_strings() if given is not None else tokenizer.SpecialTokens().strings()
    spools: dict[str, dict[str, shards.Spool]] = {}
    for name, source in sources.items():
        spools[name] = {split: shards.Spool(folder / f"{name}.{split}.spool") for split in shards.SPLITS}
        entries[name] = _collect(name, source, spools[name], seen, forbidden, valid_fraction, seed, progress)
    trained = given or tokenizer.train(_sample(spools, sample_bytes), vocab_size)
    (folder / "tokenizer.json").write_text(trained.serialized(), encoding="utf-8", newline="")
    for name, entry in entries.items():
        for split in shards.SPLITS:
            written = _write(spools[name][split], folder / name, split, trained, shard_bytes, progress)
            entry[f"tokens_{split}"], entry[split] = written.pop("tokens"), written
            spools[name][split].path.unlink()
    totals = ("documents_in", "documents_train", "documents_valid", "tokens_train", "tokens_valid")
    manifest = {
        "format": FORMAT,
        "sources": entries,
        "tokenizer_hash": trained.hash,
        "vocab_size": trained.vocab_size,
        "valid_fraction": valid_fraction,
        "seed": seed,
        **{key: sum(entry[key] for entry in entries.values()) for key in totals},
    }
    files.write_json(folder / "manifest.json", manifest)
    return manifest


def _collect(
    name: str,
    source: Source,
    spools: Mapping[str, shards.Spool],
    seen: set[bytes],
    forbidden: Collection[str],
    valid_fraction: float,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Reads one source into its two spools; returns its part of the manifest."""
    dropped: Counter[str] = Counter()
    documents = duplicates = 0
    for document in source.documents(name, dropped):
        documents += 1
        if progress and documents % 100 == 0:
            progress(f"read {name}", documents, None)
        content = document.text.encode()
        digest = hashlib.sha256(content).digest()
        if digest[:16] in seen:
            duplicates += 1
        elif any(special in document.text for special in forbidden):
            dropped["special_token"] += 1
        else:
            seen.add(digest[:16])
            split = "valid" if _fraction(seed, digest) < valid_fraction else "train"
            spools[split].add(shards.record(document.identifier, document.text), len(content))
    for split, spool in spools.items():
        spool.close()
        if not spool.count:
            kept = sum(s.count for s in spools.values())
            what = (
                f"gave no {split} document ({documents} read, {kept} kept, left out: {dict(sorted(dropped.items()))})"
            )
            more = "raise its max_bytes" if source.section == "sources" else "let its stages keep more (report.html)"
            remedy = f"{more} or {'raise prepare_data.valid_fraction' if kept else 'see what it holds'}"
            raise UserError(what, where=f"prepare_data.{source.section}.{name}", remedy=remedy)
    return {
        "kind": next((kind for kind, cls in KINDS.items() if type(source) is cls), type(source).__name__),
        "documents_in": documents,
        "duplicates": duplicates,
        "dropped": dict(dropped),
        **{f"documents_{split}": spool.count for split, spool in spools.items()},
        **{f"bytes_{split}": spool.bytes for split, spool in spools.items()},
    }


def _fraction(seed: int, digest: bytes) -> float:
    """A number in [0, 1) that belongs to a text: equal texts fall on the same side of any threshold."""
    return int.from_bytes(hashlib.sha256(f"{seed}/".encode() + digest).digest()[:8]) / 2**64


def _sample(spools: Mapping[str, Mapping[str, shards.Spool]], sample_bytes: int) -> Iterator[str]:
    """Yields training texts, from each source its share of `sample_bytes` by size."""
    total = sum(spool["train"].bytes for spool in spools.values())
    for spool in spools.values():
        budget = spool["train"].bytes * min(1.0, sample_bytes / total)
        for raw in spool["train"]:
            text = shards.text_of(raw)
            budget -= len(text.encode())
            if budget < -0.5:
                break
            yield text


def _write(
    spool: shards.Spool,
    folder: Path,
    split: str,
    trained: tokenizer.Tokenizer,
    shard_bytes: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Turns a spool into shards and counts tokens, an end token for each document among them."""
    writer = shards.ShardWriter(folder, split, shard_bytes)
    records, tokens, done = iter(spool), 0, 0
    while batch := list(islice(records, _ENCODE_BATCH)):
        tokens += sum(len(ids) + 1 for ids in trained.encode_batch([shards.text_of(raw) for raw in batch]))
        for raw in batch:
            writer.add(raw)
        done += len(batch)
        if progress:
            progress(f"write {folder.name} {split}", done, spool.count)
    return {"tokens": tokens, **writer.close()}
