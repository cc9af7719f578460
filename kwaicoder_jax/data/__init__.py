"""Data: sources of text, corpora on disk, tokenizer, fill-in-the-middle, packed and mixed batches.

prepare({"code": {"kind": "standard_library", "max_bytes": 4_000_000}}, target)
corpus = Corpus.open(target)
loader = TrainingLoader(corpus, [PhaseSpec(100, 32, 512, {"code": 1.0})], seed=0, streams=8)
"""

from kwaicoder_jax.data.corpus import Corpus, Documents
from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.fill_in_the_middle import FimOptions, infilling_prompt
from kwaicoder_jax.data.loader import PhaseSpec, TrainingLoader, check_streams, merge_states, prefetch
from kwaicoder_jax.data.packing import Batch
from kwaicoder_jax.data.prepare import KINDS, prepare
from kwaicoder_jax.data.sources import Source
from kwaicoder_jax.data.spellings import can_infill, stop_tokens, with_end
from kwaicoder_jax.data.tokenizer import SpecialTokens, Tokenizer
from kwaicoder_jax.data.validation import validation_batches
from kwaicoder_jax.data.workers import Loader, WorkerLoader

__all__ = [
    "KINDS",
    "Batch",
    "Corpus",
    "Document",
    "Documents",
    "FimOptions",
    "Loader",
    "PhaseSpec",
    "Source",
    "SpecialTokens",
    "Tokenizer",
    "TrainingLoader",
    "WorkerLoader",
    "can_infill",
    "check_streams",
    "infilling_prompt",
    "merge_states",
    "prefetch",
    "prepare",
    "stop_tokens",
    "validation_batches",
    "with_end",
]
