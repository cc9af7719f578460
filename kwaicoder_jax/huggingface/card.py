"""The model card: what the model is, where it came from step by step, how to load it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kwaicoder_jax import data, models
from kwaicoder_jax.huggingface.families import Family

_SHORT = 200  # characters of one value; longer ones (orders of neurons) are in kwaicoder.json alone


def write(
    name: str,
    family: Family,
    config: models.ModelConfig,
    lineage: Sequence[Mapping[str, Any]],
    dtype: str,
    tokenizer: data.Tokenizer | None,
    padding_rows: int,
) -> str:
    """The text of README.md."""
    total, active = models.count(config), models.count_active(config)
    size = f"{total:,} parameters" + (f", of which a token uses {active:,}" if active != total else "")
    rows = f"; the last {padding_rows} rows of the embedding belong to no token" if padding_rows else ""
    words = f"{tokenizer.vocab_size:,} tokens (tokenizer {tokenizer.hash[:16]}){rows}" if tokenizer else "no tokenizer"
    parts = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [code, kwaicoder_jax]", "---", "",
        f"# {name}", "",
        f"A `{family.architecture}` with {size}, stored in {dtype}; {words}. Exported by kwaicoder_jax.", "",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        '    tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        '    model = AutoModelForCausalLM.from_pretrained("FOLDER")', "",
        "## Sizes", "", "| field | value |", "|---|---|", *_rows(config.to_dict()), "",
        "## Lineage", "", *(_lineage(lineage) or ["Not recorded."]), "",
        "The whole record, enough to repeat every transform, is in `kwaicoder.json`.", "",
    ]  # fmt: skip
    return "\n".join(parts)


def _rows(values: Mapping[str, Any]) -> list[str]:
    shown = {name: value for name, value in values.items() if value not in (None, [], False, "none")}
    return [f"| {name} | {_text(value)} |" for name, value in shown.items()]


def _lineage(lineage: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for number, entry in enumerate(lineage, 1):
        lines.append(f"{number}. **{entry.get('stage', 'unknown')}** `{entry.get('identity', '')}`")
        details = {**entry, **entry.get("record", {}), **entry.get("huggingface", {})}
        for field, value in details.items():
            hidden = field in ("stage", "identity", "record", "huggingface", "config_before", "config_after")
            if not hidden and value is not None and len(text := _text(value)) <= _SHORT:
                lines.append(f"    - {field}: {text}")
    return lines


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
