"""From a command line to a stage: flags, one-line errors, exit statuses.

Exit status: 0 done, or stopped by a signal with everything saved (`--preempt_exit_code` chooses another);
2 bad input, in one line; 3 no step ended in time, or a peer of several processes was lost; 130 a tool that answers on
the terminal was interrupted (Ctrl-C); 1 a defect of this program, with its traceback.
"""

import contextlib
import errno
import importlib.util
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.contract import Context, Section, Stage
from experiments.contract import run as run_contract
from experiments.display import Display
from experiments.peers import LOST, PeerLeft, end, joined
from experiments.stopping import Stop, Stopped
from experiments.watching import Watch
from kwaicoder_jax import files
from kwaicoder_jax.errors import UserError

DISK_ERRORS = (
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
)


def define_flags() -> Any:
    """Defines the flags of every stage command; returns the holder of the config."""
    flags.DEFINE_string("workdir", None, "Folder of the whole recipe; each stage has a folder in it.")
    flags.DEFINE_bool("restart", False, "Start the stage over: what it wrote is deleted.")
    flags.DEFINE_integer("preempt_exit_code", 0, "Exit status after SIGTERM, when everything is saved.")
    flags.DEFINE_string("coordinator", None, "Of several processes that run a recipe together: host:port of process 0.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_bool("distributed", False, "Find the others by what a TPU pod, Slurm or Kubernetes says.")
    flags.DEFINE_integer("join_seconds", 300, "How long to wait for the others at the start.")
    flags.DEFINE_integer("peer_seconds", 60, "How long another process may give no sign of life.", lower_bound=2)
    flags.DEFINE_float("watchdog_seconds", 3600.0, "How long a training step may take; 0 for ever.", lower_bound=0.0)
    flags.DEFINE_string("profile_steps", None, "FIRST:LAST training step to profile, into STAGE/profile.")
    return config_flags.DEFINE_config_file(
        "config", None, "Recipe, as in configs/demo.py; --config.field=value, None for no value.",
        sys_argv=_split_nones(sys.argv)[0],
    )  # fmt: skip


def main(stage: Stage) -> None:
    """The body of a stage command."""
    holder = define_flags()

    def work(stop: Stop, display: Display) -> None:
        with together(stop, display) as watch:
            run_contract(context_of(stage, holder.value, stop, display, watch), restart=_flag("restart"))

    execute(work)


@contextlib.contextmanager
def together(stop: Stop, display: Display) -> Iterator[Watch]:
    """Inside, this process and those that the flags name are one run, watched over."""
    names = ("coordinator", "num_processes", "process_id", "distributed", "join_seconds", "peer_seconds")
    with joined({name: _flag(name) for name in names}, stop) as peers:
        display.console.quiet = not peers.leads
        watch = Watch(_flag("watchdog_seconds"), _flag("peer_seconds"))
        watch.stop_status = _flag("preempt_exit_code")
        with watch.over(peers):
            yield watch


def execute(
    work: Callable[[Stop, Display], Any],
    required: tuple[str, ...] = ("config", "workdir"),
    *,
    resumable: bool = True,
) -> None:
    """Parses the flags, does `work`, and exits with the status that the module's docstring gives.

    Args:
      work: what the command does.
      required: the flags that it cannot do without.
      resumable: the same command goes on where it was stopped; else it ends without a word, Ctrl-C with status 130.
    """
    stop, display = Stop(), Display()
    stop.install()
    threading.excepthook = _thread_failed
    if resumable:
        stop.watch(lambda: _end_stopped(display, stop))
    try:
        parse(sys.argv, required)
        work(stop, display)
    except Stopped:
        if not resumable:
            sys.exit(stopped_status(stop))
        _say_stopped(display)
        _exit(_flag("preempt_exit_code"), stop)
    except UserError as error:
        _fail(str(error), stop)
    except PeerLeft as error:
        _fail(error.text, stop, error.status)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        text = f"{error.filename or 'the work folder'}: {error.strerror}; choose a place that can be written"
        print("error: " + " ".join(text.split()), file=sys.stderr)
        end(2)  # libraries would fail once more as they close their files
    except Exception:
        if stop.leave is None:
            raise
        traceback.print_exc()
        end(LOST)


def _thread_failed(failure: Any) -> None:
    """What a thread of a library (TensorBoard's events) cannot write on a full disk, the main thread tells in one line."""
    if not (isinstance(failure.exc_value, OSError) and failure.exc_value.errno in DISK_ERRORS):
        threading.__excepthook__(failure)


def _say_stopped(display: Display) -> None:
    again = "the same command without --restart" if _restarts() else "the same command"
    display.line(f"stopped; {again} goes on from here")


def _end_stopped(display: Display, stop: Stop) -> None:
    """Ends at once; maybe before the flags are parsed."""
    _say_stopped(display)
    if stop.leave is not None:
        stop.leave()
    end(_flag("preempt_exit_code") if flags.FLAGS.is_parsed() else 0)


def _exit(status: int, stop: Stop) -> None:
    """Ends with a status; one of several processes at once, since leaving in order waits for the others."""
    if stop.leave is not None:
        end(status)
    sys.exit(status)


def stopped_status(stop: Stop) -> int:
    """The exit status of a tool that was stopped and has nothing to go on with."""
    return 130 if stop.number == signal.SIGINT else _flag("preempt_exit_code")


def _restarts() -> bool:
    return any(word.startswith(("--restart", "-restart")) for word in sys.argv)


def _flag(name: str) -> Any:
    return flags.FLAGS[name].value


def _fail(text: str, stop: Stop, status: int = 2) -> None:
    print("error: " + " ".join(text.split()), file=sys.stderr)
    _exit(status, stop)


def context_of(stage: Stage, config: ConfigDict, stop: Stop, display: Display, watch: Watch | None = None) -> Context:
    """A stage's context from the parsed flags."""
    workdir = files.absolute(_flag("workdir"))
    values = Section(_lists(config.to_dict()))
    return Context(stage, values, workdir, display, stop, watch or Watch(), _profile_steps())


def _profile_steps() -> tuple[int, int] | None:
    given = _flag("profile_steps")
    if given is None:
        return None
    first, _, last = given.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise UserError(
            f"{given!r} is no range of steps", where="--profile_steps", remedy="as in --profile_steps=10:12"
        )
    return int(first), int(last)


def _lists(value: Any) -> Any:
    """Reads `--config.stages=a,b` as two names: the flags give a tuple with one string."""
    if isinstance(value, dict):
        return {key: _lists(each) for key, each in value.items()}
    if isinstance(value, tuple | list) and len(value) == 1 and isinstance(value[0], str):
        return tuple(value[0].split(","))
    return value


def tool_context(
    stage: Stage, config: ConfigDict | None, defaults: Mapping[str, Any], given: Mapping[str, Any], stop: Stop,
    display: Display,
) -> Context:  # fmt: skip
    """The context of a tool: a stage that needs no config, and whose fields are flags as well.

    Args:
      stage: the tool.
      config: the recipe, if there is one.
      defaults: of the fields of the tool's section.
      given: those that flags name; None for a flag that was not given.
      stop: as for any stage.
      display: as for any stage.
    """
    values = tool_config(stage.name, config, defaults, given)
    return Context(stage, values, tool_workdir(), display, stop)


def tool_config(
    name: str, config: ConfigDict | None, defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The recipe with a tool's section filled in; see `tool_context`."""
    values = {"seed": 0, "stages": (), **(_lists(config.to_dict()) if config is not None else {})}
    section = dict(defaults) | values.get(name, {})
    values[name] = section | {field: value for field, value in given.items() if value is not None}
    return Section(values)


def tool_workdir() -> Any:
    """The work folder, or None."""
    return files.absolute(_flag("workdir")) if _flag("workdir") else None


def parse(argv: list[str], required: tuple[str, ...] = ("config", "workdir")) -> None:
    """Parses absl flags and config overrides; whatever is wrong with them becomes one UserError."""
    if {"--help", "-h", "--helpfull"} & set(argv):
        shown = [flags.FLAGS.module_help(name) for name in ("__main__", "experiments.command")]
        print(sys.modules["__main__"].__doc__, *filter(None, shown), sep="\n")
        sys.exit(0)
    words, nones = _split_nones(argv)
    try:
        rest = flags.FLAGS(words)
        if (config := flags.FLAGS["config"].value) is not None:
            config.to_dict()  # a config file that cannot be loaded says so only here
            for name in nones:
                _set_none(config, name)
    except Exception as error:  # a config file is a program: anything can come out of it
        raise UserError(*_explain(argv, error)) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag", remedy="flags look like --config=FILE")
    for name in required:
        if not flags.FLAGS[name].value:
            raise UserError(
                "is required", where=f"--{name}", remedy="as in --config=configs/demo.py --workdir=runs/demo"
            )


def _split_nones(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line without `--config.field=None`, which ml_collections takes for a value; and these fields.

    Of several values for one field the last one counts. `--config.field None` is the same.
    """
    for at in range(len(argv) - 2, -1, -1):
        if argv[at].startswith("--config.") and "=" not in argv[at] and argv[at + 1] == "None":
            argv = [*argv[:at], f"{argv[at]}=None", *argv[at + 2 :]]
    last = {word.partition("=")[0].lstrip("-"): at for at, word in enumerate(argv)}
    nones = {name for name, at in last.items() if name.startswith("config.") and argv[at].endswith("=None")}
    return (
        [word for word in argv if word.partition("=")[0].lstrip("-") not in nones],
        sorted(name.removeprefix("config.") for name in nones),
    )


def _set_none(config: ConfigDict, name: str) -> None:
    *sections, field = name.split(".")
    for part in sections:
        config = config[part]
    if field not in config:
        raise KeyError(name)
    with config.ignore_type():
        config[field] = None


def _explain(argv: list[str], error: Exception) -> tuple[str]:
    """Which flag is wrong, and what would be right."""
    overrides = [each.split("=")[0].removeprefix("--config.") for each in argv if each.startswith("--config.")]
    named = [each.removeprefix("--config=") for each in argv if each.startswith("--config=")]
    if overrides and not named:
        return (f"--config.{overrides[0]} without --config=FILE",)
    if isinstance(error, UserError):
        return (str(error),)
    if named and (config := _load(named[-1])) is not None:
        for name in overrides:
            place: Any = config
            for part in name.split("."):
                if not isinstance(place, ConfigDict) or part not in place:
                    fields = sorted(place) if isinstance(place, ConfigDict) else []
                    return (f"config.{name}: no such field {part!r}; the fields here are {', '.join(fields)}",)
                place = place[part]
    lines = str(error).removeprefix(_LATE).strip().splitlines()
    if len(lines) > 1 and any("Traceback" in line for line in lines):
        lines = lines[-1:]
    known = isinstance(error, flags.Error | OSError)
    return (" ".join(" ".join(lines).split() if known else [f"{type(error).__name__}:", *" ".join(lines).split()]),)


_LATE = (
    "Configuration is not available because of an earlier failure to load: "  # ml_collections says no more than this
)


def _load(named: str) -> ConfigDict | None:
    file, _, argument = named.partition(":")
    try:
        spec = importlib.util.spec_from_file_location("config_to_explain", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.get_config(argument) if argument else module.get_config()
    except Exception:  # the error that is being explained, once more: whoever asks tells that one
        return None
