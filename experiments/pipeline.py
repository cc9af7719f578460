"""Runs the stages that a config lists, in order; what is finished is kept, what was interrupted goes on.

python -m experiments.pipeline --config=configs/demo.py --workdir=runs/demo
"""

import importlib
from typing import Any

from absl import flags

from experiments import command
from experiments.contract import Stage
from experiments.contract import run as run_stage
from experiments.display import Display
from experiments.peers import Alone
from experiments.stopping import Stop
from kwaicoder_jax import files
from kwaicoder_jax.errors import UserError

STAGES = (
    "import_hf", "prepare_data", "pretrain", "correct_teacher", "prune", "cache_teacher", "distill", "upcycle", "cpt",
    "export_hf", "evaluate", "report",
)  # fmt: skip


def agree(peers: Alone, config: dict[str, Any]) -> None:
    """UserError for a process that was started with another recipe than the first one."""
    digest = files.digest(repr(config))
    if peers.leads:
        peers.tell("recipe", digest)
    elif peers.hear("recipe") != digest:
        what = f"process {peers.index} has another config than process 0"
        raise UserError(what, where="--config", remedy="start all processes with the same config")


def main() -> None:
    """The body of the command."""
    holder = command.define_flags()
    flags.DEFINE_string("restart_from", None, "Start this stage and all that follow it over.")

    def work(stop: Stop, display: Display) -> None:
        config = holder.value
        stages = command.context_of(Stage("pipeline", lambda context: {}), config, stop, display).config["stages"]
        if not isinstance(stages, tuple | list) or not stages or not all(isinstance(name, str) for name in stages):
            raise UserError("is no list of stages", where="stages", remedy=f"choose from {', '.join(STAGES)}")
        unknown = [name for name in stages if name not in STAGES]
        if unknown:
            raise UserError(f"no stage {unknown[0]!r}", where="stages", remedy=f"choose from {', '.join(STAGES)}")
        again = flags.FLAGS.restart_from
        if again is not None and again not in stages:
            remedy = f"the stages are {', '.join(stages)}"
            raise UserError(f"no stage {again!r} in this recipe", where="--restart_from", remedy=remedy)
        restart = flags.FLAGS.restart
        if restart and again is not None:
            remedy = "use one of the two: --restart starts every stage over"
            raise UserError("does not go with --restart", where="--restart_from", remedy=remedy)
        with command.together(stop, display) as watch:
            agree(watch.peers, config.to_dict())
            for name in stages:
                stage = importlib.import_module(f"experiments.{name}").STAGE
                restart = restart or name == again
                run_stage(command.context_of(stage, config, stop, display, watch), restart=restart)

    command.execute(work)


if __name__ == "__main__":
    main()
