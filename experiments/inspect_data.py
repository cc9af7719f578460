"""Prints batches of a training stage as the model sees them: parts of fill-in-the-middle in colours, segments, loss mask.

python -m experiments.inspect_data --config=configs/demo.py --workdir=runs/demo [--stage=cpt] [--phase=phase2] [--rows=2]

The corpus is the work folder's; the batches are those that the stage's first steps of the phase would get. Elsewhere than on
a terminal, parts stand in brackets with their names. What carries no loss is struck through, or in {braces}.
"""

from typing import Any

from absl import flags
from rich.console import Console
from rich.text import Text

from experiments import command, training_stage
from experiments.contract import WITH_CHECKPOINT, Context, Section, Stage
from experiments.display import Display
from experiments.stopping import Stop
from kwaicoder_jax import data
from kwaicoder_jax.data import roles
from kwaicoder_jax.data.roles import Role
from kwaicoder_jax.errors import UserError

NAME = "inspect_data"
STAGE = Stage(NAME, lambda context: {})  # a tool; it has no section of its own
_STYLES = {
    Role.TEXT: "", Role.PREFIX: "blue", Role.SUFFIX: "green", Role.MIDDLE: "bold magenta", Role.SENTINEL: "black on yellow",
    Role.END: "black on cyan",
}  # fmt: skip


def main() -> None:
    """The body of the command."""
    holder = command.define_flags()
    flags.DEFINE_string("stage", None, "Whose batches; the config's first stage that trains unless given.")
    flags.DEFINE_string("phase", None, "Of the stage; the first one unless given.")
    flags.DEFINE_integer("rows", 2, "Rows to print.", lower_bound=1)
    flags.DEFINE_integer("skip", 0, "Batches to pass over.", lower_bound=0)

    def work(stop: Stop, display: Display) -> None:
        context = command.tool_context(STAGE, holder.value, {}, {}, stop, display)
        values = flags.FLAGS
        show(context, values.stage, values.phase, values.rows, values.skip)

    command.execute(work, required=("config", "workdir"), resumable=False)


def show(context: Context, stage: str | None, phase: str | None, rows: int, skip: int) -> None:
    """Prints rows of a stage's batches on standard output."""
    corpus = data.Corpus.open(command.tool_workdir() / "prepare_data" / "corpus")
    name, specs = _phases(context.config, stage)
    chosen = _index(sorted(context.config[name]["phases"]), phase, f"{name}.phases")
    seed = context.config[name].get("seed")
    streams = context.config["loader"]["streams"]
    loader = data.TrainingLoader(
        corpus, [specs[chosen]], seed=context.config["seed"] if seed is None else seed, streams=streams
    )
    console, left = Console(highlight=False, soft_wrap=True), rows
    for number, batch in enumerate(loader):
        if number < skip:
            continue
        for row in range(min(left, len(batch["inputs"]))):
            _row(console, corpus.tokenizer, batch, row, f"{name}, {_name(context, name, chosen)}, batch {number}")
        left -= len(batch["inputs"])
        if left <= 0:
            return


def _phases(config: dict[str, Any], stage: str | None) -> tuple[str, list[data.PhaseSpec]]:
    trained = [name for name in WITH_CHECKPOINT if isinstance(config.get(name), dict) and "phases" in config[name]]
    if not trained or (stage is not None and stage not in trained):
        what = "no stage of the config trains" if not trained else f"{stage!r} does not train"
        raise UserError(what, where="--stage", remedy=f"use one of {trained}" if trained else "")
    name = stage or trained[0]
    return name, training_stage.phases_of(Section(config[name], name), name).data


def _index(names: list[str], phase: str | None, where: str) -> int:
    if phase is not None and phase not in names:
        raise UserError(f"{phase!r} is no phase", where="--phase", remedy=f"{where} has {names}")
    return names.index(phase) if phase is not None else 0


def _name(context: Context, stage: str, phase: int) -> str:
    return sorted(context.config[stage]["phases"])[phase]


def _row(console: Console, tokenizer: data.Tokenizer, batch: data.Batch, row: int, title: str) -> None:
    found = roles.segments(batch, row, tokenizer)
    used = int((batch["segment_ids"][row] > 0).sum())
    console.rule(f"{title}, row {row}: {used} of {batch['inputs'].shape[1]} places, {len(found)} segments")
    for number, runs in enumerate(found, 1):
        tokens = sum(run.tokens for run in runs)
        console.print(Text(f"segment {number}, {tokens} tokens", style="dim"))
        text = Text()
        for run in runs:
            text.append(*_shown(run, console.is_terminal))
        console.print(text)


def _shown(run: roles.Run, in_colours: bool) -> tuple[str, str]:
    if in_colours:
        return run.text, f"{_STYLES[run.role]}{'' if run.has_loss else ' strike'}".strip()
    words = run.text if run.role in (Role.TEXT, Role.SENTINEL, Role.END) else f"[{run.role}:{run.text}]"
    return words if run.has_loss else f"{{{words}}}", ""


if __name__ == "__main__":
    main()
