"""A model of somebody else's, opened: what it is, whether its files hold it, and its tokenizer. No weight is read yet."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kwaicoder_jax import data, files, models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface import families, gguf, weights
from kwaicoder_jax.huggingface.families import Family
from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.huggingface.layout import Layout

STORED = "stored"  # a choice of param_dtype: as the weights are
PARAM_DTYPES = (STORED, "float32", "bfloat16", "float16")
TOKENIZER = "tokenizer.json"
# What else belongs to the tokenizer and to generation; carried along as it is.
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Source:
    """What `open_model` found.

    Attributes:
      name: of the folder or file.
      family: of the model.
      config: of the model.
      layout: where its parameters are.
      tensors: its weights.
      tokenizer: its tokenizer, or None if there is none.
      companions: text of the files that belong to the tokenizer, by name.
      token_ids: bos_token_id and the like, as the config has them.
      identity: equal for equal contents, wherever they lie.
    """

    name: str
    family: Family
    config: models.ModelConfig
    layout: Layout
    tensors: weights.Weights
    tokenizer: data.Tokenizer | None
    companions: Mapping[str, str]
    token_ids: Mapping[str, Any]
    identity: str

    def dtype(self, name: str) -> np.dtype:
        """What a parameter of ours is stored as."""
        return np.dtype(self.layout.declared[name].dtype)

    def origin(self) -> dict[str, Any]:
        """What a checkpoint's lineage says of it, and what an export of its descendants needs to know."""
        return {"name": self.name, "family": self.family.model_type, "token_ids": dict(self.token_ids)}


def open_model(
    place: str | os.PathLike[str],
    *,
    param_dtype: str = STORED,
    dtype: str = "float32",
    tokenizer: str | os.PathLike[str] | None = None,
) -> Source:
    """Opens a folder as `save_pretrained` writes it, or a GGUF file.

    Args:
      place: the folder or file.
      param_dtype: what the parameters become; "stored" for what the weights are.
      dtype: of the computation, as in ModelConfig.
      tokenizer: a tokenizer.json to use instead of the model's own.

    Raises:
      UserError: one line about a field of the config that is not represented, or a tensor or file that disagrees.
    """
    if param_dtype not in PARAM_DTYPES:
        raise UserError(f"no choice {param_dtype!r}", where="param_dtype", remedy=f"use {', '.join(PARAM_DTYPES)}")
    root = pathlib.Path(place)
    own = data.Tokenizer.from_file(tokenizer) if tokenizer is not None else None
    if root.is_dir():
        source = _open_folder(root, param_dtype, dtype, own)
    elif root.suffix == ".gguf" and root.exists():
        source = _open_gguf(root, param_dtype, dtype, own)
    else:
        state = "is neither a folder nor a .gguf file" if root.exists() else "does not exist"
        raise UserError(
            state, where=str(place), remedy="name a folder with config.json and safetensors, or a GGUF file"
        )
    source.layout.check(source.tensors, source.family)
    if source.tokenizer is not None and source.tokenizer.vocab_size > source.config.vocab_size:
        what = f"the tokenizer has {source.tokenizer.vocab_size} tokens, the model {source.config.vocab_size}"
        raise UserError(what, where=str(place), remedy="use the tokenizer that the model was trained with")
    return source


def read_config(folder: str | os.PathLike[str]) -> models.ModelConfig:
    """The model that a folder's config.json describes."""
    return families.read(_fields(pathlib.Path(folder)))[1]


def _fields(root: pathlib.Path) -> Fields:
    file = root / "config.json"
    if not file.exists():
        raise UserError(
            "is missing", where=str(file), remedy="name the folder of a model, as save_pretrained writes it"
        )
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"is not JSON ({error})", where=str(file), remedy="fetch it again") from error
    if not isinstance(values, dict):
        raise UserError("is no object", where=str(file), remedy="fetch it again")
    return Fields(values, str(file))


def _open_folder(root: pathlib.Path, param_dtype: str, dtype: str, own: data.Tokenizer | None) -> Source:
    fields = _fields(root)
    family, config = families.read(fields)
    tensors = weights.open_folder(root)
    said = fields.get("dtype", fields.get("torch_dtype"))
    config = config.replace(dtype=dtype, param_dtype=_param_dtype(family, config, tensors, param_dtype, said))
    if own is None and (root / TOKENIZER).exists():
        own = data.Tokenizer.from_file(root / TOKENIZER)
    companions = {name: (root / name).read_text() for name in COMPANIONS if (root / name).exists()}
    token_ids = {name: fields.values[name] for name in _TOKEN_IDS if name in fields.values}
    identity = files.digest({
        "config": fields.values, "tensors": tensors.identity, "tokenizer": own.hash if own else None,
        "companions": companions,
    })  # fmt: skip
    return Source(
        root.resolve().name, family, config, Layout(family, config), tensors, own, companions, token_ids, identity
    )


def _param_dtype(
    family: Family, config: models.ModelConfig, tensors: weights.Weights, wanted: str, said: str | None
) -> str:
    """What the parameters become; UserError if the weights are not what they are said to be, and nobody chose."""
    if wanted != STORED:
        return wanted
    expected = said
    # In a model of float16 everything that is float32 by its nature shows as such.
    for slot in Layout(family, config.replace(param_dtype="float16")).slots():
        if slot.ours is None or slot.dtype is not None or slot.theirs not in tensors:
            continue
        found = tensors[slot.theirs]
        expected = expected or found.dtype.name
        if found.dtype in weights.DTYPES.values() and found.dtype.name != expected:
            by = "config.json says" if said else "others are"
            raise UserError(
                f"is {found.dtype.name}, {by} {expected}", where=tensors.file_of(slot.theirs),
                remedy=f"choose what all become: param_dtype={', '.join(PARAM_DTYPES[1:])}",
            )  # fmt: skip
    return expected or "float32"


def _open_gguf(file: pathlib.Path, param_dtype: str, dtype: str, own: data.Tokenizer | None) -> Source:
    opened = gguf.open_file(file)
    config = opened.config.replace(dtype=dtype, param_dtype="float32" if param_dtype == STORED else param_dtype)
    layout = Layout(opened.family, config, opened.rules, gguf.LAYER)
    own = own or opened.tokenizer()
    identity = files.digest({"tensors": opened.weights.identity, "tokenizer": own.hash})
    return Source(
        file.stem, opened.family, config, layout, opened.weights, own, opened.companions(), opened.token_ids, identity
    )
