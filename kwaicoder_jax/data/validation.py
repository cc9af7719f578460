"""Fixed batches of validation documents: no fill-in-the-middle, no shuffling, the same for any seed."""

import grain
import numpy as np

from kwaicoder_jax.data import packing, pieces
from kwaicoder_jax.data.corpus import Corpus
from kwaicoder_jax.errors import UserError


def validation_batches(
    corpus: Corpus, *, sequence_length: int, batch_size: int, max_tokens_per_source: int | None = None
) -> dict[str, list[packing.Batch]]:
    """Returns by source the batches of its validation documents, in the order in which they are stored.

    Args:
      corpus: where the documents are.
      sequence_length: places of a row, in tokens.
      batch_size: rows of each batch; the last one is filled up with rows of padding (segment 0).
      max_tokens_per_source: stop before the piece of a document with which the targets would be more (one at least).
    """
    if sequence_length < pieces.SMALLEST_WINDOW:
        what = f"{sequence_length} is less than {pieces.SMALLEST_WINDOW}"
        raise UserError(what, where="validation.sequence_length")
    if batch_size < 1:
        raise UserError(f"{batch_size} is less than 1", where="validation.batch_size")
    return {
        source: _batches(
            _examples(corpus, source, sequence_length, max_tokens_per_source), corpus, sequence_length, batch_size
        )
        for source in corpus.sources
    }


def _examples(corpus: Corpus, source: str, window: int, most: int | None) -> list[dict[str, np.ndarray]]:
    examples: list[dict[str, np.ndarray]] = []
    tokens = 0
    for text in corpus.documents(source, "valid"):
        for piece in pieces.cut(text, corpus.tokenizer, pieces.room(window, 0.0)):
            example = pieces.example(pieces.plain(piece, corpus.tokenizer))
            tokens += len(example)
            if most is not None and tokens > most and examples:
                return examples
            examples.append({"pair": example})
    return examples


def _batches(
    examples: list[dict[str, np.ndarray]], corpus: Corpus, window: int, batch_size: int
) -> list[packing.Batch]:
    pad = corpus.tokenizer.pad
    dataset = grain.MapDataset.source(examples).to_iter_dataset(grain.ReadOptions(num_threads=0))
    rows = list(packing.pack(dataset, window, batch_size, pad))
    blank = {key: np.zeros_like(value) for key, value in rows[0].items()} | {"pair": np.full_like(rows[0]["pair"], pad)}
    rows += [blank] * (-len(rows) % batch_size)
    return [packing.batch(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
