"""Held-out loss per source, fill-in-the-middle exact match, and pass@k by execution in the sandbox.

python -m experiments.evaluate --config=configs/demo.py --workdir=runs/demo
"""

import functools
import importlib
import json
from collections.abc import Callable
from typing import Any

from experiments import fields, sections
from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import (
    check_tokenizer,
    corpus_of,
    mesh_of,
    placement_of,
    read_model,
    runtime_from,
    runtime_of,
    validation_of,
)
from kwaicoder_jax import data, files, inference, training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.evaluation import benchmarks, infilling
from kwaicoder_jax.evaluation.sandbox import Sandbox

# Benchmarks by execution: name in the config and the summary -> module and attribute of the Benchmark.
EXECUTED = {"house_functions": ("kwaicoder_jax.evaluation.house_functions", "HouseFunctions")}


def run(context: Context) -> dict[str, Any]:
    """Writes evaluate/samples_NAME.jsonl, evaluate/outcomes_NAME.jsonl and evaluate/infilling.jsonl."""
    section = context.section
    chosen = [_benchmark(name) for name in section["benchmarks"] if name != "infilling"]
    if not section["temperature"] >= 0:
        raise UserError(f"{section['temperature']} is negative", where="evaluate.temperature", remedy="0 is greedy")
    if section.get("samples"):
        if not chosen:
            known = ", ".join(EXECUTED)
            raise UserError("no benchmark scores samples", where="evaluate.benchmarks", remedy=f"choose from {known}")
        completions = benchmarks.read_samples(section["samples"])
        return _score(context, chosen, lambda benchmark: completions)
    mesh, corpus = mesh_of(context), corpus_of(context)
    if "infilling" in section["benchmarks"] and section["infilling_source"] not in corpus.sources:
        raise UserError(
            f"the corpus has no source {section['infilling_source']!r}", where="evaluate.infilling_source",
            remedy=f"it has {', '.join(corpus.sources)}",
        )  # fmt: skip
    params, config, meta = read_model(context, "init_from", mesh)
    check_tokenizer(context, "init_from", meta, corpus)
    held_out = training.HeldOutLoss(config, validation_of(context, corpus), mesh, runtime_of(context, mesh))(params)
    summary = {"valid_loss": held_out["valid_loss"]}
    summary |= {f"valid_loss_{source}": loss for source, loss in held_out["valid_loss_by_source"].items()}

    settings: dict[str, Any] = {
        "seed": context.seed,
        "stop_tokens": (corpus.tokenizer.end_of_text,),
        "runtime": runtime_from(context.config),
        "placement": placement_of(mesh),
    }
    generate: Callable[..., list[list[int]]] = functools.partial(
        inference.generate, params, config, max_new_tokens=section["max_new_tokens"], **settings
    )
    if "infilling" in section["benchmarks"]:
        summary |= _infill(context, corpus, functools.partial(generate, temperature=0.0))

    def draw(benchmark: Any) -> dict[str, list[str]]:
        def texts(prompts: list[str]) -> list[str]:
            with context.display.progress(len(prompts), "samples") as update:
                ids = [[corpus.tokenizer.end_of_text, *corpus.tokenizer.encode(prompt)] for prompt in prompts]
                done = generate(ids, temperature=section["temperature"], progress=lambda n, total: update(n))
            return [corpus.tokenizer.decode(row) for row in done]

        return benchmarks.sample(benchmark, texts, section["num_samples"])

    return summary | _score(context, chosen, draw)


def _benchmark(name: str) -> Any:
    if name not in EXECUTED:
        known = ", ".join([*EXECUTED, "infilling"])
        raise UserError(f"no benchmark {name!r}", where="evaluate.benchmarks", remedy=f"choose from {known}")
    module, attribute = EXECUTED[name]
    return getattr(importlib.import_module(module), attribute)()


def _score(context: Context, chosen: list[Any], samples: Callable[[Any], dict[str, list[str]]]) -> dict[str, Any]:
    """Runs the samples of each benchmark in the sandbox."""
    summary: dict[str, Any] = {}
    sandbox = Sandbox()
    for benchmark in chosen:
        completions = samples(benchmark)
        benchmarks.write_samples(context.folder / f"samples_{benchmark.name}.jsonl", completions)
        fewest = min(len(texts) for texts in completions.values())
        scores = benchmarks.score(benchmark, completions, sandbox, ks=sorted({1, fewest}))
        benchmarks.write_outcomes(
            context.folder / f"outcomes_{benchmark.name}.jsonl", benchmark, completions, scores.outcomes
        )
        summary |= scores.summary()
        passed = sum(passed for _, passed in scores.counts.values())
        context.display.line(f"{benchmark.name}: {passed} samples passed, of {len(scores.counts)} tasks")
    return summary


def _infill(context: Context, corpus: data.Corpus, generate: Callable[..., list[list[int]]]) -> dict[str, Any]:
    """Greedy single-line infilling on validation documents of the first source that is code."""
    section = context.section
    texts = list(corpus.documents(section["infilling_source"], "valid"))
    spans = infilling.cut_spans(texts, section["infilling_tasks"], context.seed, window=section["infilling_window"])
    tokenizer = corpus.tokenizer
    prompts = [data.infilling_prompt(tokenizer, span.prefix, span.suffix) for span in spans]
    with context.display.progress(len(prompts), "infillings") as update:
        rows = generate(prompts, progress=lambda n, total: update(n))
    completions = [infilling.first_line(tokenizer.decode(row)) for row in rows]
    scores = infilling.score(spans, completions)
    lines = [
        {"prefix": s.prefix, "middle": s.middle, "suffix": s.suffix, "completion": text}
        for s, text in zip(spans, completions)
    ]
    files.write_text(context.folder / "infilling.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return {
        "fim_exact_match": scores.exact_match,
        "fim_edit_similarity": scores.edit_similarity,
        "fim_tasks": scores.count,
    }


def inputs(context: Context) -> dict[str, str]:
    """The corpus and the checkpoint; nothing where a file of samples is scored."""
    if context.section.get("samples"):
        return {}
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


def other_files(context: Context) -> dict[str, str]:
    """The file of samples to score, if there is one."""
    return {"samples": context.section["samples"]} if context.section.get("samples") else {}


STAGE = Stage("evaluate", run, ("validation",), inputs, other_files, fields.of_class(sections.Evaluate))

if __name__ == "__main__":
    main(STAGE)
