"""Who teaches in distill: a model that is loaded, or the cache of its logits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.contract import Context
from experiments.training_stage import check_tokenizer, read_model
from kwaicoder_jax import data, distillation, files, models
from kwaicoder_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Guide:
    """A teacher.

    Attributes:
      config: the model; None where its logits come with the batches.
      params: its parameters.
      pairs: of layers whose states are compared.
      projections: from the student's width to its.
      settings: of the loss.
      prepare: adds its logits to a batch.
    """

    settings: distillation.DistillConfig
    config: models.ModelConfig | None = None
    params: Any = dataclasses.field(default_factory=dict)
    pairs: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    projections: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    prepare: Callable[[data.Batch], data.Batch] | None = None

    def flops_per_token(self, length: int) -> float:
        """Of its forward pass."""
        return 0.0 if self.config is None else models.forward_flops_per_token(self.config, length)


def name_of(context: Context) -> str:
    """The teacher that `distill.teacher` names, or the recipe's: corrected where it has that stage."""
    stages = context.config["stages"]
    return context.config["distill"].get("teacher") or next(
        (name for name in ("correct_teacher", "pretrain") if name in stages), "pretrain"
    )


def live(
    context: Context, corpus: data.Corpus, mesh: Any, meta: dict[str, Any], settings: distillation.DistillConfig
) -> Guide:
    """The teacher's model."""
    params, config, teacher_meta = read_model(context, "teacher", mesh)
    check_tokenizer(context, "teacher", teacher_meta, corpus)
    student = models.ModelConfig.from_dict(meta["model"])
    _check_vocabulary(student, config.vocab_size, "distill.teacher")
    if not settings.hidden:
        return Guide(settings, config, params)
    kept = distillation.kept_of([s["record"] for s in meta["lineage"] if s["stage"] == "prune"], meta["model"],
                                teacher_meta["model"])  # fmt: skip
    if kept is None:
        what, remedy = "the student's lineage has no pruning of this teacher", "name the checkpoint that was pruned"
        raise UserError(what, where="distill.teacher", remedy=f"{remedy}, or set distill.loss.hidden=False")
    layers, channels = kept
    pairs = distillation.layer_map(layers, context.section["hidden_every"])
    return Guide(settings, config, params, pairs, distillation.initial_projections(pairs, channels, config.model_dim))


def cached(
    context: Context, corpus: data.Corpus, student: models.ModelConfig, settings: distillation.DistillConfig
) -> Guide:
    """What `cache_teacher` wrote; the teacher's model is not read, and need not be there."""
    reader = distillation.CacheReader(context.inputs.get("cache", context.section["cache"]))
    header = reader.header
    if settings.hidden:
        raise UserError("a cache holds no hidden states", where="distill.loss.hidden", remedy="set it to False")
    if header.tokenizer != corpus.tokenizer.hash:
        what, remedy = "its tokenizer is not the corpus's", "write the cache anew"
        raise UserError(what, where="distill.cache", remedy=remedy)
    _check_vocabulary(student, header.vocab_size, "distill.cache")
    for field, wanted in (("temperature", settings.temperature), ("top_k", settings.top_k)):
        if wanted is not None and wanted != getattr(header, field):
            what = f"{wanted} is not the cache's, {getattr(header, field)}"
            raise UserError(what, where=f"distill.loss.{field}", remedy="use that, or write another cache")
    own = context.workdir / name_of(context) / "stage.json"
    if own.exists() and files.read_json(own)["identity"] != header.teacher:
        what = f"it is not of the {name_of(context)} that stands in {context.workdir}"
        raise UserError(what, where="distill.cache", remedy="write it anew, or name its teacher in distill.teacher")
    try:
        settings = dataclasses.replace(settings, top_k=header.top_k)
    except UserError as error:
        raise UserError(error.what, where="distill.loss.logits_loss", remedy="use a divergence") from error
    return Guide(settings, prepare=reader.add)


def _check_vocabulary(student: models.ModelConfig, size: int, where: str) -> None:
    if student.vocab_size != size:
        what = f"a teacher of {size} tokens for a student of {student.vocab_size}"
        raise UserError(what, where=where, remedy="use models of one vocabulary")
