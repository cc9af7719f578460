"""A model that is ready to generate, for generate and serve: of a stage folder, a Hugging Face folder or a GGUF file."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from experiments.contract import WITH_CHECKPOINT
from experiments.export_hf import find_tokenizer
from experiments.training_stage import build, check_finite, placement_of, runtime_from
from kwaicoder_jax import checkpoints, data, huggingface, inference, models, training
from kwaicoder_jax.errors import UserError

TRAINING = ("pretrain", "correct_teacher", "distill", "cpt")
AUTO, NONE = "auto", "none"  # choices of `begin`, beside the spelling of a token


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer.

    Attributes:
      name: of the folder or file.
      config: the model.
      weights: for an engine.
      tokenizer: its tokenizer, whose special tokens are spelled as in its vocabulary.
      begin: tokens that a text begins with.
      stop_tokens: tokens that end it.
      fim_order: of prefix and suffix in a prompt for infilling.
      runtime: how the model is computed.
      placement: on a mesh, or None.
    """

    name: str
    config: models.ModelConfig
    weights: inference.Weights
    tokenizer: data.Tokenizer
    begin: tuple[int, ...]
    stop_tokens: frozenset[int]
    fim_order: Any
    runtime: models.Runtime
    placement: inference.Placement | None

    def prompt(self, text: str, where: str = "prompt") -> tuple[int, ...]:
        """The tokens after which the text goes on."""
        return (*self.begin, *self.tokenizer.encode(_checked(text, where)))

    def infilling(self, prefix: str, suffix: str, where: str = "suffix") -> tuple[int, ...]:
        """The tokens after which the text between prefix and suffix comes."""
        if not data.can_infill(self.tokenizer):
            what = f"the tokenizer of {self.name} has no fill-in-the-middle tokens"
            raise UserError(what, where=where, remedy="use a model that was trained to infill, or a prompt alone")
        prefix, suffix = _checked(prefix, where), _checked(suffix, where)
        end, *tokens = data.infilling_prompt(self.tokenizer, prefix, suffix, self.fim_order)
        del end  # our own training samples begin with it; here the model's own beginning counts
        return (*self.begin, *tokens)

    def engine(self, **sizes: Any) -> inference.Engine:
        """An engine; `sizes` are max_rows, max_tokens and the like."""
        return inference.Engine(self.weights, self.config, runtime=self.runtime, placement=self.placement, **sizes)


def define_flags() -> None:
    """Defines the flags that say which model, and how it is held."""
    flags.DEFINE_string(
        "checkpoint", None, "Stage folder, or a stage's name with --workdir, a Hugging Face folder, or a GGUF file."
    )
    flags.DEFINE_string("tokenizer", None, "Its tokenizer.json, where none is found beside it.")
    flags.DEFINE_string("form", None, f"Of the matrices: {', '.join(inference.Form)}.")
    flags.DEFINE_string("dtype", None, "Of the computation: float32, bfloat16; the model's own if not given.")
    flags.DEFINE_string(
        "begin", None, "Token that texts begin with: auto (as the model was trained), none, or its spelling."
    )
    flags.DEFINE_string("fim_order", None, "psm or spm: which of prefix and suffix comes first when infilling.")


def load(config: Mapping[str, Any], name: str, workdir: Any = None) -> Loaded:
    """Loads the model that the section `name` of a tool's config asks for.

    Args:
      config: from `command.tool_config`; `mesh` and `runtime` count beside the section.
      name: of the tool.
      workdir: the work folder, if there is one.

    Raises:
      UserError: one line about what is not there or does not fit.
    """
    section = config[name]
    _check_choices(section, name)
    mesh = None
    if config.get("mesh"):
        mesh = training.make_mesh(training.without_context(build(training.MeshConfig, config["mesh"], "mesh")))
        mesh = mesh if mesh.size > 1 else None
    runtime = runtime_from(config)
    place = _place(config, name, workdir)
    opened = _open_foreign(place, section, mesh) if _is_foreign(place) else _open_own(place, section, mesh)
    shape, params, tokenizer, ends, begins = opened
    tokenizer = data.with_end(tokenizer, next(iter(ends), None))
    placement = None if mesh is None else placement_of(mesh)
    return Loaded(
        place.name, shape, inference.prepare(params, shape, section["form"]), tokenizer,
        _begin(tokenizer, section["begin"], begins, f"{name}.begin (--begin)"), data.stop_tokens(tokenizer) | frozenset(ends),
        section["fim_order"], runtime, placement,
    )  # fmt: skip


def _check_choices(section: Mapping[str, Any], name: str) -> None:
    for field, choices in (("form", list(inference.Form)), ("fim_order", ["psm", "spm"])):
        if section[field] not in choices:
            remedy = f"use {', '.join(choices)}"
            raise UserError(f"no choice {section[field]!r}", where=f"{name}.{field} (--{field})", remedy=remedy)


def _place(config: Mapping[str, Any], name: str, workdir: Any) -> pathlib.Path:
    """Where the model is: as named, a stage of the work folder, or the last one there that left a checkpoint."""
    named = config[name]["init_from"]
    if named and (workdir is None or "/" in named or not (workdir / named).exists()):
        return pathlib.Path(named)
    if named:
        return pathlib.Path(workdir) / named
    recipe = [stage for stage in config.get("stages", ()) if stage in WITH_CHECKPOINT]
    for stage in reversed(recipe or WITH_CHECKPOINT) if workdir is not None else ():
        if (workdir / stage / "checkpoints").exists():
            return pathlib.Path(workdir) / stage
    raise UserError("is required", where="--checkpoint", remedy="as in --checkpoint=runs/demo/cpt: a stage folder, ...")


def _is_foreign(place: pathlib.Path) -> bool:
    return place.suffix == ".gguf" or (place / "config.json").exists()


_Opened = tuple[models.ModelConfig, models.Params, data.Tokenizer, tuple[int, ...], bool]


def _open_own(place: pathlib.Path, section: Mapping[str, Any], mesh: Any) -> _Opened:
    """A checkpoint of ours."""
    meta = checkpoints.read_meta(place)
    config = models.ModelConfig.from_dict(meta["model"])
    tokenizer, _ = find_tokenizer(place, meta.get("tokenizer"), section["tokenizer"])
    abstract = models.abstract(config) if mesh is None else training.abstract_params(config, mesh)
    params = checkpoints.read_params(place, abstract)
    check_finite(params, place, "--checkpoint")
    stages = [step["stage"].partition("/")[0] for step in meta["lineage"]]
    ends = [step["huggingface"]["token_ids"].get("eos_token_id") for step in meta["lineage"] if "huggingface" in step]
    trained_here = any(stage in TRAINING for stage in stages)
    # A corpus of ours begins and ends documents with its own end token, whatever the model knew before.
    return in_dtype(config, section), params, tokenizer, () if trained_here else _ids(ends), trained_here


def _open_foreign(place: pathlib.Path, section: Mapping[str, Any], mesh: Any) -> _Opened:
    """A model of Hugging Face's format or a GGUF file."""
    source = huggingface.open_model(place, tokenizer=section["tokenizer"])
    if source.tokenizer is None:
        raise UserError("the model has no tokenizer.json", where=str(place), remedy="name one with --tokenizer=FILE")
    shardings = None if mesh is None else training.param_shardings(source.config, mesh)
    params = huggingface.load(source, shardings)
    ends = [source.token_ids.get("eos_token_id"), _generation_config(source).get("eos_token_id")]
    return in_dtype(source.config, section), params, source.tokenizer, _ids(ends), False


def _generation_config(source: huggingface.Source) -> dict[str, Any]:
    name = "generation_config.json"
    try:
        values = json.loads(source.companions.get(name, "{}"))
    except ValueError as error:
        raise UserError(f"{name} is not JSON ({error})", where=source.name, remedy="fetch it again") from error
    return values if isinstance(values, dict) else {}


def in_dtype(config: models.ModelConfig, section: Mapping[str, Any]) -> models.ModelConfig:
    """The model with the dtype of the computation that a tool's section asks for."""
    if section["dtype"] is None:
        return config
    try:
        return config.replace(dtype=section["dtype"])
    except UserError as error:
        raise UserError(error.what, where="--dtype", remedy=error.remedy) from error


def _ids(values: Iterable[Any]) -> tuple[int, ...]:
    """Token ids out of what configs say: a number, a list of them, nothing."""
    flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return tuple(dict.fromkeys(each for each in flat if isinstance(each, int)))


def _begin(tokenizer: data.Tokenizer, choice: str, trained_here: bool, where: str) -> tuple[int, ...]:
    """What a text begins with: what the model met in training, as far as we know."""
    if choice == NONE:
        return ()
    if choice != AUTO:
        found = tokenizer.special_id(choice)
        if found is None:
            remedy = f"use {AUTO}, {NONE}, or a special token as the tokenizer spells it"
            raise UserError(f"the tokenizer has no special token {choice!r}", where=where, remedy=remedy)
        return (found,)
    return (tokenizer.end_of_text,) if trained_here else tokenizer.begin()


def _checked(text: str, where: str) -> str:
    """UserError for what is no text: bytes of a command line or a request that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"is not UTF-8 at character {error.start}", where=where, remedy="give it as UTF-8") from error
    return text
