"""Makes benchmarks/routed_batch.json: how many tokens a trained router sends to each expert.

    python -m experiments.prepare_data --config=configs/demo.py --workdir=runs/demo
    python -m benchmarks.routed_batch --workdir=runs/demo

Small mixtures of 8, 64, 128 and 256 experts, two layers wide 128, learn the demo's corpus for 60 steps of 2,048 tokens with
the recipe's balance loss; what their last layer then does with one validation batch of 4,096 tokens is recorded. About
ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import data, models, training
from kwaicoder_jax.training.state import TrainState

EXPERTS_PER_TOKEN = {8: 2, 64: 8, 128: 8, 256: 8}  # as in Mixtral, OLMoE, Qwen3 and DeepSeek-V3
SOURCE = "standard_library"
STEPS, ROWS, LENGTH = 60, 8, 256


def tokens_per_expert(corpus: data.Corpus, experts: int) -> list[int]:
    """Trains a mixture, and counts what it does with the first full validation batch."""
    config = models.ModelConfig(
        vocab_size=corpus.tokenizer.vocab_size, layers=2, model_dim=128, heads=4, kv_heads=2, head_dim=32, mlp_dim=384,
        experts=models.ExpertsConfig(experts, EXPERTS_PER_TOKEN[experts], 64),
    )  # fmt: skip
    runtime, balance = models.Runtime(), training.BalanceConfig()

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        del frozen
        return training.language_model_loss(trainable["model"], config, batch, runtime=runtime, balance=balance)

    rate = training.join([training.PhaseRate(steps=STEPS, peak=2e-3)])
    optimizer = training.make_optimizer(training.OptimizerConfig(), rate, config)
    trainable = {"model": models.init(config, jax.random.key(0))}
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    step = training.make_step(loss, optimizer, rate)
    for batch in data.TrainingLoader(corpus, [data.PhaseSpec(STEPS, ROWS, LENGTH, {SOURCE: 1.0})], seed=0, streams=4):
        arrays: Any = batch
        state, metrics = step(state, arrays, None)
    print(f"{experts} experts: loss {float(metrics['loss']):.3f}", flush=True)
    held_out: Any = data.validation_batches(corpus, sequence_length=LENGTH, batch_size=2 * ROWS)[SOURCE][0]
    output = training.run_model(state.trainable["model"], config, held_out, runtime)
    assert output.router is not None
    tokens = np.count_nonzero(held_out["segment_ids"])
    return np.rint(np.asarray(output.router.load_E)[-1] * tokens).astype(int).tolist()


def main() -> None:
    """Writes the file; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="where prepare_data has run")
    corpus = data.Corpus.open(Path(parser.parse_args().workdir) / "prepare_data" / "corpus")
    found = {str(experts): tokens_per_expert(corpus, experts) for experts in EXPERTS_PER_TOKEN}
    text = json.dumps({"source": SOURCE, "steps": STEPS, "tokens_per_expert": found})
    Path(__file__).with_name("routed_batch.json").write_text(text.replace("], ", "],\n") + "\n")


if __name__ == "__main__":
    main()
