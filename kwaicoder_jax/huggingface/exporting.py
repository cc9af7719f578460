"""From our parameters to a folder that transformers, vLLM and the like load: streamed, resumable, seen only when whole.

.TARGET.partial/   what is there so far; becomes TARGET as the last act
    begun.json     what it is made from, so that only the same work goes on with it
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from kwaicoder_jax import checkpoints, data, files, models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface import card, families, shards
from kwaicoder_jax.huggingface.layout import Layout, Slot
from kwaicoder_jax.huggingface.source import COMPANIONS, PARAM_DTYPES, STORED, TOKENIZER

MAX_SHARD_BYTES = 5 * 10**9
MAX_LENGTH = 4096  # positions that config.json promises of a model that does not say
_BEGUN = "begun.json"
_AHEAD = 2  # batches that are read while another one is written


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export is: planned by `plan_export`, written by `Exported.write`.

    Attributes:
      family: of transformers, which represents the model exactly.
      texts: files beside the weights, by name.
      shards: the files of weights.
      slots: by the name of a tensor, where it comes from.
      padding_rows: rows of the embedding behind the tokenizer's last token; they stay.
    """

    family: families.Family
    layout: Layout
    texts: Mapping[str, str]
    shards: Sequence[shards.Shard]
    slots: Mapping[str, Slot]
    padding_rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(entry.nbytes for shard in self.shards for entry in shard.entries)


def plan_export(
    tensors: checkpoints.Tensors,
    config: models.ModelConfig,
    *,
    tokenizer: data.Tokenizer | None = None,
    companions: Mapping[str, str] | None = None,
    token_ids: Mapping[str, Any] | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    family: str | None = None,
    dtype: str = STORED,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_length: int | None = None,
    name: str = "model",
) -> Exported:
    """Decides everything and reads no weight.

    Args:
      tensors: the model's, as `checkpoints.open_tensors` or `from_params` gives them.
      config: the model.
      tokenizer: goes along.
      companions: files of a tokenizer that was imported, by name.
      token_ids: bos_token_id and the like; from the tokenizer's special tokens if None.
      lineage: of the checkpoint; for the model card, and to prefer the family that the model came from.
      family: the `model_type` to take; the first that represents the model exactly if None.
      dtype: of the weights; "stored" for what they are.
      max_shard_bytes: of one file; a single larger tensor has a file of its own.
      max_length: positions that config.json promises; the model's own if None.
      name: of the model, for its card.

    Raises:
      UserError: no family represents the model, and which field stands in the way; a tokenizer of another model.
    """
    models.check(models.unflatten(tensors), config, where="checkpoint")
    if dtype not in PARAM_DTYPES:
        raise UserError(f"no choice {dtype!r}", where="--dtype", remedy=f"use {', '.join(PARAM_DTYPES)}")
    if max_shard_bytes < 1:
        raise UserError(f"{max_shard_bytes} is not a size", where="--max_shard_bytes", remedy="use 1 or more")
    origin: Mapping[str, Any] = next(
        (entry["huggingface"] for entry in reversed(lineage) if "huggingface" in entry), {}
    )
    config = config.replace(max_length=max_length or config.max_length or MAX_LENGTH)
    chosen, values = families.choose(config, named=family, preferred=origin.get("family"))
    ids = _token_ids(tokenizer, token_ids if token_ids is not None else origin.get("token_ids"))
    padding_rows = _padding_rows(tokenizer, config)
    main = tensors["embedding"].dtype if dtype == STORED else np.dtype(getattr(ml_dtypes, dtype, dtype))
    layout = Layout(chosen, config.replace(param_dtype=main.name))
    slots = {slot.theirs: slot for slot in layout.slots()}
    entries = [shards.Entry(slot.theirs, slot.shape, _dtype(slot, tensors, dtype, main)) for slot in slots.values()]
    planned = shards.plan(entries, max_shard_bytes)
    texts = {
        "config.json": _json({**values, **ids, "torch_dtype": main.name}),
        "generation_config.json": _json(ids),
        "kwaicoder.json": _json({"lineage": list(lineage), "model": config.to_dict()}),
        **shards.index(planned),
        **_tokenizer_files(tokenizer, ids, config, companions or {}),
    }
    texts["README.md"] = card.write(name, chosen, config, lineage, main.name, tokenizer, padding_rows)
    return Exported(chosen, layout, texts, planned, slots, padding_rows)


def _json(value: Any) -> str:
    return json.dumps(files.finite(value), indent=2, ensure_ascii=False) + "\n"


def _dtype(slot: Slot, tensors: checkpoints.Tensors, wanted: str, main: np.dtype) -> np.dtype:
    if slot.dtype is not None:
        return slot.dtype
    return main if slot.ours is None or wanted != STORED else tensors[slot.ours].dtype


def _token_ids(tokenizer: data.Tokenizer | None, known: Mapping[str, Any] | None) -> dict[str, Any]:
    """What config.json calls bos_token_id and the like; documents of ours begin and end with one token."""
    if known is not None or tokenizer is None:
        return dict(known or {})
    found = {}
    for field, special in (("bos_token_id", "end_of_text"), ("eos_token_id", "end_of_text"), ("pad_token_id", "pad")):
        try:
            found[field] = getattr(tokenizer, special)
        except UserError:  # a tokenizer without it
            continue
    return found


def _padding_rows(tokenizer: data.Tokenizer | None, config: models.ModelConfig) -> int:
    if tokenizer is None:
        return 0
    rows = config.vocab_size - tokenizer.vocab_size
    if rows < 0:
        what = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        raise UserError(what, where="model.vocab_size", remedy="use the tokenizer that the model was trained with")
    return rows


def _tokenizer_files(
    tokenizer: data.Tokenizer | None, ids: Mapping[str, Any], config: models.ModelConfig, companions: Mapping[str, str]
) -> dict[str, str]:
    """tokenizer.json and what belongs to it: as it was imported, or made from the special tokens."""
    if tokenizer is None:
        return {}
    kept = {name: text for name, text in companions.items() if name in COMPANIONS}
    if "tokenizer_config.json" not in kept:
        values: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_length,
            "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        for field, number in ids.items():
            if isinstance(number, int):
                values[field.removesuffix("_id")] = tokenizer.decode([number])
        kept["tokenizer_config.json"] = _json(values)
    return {TOKENIZER: tokenizer.serialized(), **kept}


def export(
    tensors: checkpoints.Tensors,
    exported: Exported,
    target: str | os.PathLike[str],
    *,
    on_progress: checkpoints.Progress | None = None,
    memory_bytes: int = checkpoints.MEMORY_BYTES,
) -> bool:
    """Writes the folder; `target` appears at the end, whole. Goes on, file by file, where a killed call was.

    Args:
      tensors: those that the plan was made for.
      exported: the plan.
      target: the folder, which must not exist (or be the same export, and then nothing is done).
      on_progress: told bytes written and bytes in all, in this thread.
      memory_bytes: about what may be held at once; a single tensor may need more.

    Returns:
      Whether it was written: False if it was there.

    Raises:
      UserError: the folder exists, other work was begun beside it, a number that does not fit its dtype, a full disk.
    """
    place = pathlib.Path(target).absolute()
    work = {"identity": files.digest([tensors.identity, exported.texts])}
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        same = all(
            _reads(place / name) == json.loads(exported.texts[name]) for name in ("kwaicoder.json", "config.json")
        )
        if same and all((place / shard.name).exists() for shard in exported.shards):
            return False
        raise UserError("exists already", where=str(place), remedy="choose another folder or remove it")
    partial = place.parent / f".{place.name}.partial"
    if (partial / _BEGUN).exists() and _reads(partial / _BEGUN) != work:
        what = "it was begun from another checkpoint, or with other choices"
        raise UserError(what, where=str(partial), remedy="remove that folder to start over")
    try:
        if not (partial / _BEGUN).exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            files.write_json(partial / _BEGUN, work)
        try:
            _write_shards(tensors, exported, partial, on_progress or (lambda done, total: None), memory_bytes)
        except UserError:  # it would fail again: nothing stays half-written
            shutil.rmtree(partial)
            raise
        for name, text in exported.texts.items():
            files.write_text(partial / name, text)
        (partial / _BEGUN).unlink()
        partial.rename(place)
        return True
    except OSError as error:
        what = f"{error.strerror or error}, with {exported.nbytes / 1e9:.1f} GB to write in all"
        raise UserError(what, where=str(place), remedy="make room, and the same command goes on from there") from error


def _reads(file: pathlib.Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _write_shards(
    tensors: checkpoints.Tensors, exported: Exported, folder: pathlib.Path, told: checkpoints.Progress, memory: int
) -> None:
    missing = [shard for shard in exported.shards if not (folder / shard.name).exists()]
    done = exported.nbytes - sum(entry.nbytes for shard in missing for entry in shard.entries)
    told(done, exported.nbytes)

    def written(count: int) -> None:
        nonlocal done
        done += count
        told(done, exported.nbytes)

    with concurrent.futures.ThreadPoolExecutor(_AHEAD) as pool:
        for shard in missing:
            batches = _batches(exported, shard, memory // (4 * (_AHEAD + 1)))
            shards.write(folder, shard, _ahead(pool, tensors, exported, batches), written)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What is read at once: rows of our tensor (experts, or rows that are rows of theirs), or one tensor."""

    ours: str | None
    layer: int | None
    rows: tuple[int, int] | None
    dtype: np.dtype
    shape: tuple[int, ...]  # of a filler


def _batches(exported: Exported, shard: shards.Shard, limit: int) -> Iterator[_Batch]:
    """The elements of one file in order; neighbouring experts, or neighbouring rows, up to `limit` bytes of them."""
    waiting: _Batch | None = None
    for entry in shard.entries:
        slot = exported.slots[entry.name]
        at_once = max(1, limit // max(1, entry.nbytes))
        if slot.expert is not None:
            mine = _Batch(slot.ours, slot.layer, (slot.expert, slot.expert + 1), entry.dtype, ())
            if waiting and dataclasses.replace(waiting, rows=None) == dataclasses.replace(mine, rows=None):
                assert waiting.rows is not None
                if waiting.rows[1] == slot.expert and slot.expert - waiting.rows[0] < at_once:
                    waiting = dataclasses.replace(waiting, rows=(waiting.rows[0], slot.expert + 1))
                    continue
            if waiting:
                yield waiting
            waiting = mine
            continue
        if waiting:
            yield waiting
            waiting = None
        if slot.ours is None or not exported.layout.rule(slot.ours).keeps_rows:
            yield _Batch(slot.ours, slot.layer, None, entry.dtype, entry.shape)
            continue
        count = exported.layout.tail(slot.ours)[0]
        step = max(1, count * limit // max(1, entry.nbytes))
        for start in range(0, count, step):
            yield _Batch(slot.ours, slot.layer, (start, min(start + step, count)), entry.dtype, ())
    if waiting:
        yield waiting


def _ahead(
    pool: concurrent.futures.Executor, tensors: checkpoints.Tensors, exported: Exported, batches: Iterator[_Batch]
) -> Iterator[np.ndarray]:
    """The batches' elements in order, a few of them read while another is written."""
    queue: collections.deque[concurrent.futures.Future[list[np.ndarray]]] = collections.deque()
    try:
        for batch in batches:
            queue.append(pool.submit(_read, tensors, exported.layout, batch))
            if len(queue) > _AHEAD:
                yield from queue.popleft().result()
        while queue:
            yield from queue.popleft().result()
    finally:
        for future in queue:
            future.cancel()


def _read(tensors: checkpoints.Tensors, layout: Layout, batch: _Batch) -> list[np.ndarray]:
    """The tensors of one batch as they lie in the file."""
    if batch.ours is None:
        return [np.zeros(batch.shape, batch.dtype)]
    array = tensors[batch.ours].read(batch.layer, batch.rows)
    array = array if batch.layer is None else array[0]
    rule = layout.rule(batch.ours)
    parts = list(array) if rule.each_expert else [array]
    with np.errstate(over="ignore"):  # it is an error below
        moved = [rule.to_theirs(part).astype(batch.dtype, copy=False) for part in parts]
    if batch.dtype == np.float16 and not all(np.isfinite(part).all() for part in moved):
        raise UserError("holds a number beyond float16", where=batch.ours, remedy="use another dtype (--dtype)")
    return moved
