"""An exported model in Hugging Face transformers beside the checkpoint that it was made from: logits, and greedy text."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.contract import Context
from kwaicoder_jax import checkpoints, data, inference, models
from kwaicoder_jax.errors import UserError

NEW_TOKENS = 32
PROMPTS = (
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "import os\n\ndef list_files(folder):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)  # fmt: skip


def check() -> None:
    """UserError where transformers is not there, before anything is written."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        remedy = "install both (requirements-dev.txt has them), or leave it off"
        raise UserError("needs torch and transformers", where="export_hf.compare", remedy=remedy)


def compare(
    context: Context, checkpoint: Any, target: Any, config: models.ModelConfig, tokenizer: data.Tokenizer
) -> dict[str, Any]:
    """Loads both, and compares them on each prompt.

    Returns:
      max_logit_difference: the largest absolute one over prompts, positions and vocabulary, in float32.
      texts: by prompt, the greedy continuations of both.
      and with which versions.
    """
    prompts = [str(each) for each in context.section.get("prompts") or PROMPTS]
    ids = [[tokenizer.end_of_text, *tokenizer.encode(prompt)] for prompt in prompts]
    context.display.line(f"comparing with transformers on {len(prompts)} prompts")
    ours = _ours(checkpoint, config.replace(dtype="float32"), ids, tokenizer.end_of_text)
    theirs, versions = _theirs(target, ids, tokenizer.end_of_text)
    differences = [float(np.max(np.abs(a - b))) for (a, _), (b, _) in zip(ours, theirs, strict=True)]
    texts = [
        {"prompt": prompt, "ours": tokenizer.decode(mine), "transformers": tokenizer.decode(other)}
        for prompt, (_, mine), (_, other) in zip(prompts, ours, theirs)
    ]
    same = sum(text["ours"] == text["transformers"] for text in texts)
    context.display.line(f"logits differ by at most {max(differences):.1e}, {same} of {len(texts)} texts are the same")
    return {"max_logit_difference": max(differences), "texts": texts, **versions}


Result = list[tuple[np.ndarray, list[int]]]  # of each prompt: logits [T, V], and the tokens that follow


def _ours(checkpoint: Any, config: models.ModelConfig, ids: Sequence[list[int]], end: int) -> Result:
    import jax
    import jax.numpy as jnp

    params = checkpoints.read_params(checkpoint, models.abstract(config))
    texts = inference.generate(params, config, ids, max_new_tokens=NEW_TOKENS, stop_tokens=(end,))

    @jax.jit
    def logits(params: models.Params, inputs_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        positions_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape)
        hidden_BTD = models.forward(params, config, inputs_BT, positions_BT, segments_BT).hidden_BTD
        return models.logits(hidden_BTD, models.projection(params))

    longest = max(map(len, ids))
    padded = [np.pad(row, (0, longest - len(row)))[None] for row in ids]
    segments = [(np.arange(longest) < len(row)).astype(np.int32)[None] for row in ids]
    return [
        (np.asarray(logits(params, row.astype(np.int32), segment))[0, : len(each)], text)
        for row, segment, each, text in zip(padded, segments, ids, texts)
    ]


def _theirs(target: Any, ids: Sequence[list[int]], end: int) -> tuple[Result, dict[str, str]]:
    import torch  # of the test requirements; nothing else here needs it
    import transformers

    found: Result = []
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(str(target), dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        for row in ids:
            inputs = torch.tensor([row])
            logits = model(inputs).logits[0].numpy()
            made = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=NEW_TOKENS, do_sample=False,
                eos_token_id=end, pad_token_id=end,
            )  # fmt: skip
            text = made[0, len(row) :].tolist()
            found.append((logits, text[: text.index(end)] if end in text else text))
    return found, {"transformers_version": transformers.__version__, "torch_version": torch.__version__}
