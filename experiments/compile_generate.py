"""What `generate` and `serve` would run with the recipe's final model: a prompt's next tokens, and a decode step.

Sizes: `generate.max_rows` rows (--rows), caches of --cache_tokens, prompts of --prompt_tokens; each rounded up as an engine
does. The forms of weights are `generate.form` and `generate.dtype`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags

from experiments import fields, loading, recipe_models, sections
from experiments.compile_steps import Step
from experiments.contract import Context
from experiments.training_stage import build, placement_of, runtime_from
from kwaicoder_jax import hardware, inference, models, training
from kwaicoder_jax.hardware import roofline

NAME = "generate"
ROUTED = ("moe/gate", "moe/up", "moe/down")  # weights of routed experts, by their paths in a layer
PREFIXES = 4  # prompts that an engine keeps when they were run, see `inference.Engine`


def define_flags() -> None:
    """Defines the flags that say how much is generated at once."""
    flags.DEFINE_integer("rows", None, "generate: rows decoded together; generate.max_rows unless said otherwise.")
    flags.DEFINE_integer("cache_tokens", 4096, "generate: prompt and answer of a row together, at most.")
    flags.DEFINE_integer("prompt_tokens", 2048, "generate: of a prompt.")


FLAGS = ("rows", "cache_tokens", "prompt_tokens")


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine's programs, and what it holds beside the one that runs.

    Attributes:
      load: its sizes.
      steps: "prefill" and "decode".
      tokens: that each of them runs.
      rows_bytes: of all rows' caches, per chip.
      prefix_bytes: of one prompt's.
      least_bytes: that each program has to read, per chip: the weights that even routing hits, and the caches.
      peak_flops: of a chip, in the form that the weights have.
    """

    load: inference.ahead.Load
    steps: Mapping[str, Step]
    tokens: Mapping[str, int]
    rows_bytes: int
    prefix_bytes: int
    least_bytes: Mapping[str, float]
    peak_flops: float


def make(context: Context, machine: hardware.Topology, rows: int | None, cache: int, prompt: int) -> Engine:
    """The programs for so many rows, tokens of a row's cache and tokens of a prompt."""
    section = dataclasses.asdict(sections.Generate()) | dict(context.config.get(NAME, {}))
    fields.check(fields.of_class(sections.Generate), section, NAME)
    split = training.without_context(build(training.MeshConfig, context.config.get("mesh", {}), "mesh"))
    mesh = training.make_mesh(split, machine.devices)
    config = loading.in_dtype(recipe_models.model_before(context.config, NAME), section)
    placement, runtime = placement_of(mesh), runtime_from(context.config)
    load = inference.ahead.Load.of(config, section["max_rows"] if rows is None else rows, cache, prompt, placement)
    params = training.abstract_params(config, mesh)
    calls = inference.ahead.calls(params, config, load, form=section["form"], runtime=runtime, placement=placement)
    # A decode step's token sees a full cache, those of a prompt half of it on average.
    per_token = {
        "prefill": models.forward_flops_per_token(config, load.prompt_slots, logits=False),
        "decode": models.decode_flops_per_token(config, load.slots),
    }
    tokens = {"prefill": load.chunk, "decode": load.rows}
    steps = {
        name: Step(call.function, (), mesh, per_token[name] * tokens[name], call.arguments)
        for name, call in calls.items()
    }
    caches = {
        "prefill": _bytes_per_chip(calls["prefill"].arguments["prefix"].cache),
        "decode": _bytes_per_chip(calls["decode"].arguments["rows"].cache),
    }
    weights, chip = calls["decode"].arguments["weights"], machine.chip
    least = {name: caches[name] + _weights_read(weights, config, tokens[name]) for name in calls}
    peak = chip.bf16_flops if section["form"] == inference.Form.FLOAT else chip.peak("s8")
    return Engine(load, steps, tokens, caches["decode"], caches["prefill"], least, peak)


def _weights_read(weights: inference.Weights, config: models.ModelConfig, tokens: int) -> float:
    """Bytes per chip of the weights that so many tokens read if they choose their experts evenly."""
    total = float(_bytes_per_chip(weights))
    if not weights.tied:
        total -= _bytes_per_chip(weights.rest["embedding"])  # rows of it are looked up
    if config.experts is not None:
        missed = (1 - config.experts.experts_per_token / config.experts.num_experts) ** tokens
        layers = [layer for stack in weights.stacks.values() for layer in stack.arrays]
        total -= missed * sum(_bytes_per_chip(layer[path]) for layer in layers for path in ROUTED if path in layer)
    return total


def summary_of(engine: Engine, reports: Mapping[str, roofline.Roofline]) -> dict[str, Any]:
    """The keys that this step has beside those of every step, see docs/summary_keys.md."""
    kept = PREFIXES * engine.prefix_bytes
    held = max(reports["decode"].hbm_bytes + kept, reports["prefill"].hbm_bytes + engine.rows_bytes + kept)
    speed = {f"{name}_tokens_per_second_bound": _speed(engine, name, report) for name, report in reports.items()}
    return {
        "fits": held <= (1 - roofline.SPARE) * reports["decode"].capacity,
        "engine_bytes_per_chip": held,
        "cache_bytes_per_chip": engine.rows_bytes,
        **speed,
        **dataclasses.asdict(engine.load),
    }


def _speed(engine: Engine, name: str, report: roofline.Roofline) -> float:
    """Tokens per second that no run exceeds whose routing is even: without tiles that are computed or read in vain.

    Model FLOPs, or the bytes that have to be read, and the collectives that are waited for.
    """
    read = engine.least_bytes[name] / report.hbm_bandwidth
    seconds = max(report.model_flops / engine.peak_flops, read, report.hidden_seconds) + report.exposed_seconds
    return engine.tokens[name] / seconds


def table(engine: Engine, reports: Mapping[str, roofline.Roofline]) -> str:
    """What a person reads below the tables of the two programs."""
    load, found, capacity = engine.load, summary_of(engine, reports), reports["decode"].capacity
    return "\n".join(
        [
            f"engine             {load.rows} rows of {load.slots} tokens, prompts of {load.prompt_slots},"
            f" {load.chunk} at once",
            f"memory per chip    {found['engine_bytes_per_chip'] / 1e9:.2f} GB of {capacity / 1e9:.2f}: the larger program,"
            f" rows of {engine.rows_bytes / 1e9:.2f} GB, {PREFIXES} prompts kept of {engine.prefix_bytes / 1e9:.2f} GB: "
            + ("fits with a tenth to spare" if found["fits"] else "DOES NOT FIT with a tenth to spare"),
            f"tokens per second  at most {found['decode_tokens_per_second_bound']:.0f} decoded by all rows,"
            f" {found['decode_tokens_per_second_bound'] / load.rows:.1f} a row;"
            f" {found['prefill_tokens_per_second_bound']:.0f} of prompts",
        ]
    )


def _bytes_per_chip(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
