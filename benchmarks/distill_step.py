"""Cost of a distillation step against its parts: the teacher's forward pass, and the student's training step alone.

    python -m benchmarks.distill_step [--json=FILE] [--seconds=60] [--variants=forward_kl,hidden,...]

`ratio` is the step over the sum of two programs that are measured apart: forward pass and cross-entropy of the teacher,
and forward, backward and AdamW of the student on labels. The three take turns in one process, and a ratio is that of
medians. `cached` reads no teacher: its step is over the student's alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

VARIANTS: dict[str, dict[str, Any]] = {
    "forward_kl": {"hidden": False},
    "reverse_kl": {"hidden": False, "logits_loss": "reverse_kl"},
    "jensen_shannon": {"hidden": False, "logits_loss": "jensen_shannon"},
    "skewed_kl": {"hidden": False, "logits_loss": "skewed_kl"},
    "cosine": {"hidden": False, "logits_loss": "cosine"},
    "mse": {"hidden": False, "logits_loss": "mse"},
    "top_64": {"hidden": False, "top_k": 64},
    "hidden": {"hidden": True},
    "cached": {"hidden": False, "top_k": 64},
}
# A teacher of 36M parameters and the student that pruning makes of it, both on 2,048 tokens.
TEACHER: dict[str, Any] = {"layers": 8, "model_dim": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "mlp_dim": 1408}
STUDENT = TEACHER | {"layers": 6, "model_dim": 384, "heads": 6, "kv_heads": 3, "mlp_dim": 1024}
VOCABULARY, BATCH, SEQUENCE = 16_384, 8, 256

Step = Callable[[], Any]


class Setting:
    """Both models, and a batch.

    Attributes:
      batch: as the loader makes it, with a cache's arrays.
    """

    def __init__(self) -> None:
        import jax
        import numpy as np

        from benchmarks.train_step_jax import random_batch
        from benchmarks.train_step_shapes import StepShape
        from kwaicoder_jax import models

        self.teacher_config, self.student_config = (
            models.ModelConfig(vocab_size=VOCABULARY, tie_embeddings=False, **sizes) for sizes in (TEACHER, STUDENT)
        )
        self.teacher = models.init(self.teacher_config, jax.random.key(0))
        self.student = models.init(self.student_config, jax.random.key(1))
        self.batch = random_batch(StepShape(batch=BATCH, sequence=SEQUENCE, vocab_size=VOCABULARY))
        rng = np.random.default_rng(0)
        shape = (BATCH, SEQUENCE, 64)
        self.batch["ids_BTK"] = jax.numpy.asarray(np.argsort(rng.random((*shape[:2], 1024)), -1)[..., :64], "int32")
        self.batch["log_p_BTK"] = jax.numpy.full(shape, -5.0, "float16")
        self.batch["log_tail_BT"] = jax.numpy.full(shape[:2], -0.6, "float32")

    def teacher_forward(self) -> Step:
        """Forward pass and cross-entropy."""
        import jax

        from kwaicoder_jax import models, training

        @jax.jit
        def forward(params: Any, batch: Any) -> Any:
            hidden_BTD = training.run_model(
                params, self.teacher_config, batch, models.Runtime(scan_unroll=0)
            ).hidden_BTD
            return models.cross_entropy(hidden_BTD, models.projection(params), batch["targets"], batch["loss_mask"])

        return lambda: forward(self.teacher, self.batch).block_until_ready()

    def student_step(self) -> Step:
        """A training step on labels."""
        from kwaicoder_jax import models, training

        settings: dict[str, Any] = {"runtime": models.Runtime(scan_unroll=0), "balance": training.BalanceConfig()}
        return self._step(
            lambda trainable, batch, frozen: training.language_model_loss(
                trainable["model"], self.student_config, batch, **settings
            ),
            {},
        )

    def distill_step(self, variant: str) -> Step:
        """A training step under the teacher."""
        from kwaicoder_jax import distillation, models

        config = distillation.DistillConfig(**VARIANTS[variant])
        pairs = distillation.layer_map([0, 1, 3, 4, 6, 7], 2)
        kept = range(self.student_config.model_dim)
        projections = distillation.initial_projections(pairs, kept, self.teacher_config.model_dim)
        live = variant != "cached"

        def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
            return distillation.distillation_loss(
                trainable, batch, frozen, student_config=self.student_config,
                teacher_config=self.teacher_config if live else None, pairs=pairs, config=config,
                runtime=models.Runtime(scan_unroll=0),
            )  # fmt: skip

        return self._step(loss, {"projections": projections} if config.hidden else {}, self.teacher if live else {})

    def _step(self, loss: Any, extras: dict[str, Any], frozen: Any = None) -> Step:
        import jax
        import jax.numpy as jnp

        from kwaicoder_jax import training

        def rate(step: Any) -> Any:
            return jnp.full_like(step, 1e-4, dtype=jnp.float32)

        optimizer = training.make_optimizer(training.OptimizerConfig(), rate, self.student_config)
        copy = jax.tree.map(jnp.array, {"model": self.student, **extras})  # a step gives its buffers away
        state = training.TrainState(jnp.zeros((), jnp.int32), copy, optimizer.init(copy))
        step = training.make_step(loss, optimizer, rate)

        def run() -> Any:
            nonlocal state
            state, metrics = step(state, self.batch, frozen)
            return metrics["loss"].block_until_ready()

        return run


def measure(setting: Setting, variant: str, seconds: float) -> dict[str, Any]:
    """One row: the three programs in turns for about `seconds` seconds, at least five rounds."""
    programs = {
        "teacher": setting.teacher_forward(), "student": setting.student_step(), "step": setting.distill_step(variant)
    }  # fmt: skip
    for program in programs.values():
        program(), program()
    times: dict[str, list[float]] = {name: [] for name in programs}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["step"]) < 5:
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    apart = medians["student"] + (0.0 if variant == "cached" else medians["teacher"])
    return {
        "variant": variant,
        **{f"{name}_seconds": round(value, 4) for name, value in medians.items()},
        "ratio": round(medians["step"] / apart, 3),
        "rounds": len(times["step"]),
    }


def main() -> None:
    """Parses flags, prints the table, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the rows to, as a JSON list")
    parser.add_argument("--seconds", type=float, default=30.0, help="measuring time of each variant")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="which of " + ", ".join(VARIANTS))
    flags = parser.parse_args()
    rows, setting = [], Setting()
    print(f"{'variant':15s} {'teacher s':>10s} {'student s':>10s} {'step s':>10s} {'ratio':>7s} {'rounds':>7s}")
    for variant in flags.variants.split(","):
        row = measure(setting, variant, flags.seconds)
        rows.append(row)
        teacher, student, step = (row[f"{name}_seconds"] for name in ("teacher", "student", "step"))
        print(
            f"{variant:15s} {teacher:10.3f} {student:10.3f} {step:10.3f} {row['ratio']:7.3f} {row['rounds']:7d}",
            flush=True,
        )
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
