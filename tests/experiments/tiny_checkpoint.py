"""A stage folder with a random model of milliseconds and a tokenizer, for tools that only read one."""

import pathlib

from kwaicoder_jax import checkpoints, data, testing
from kwaicoder_jax.data import tokenizer as training

TEXT = "def naïve(x):\n    return '€', \"𝄞 日本語\", 12\n"


def tokenizer() -> data.Tokenizer:
    return training.train([TEXT] * 3, 330)


def write(stage: pathlib.Path, *, trained: str = "pretrain", seed: int = 0, **changes) -> pathlib.Path:
    """Writes the stage folder; `changes` are fields of ModelConfig."""
    tokens = tokenizer()
    config = testing.dense_config(**{"vocab_size": tokens.vocab_size, **changes})
    store = checkpoints.CheckpointStore(stage / "checkpoints")
    meta = {
        "model": config.to_dict(), "tokenizer": tokens.hash, "lineage": [{"stage": trained, "identity": "x"}],
        "identity": "x",
    }  # fmt: skip
    store.save(1, testing.random_params(config, seed), meta)
    store.close()
    (stage / "tokenizer.json").write_text(tokens.serialized())
    return stage
