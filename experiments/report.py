"""One page over all stages: what was done, what it cost, what came of it.

python -m experiments.report --config=configs/demo.py --workdir=runs/demo
"""

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from experiments import fields, sections
from experiments.command import main
from experiments.contract import Context, Stage, check_fresh
from kwaicoder_jax import checkpoints, files, models
from kwaicoder_jax.evaluation import report


def run(context: Context) -> dict[str, Any]:
    """Writes WORKDIR/report.html; stages that were not made from one another are refused, since a page would mix them."""
    for name in context.inputs:
        check_fresh(context.workdir, name)
    material = report.read(
        context.workdir,
        list(context.inputs),
        _models(context),
        title=context.section["title"],
        command=command(sys.argv),
    )
    page = report.build(material)
    target = context.workdir / "report.html"
    files.write_text(target, page)
    context.display.line(f"{target}: {len(material.stages)} stages")
    return {"report_bytes": len(page.encode())}


def _models(context: Context) -> dict[str, tuple[dict[str, Any], int, int]]:
    """By stage: the description of its newest checkpoint without the loader's state, and its model's parameters."""
    found = {}
    for name in [*context.inputs, "distill/baseline"]:
        if not (context.workdir / name / "checkpoints").exists():
            continue
        meta = dict(checkpoints.read_meta(context.workdir / name))
        meta.pop("loader", None)
        config = models.ModelConfig.from_dict(meta["model"])
        found[name] = (meta, models.count(config), models.count_active(config))
    return found


def command(argv: Sequence[str]) -> str:
    """The recipe's command with this run's config and overrides.

    The work folder goes by its last name and the config by its place under the current folder: a page that is handed
    on says nothing about the machine.
    """
    words = ["python", "-m", "experiments.pipeline"]
    for word in argv[1:]:
        flag, equals, value = word.partition("=")
        if not equals:
            continue
        if flag == "--config":
            value = os.path.relpath(value) if not os.path.relpath(value).startswith("..") else os.path.basename(value)
        elif flag == "--workdir":
            value = os.path.basename(os.path.normpath(value))
        elif not flag.startswith("--config."):
            continue
        words.append(shlex.quote(f"{flag}={value}"))
    return " ".join(words)


def inputs(context: Context) -> dict[str, str]:
    """Every finished stage before this one in the recipe; a stage that was not run is not in the report."""
    names = list(context.config["stages"])
    before = names[: names.index("report")] if "report" in names else names
    return {name: name for name in before if (context.workdir / name / "summary.json").exists()}


STAGE = Stage("report", run, (), inputs, fields=fields.of_class(sections.Report))

if __name__ == "__main__":
    main(STAGE)
