"""What every stage promises: finished work is kept, interrupted work goes on, changed work is noticed.

    WORKDIR/STAGE/stage.json     config and inputs, written first: what the stage's files were made from
    WORKDIR/STAGE/summary.json   results, written last and atomically: the stage is finished

A stage's identity is a digest of its name, its part of the config and the identities of its inputs. It knows nothing
of the place, so a work folder can be moved.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from experiments import fields, sections
from experiments.display import Display
from experiments.fields import Fields
from experiments.stopping import Stop
from experiments.watching import Watch
from kwaicoder_jax import files
from kwaicoder_jax.errors import UserError

DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EFBIG,
)  # nobody's input is at fault: what was written is of use

CHECKPOINTS = ("init_from", "teacher")  # roles of inputs that have to have one
WITH_CHECKPOINT = ("import_hf", "pretrain", "correct_teacher", "prune", "distill", "upcycle", "cpt")  # in their order

BESIDE = ("prepare_data", "import_hf", "correct_teacher", "cache_teacher")  # may be run without being in the recipe


class Section(dict):
    """A part of the config; a field that is not there is a UserError that names it."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        places = {key: f"{where}.{key}" if where else key for key in values}
        super().__init__({key: Section(x, places[key]) if isinstance(x, dict) else x for key, x in values.items()})
        self._where = where

    def __missing__(self, key: str) -> Any:
        raise UserError("is missing", where=f"{self._where}.{key}".lstrip("."), remedy="add it to the config")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of the recipe.

    Attributes:
      name: of the command, the config section and the folder.
      run: does the work and returns the summary.
      sections: config sections beside its own that change its result.
      inputs: names or paths of the stage folders that it reads, given the config.
      other_files: by config field, the paths of files that it reads beside them; their content counts.
      fields: of its section; checked before anything is done.
      places: fields of its section that say where something is: what is there counts (see `contents`), not the place.
      contents: by config field, an identity of what is there.
      together: several processes run it as one; any other stage is the leader's, and the others wait for it.
    """

    name: str
    run: Callable[["Context"], dict[str, Any]]
    sections: tuple[str, ...] = ()
    inputs: Callable[["Context"], Mapping[str, str]] = lambda context: {}
    other_files: Callable[["Context"], Mapping[str, str]] = lambda context: {}
    fields: Fields | None = None
    places: tuple[str, ...] = ()
    contents: Callable[["Context"], Mapping[str, str]] = lambda context: {}
    together: bool = False


@dataclasses.dataclass
class Context:
    """What a stage's `run` is handed.

    Attributes:
      stage: the stage.
      config: the whole recipe as plain dicts.
      workdir: the work folder.
      display: for progress.
      stop: whether the process was asked to stop.
      watch: over this process and its peers.
      profile: first and last training step that the profiler sees.
      inputs: by role (as in "init_from"), the folder of each input.
      own_files: those of `Stage.other_files` that lie in the stage's own folder, by their place in it.
      identity: of this run; goes into its checkpoints.
    """

    stage: Stage
    config: dict[str, Any]
    workdir: Any
    display: Display
    stop: Stop
    watch: Watch = dataclasses.field(default_factory=Watch)
    profile: tuple[int, int] | None = None
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    own_files: list[str] = dataclasses.field(default_factory=list)
    identity: str = ""

    @property
    def folder(self) -> Any:
        """The stage folder."""
        return self.workdir / self.stage.name

    @property
    def section(self) -> dict[str, Any]:
        """The stage's own config section."""
        return self.config[self.stage.name]

    @property
    def seed(self) -> int:
        """The stage's seed, or the recipe's."""
        own = self.section.get("seed")
        return self.config.get("seed", 0) if own is None else own


def previous_checkpoint(context: Context) -> str:
    """What the stage starts from: `STAGE.init_from`, or the stage before it in the recipe that leaves a checkpoint."""
    named = context.section.get("init_from")
    if named:
        return named
    stages = list(context.config["stages"])
    name = context.stage.name
    before = stages[: stages.index(name)] if name in stages else stages
    for candidate in reversed(before):
        if candidate in WITH_CHECKPOINT:
            return candidate
    raise UserError(
        "no stage before it leaves a checkpoint", where=f"{name}.init_from", remedy="name a stage or a folder"
    )


def run(context: Context, *, restart: bool = False) -> dict[str, Any]:
    """Runs the stage unless it is finished; returns its summary."""
    stage, folder = context.stage, context.folder
    if stage.name not in context.config:
        raise UserError(f"the config has no section {stage.name}", where="--config", remedy="add the section")
    if not (context.watch.peers.leads or stage.together):
        return _wait(context)
    _check(context)
    context.display.stage(stage.name)
    record = _record(context)
    context.identity = record["identity"]
    summary_file = folder / "summary.json"
    if not context.watch.peers.leads:
        return _follow(context)
    if not restart:
        _compare(context, record)
        if summary_file.exists():
            summary = files.read_json(summary_file)
            _remove_aside(folder)
            _tell(context, "begin", finished=True)
            _tell(context, "end", finished=True)
            context.display.line(f"finished already, in {summary['seconds']:.0f} s; nothing to do")
            return summary
    with _put_aside(folder, restart), _only_process(folder):
        _bring_along(context)
        files.write_json(folder / "stage.json", record)
        started, began = datetime.datetime.now(datetime.UTC), time.monotonic()
        _reset_peak()
        _tell(context, "begin", finished=False)
        summary = stage.run(context)
        summary |= {
            "stage": stage.name,
            "config_hash": files.digest(record["config"]),
            "git_commit": _git_commit(),
            "started_at": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - began, 3),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        files.write_json(summary_file, summary)
    _tell(context, "end", finished=True)
    context.display.line(f"done in {summary['seconds']:.0f} s, {summary['peak_rss_bytes'] / 1e9:.2f} GB at most")
    return summary


def _tell(context: Context, when: str, *, finished: bool) -> None:
    """Tells the other processes how far the stage is."""
    context.watch.peers.tell(f"{context.stage.name}/{when}", {"identity": context.identity, "finished": finished})


def _wait(context: Context) -> dict[str, Any]:
    """A stage of one process, as the others see it: they wait, however long it takes."""
    context.watch.peers.hear(f"{context.stage.name}/end")
    return files.read_json(context.folder / "summary.json")


def _follow(context: Context) -> dict[str, Any]:
    """The stage as a process runs it that does not lead: the work, and none of the contract's files."""
    peers, name = context.watch.peers, context.stage.name
    begin = peers.hear(f"{name}/begin")
    if begin["identity"] != context.identity:
        what = f"process {peers.index} has another config or other inputs than process 0"
        raise UserError(what, where=name, remedy="start all processes with the same config on the same work folder")
    if not begin["finished"]:
        _reset_peak()
        context.stage.run(context)
        peers.hear(f"{name}/end")
    return files.read_json(context.folder / "summary.json")


def _check(context: Context) -> None:
    """Types and ranges of what the stage reads of the config."""
    stage, config = context.stage, context.config
    recipe = {"seed": config.get("seed", 0), "stages": config.get("stages", ())}
    fields.check(fields.of_class(sections.Recipe), recipe, "")
    if "loader" in stage.sections:
        fields.check(fields.of_class(sections.Loader), config["loader"], "loader")
    if stage.fields is not None:
        fields.check(stage.fields, config[stage.name], stage.name)


def _record(context: Context) -> dict[str, Any]:
    """The stage's part of the config, and the identity of each input."""
    stage = context.stage
    config = {name: context.config[name] for name in (stage.name, *stage.sections) if name in context.config}
    config[stage.name] = {name: x for name, x in config[stage.name].items() if name not in stage.places}
    if "loader" in config:
        config["loader"] = {name: x for name, x in config["loader"].items() if name != "workers"}  # as many as read
    config["seed"] = context.config.get("seed", 0)
    identities, names = {}, {}
    for role, name in stage.inputs(context).items():
        context.inputs[role], identities[role] = _input(context, role, name)
        if context.inputs[role] == context.workdir / name:
            names[role] = name
    for field, place in stage.other_files(context).items():
        identities[field] = _content(context, f"{stage.name}.{field}", place)
    identities |= stage.contents(context)
    config = _plain(config)
    identity = files.digest({"stage": stage.name, "config": config, "inputs": identities})
    return {"stage": stage.name, "config": config, "inputs": identities, "identity": identity, "stages": names}


def _input(context: Context, role: str, name: str) -> tuple[Any, str]:
    """The folder and the identity of one input: a stage of this work folder, or any checkpoint elsewhere."""
    own = context.workdir / name
    where = f"{context.stage.name}.{role}"
    if "/" not in name and name in (*context.config["stages"], *BESIDE):
        if not (own / "stage.json").exists() or not (own / "summary.json").exists():
            raise UserError(f"{name} is not finished in {context.workdir}", where=where, remedy=f"run {name} first")
        if role in CHECKPOINTS and not (own / "checkpoints").exists():
            raise UserError(f"{name} leaves no checkpoint", where=where, remedy="name a stage that does, or a folder")
        if own == context.folder:
            raise UserError("a stage cannot start from itself", where=where, remedy="name another one")
        return own, files.read_json(own / "stage.json")["identity"]
    from kwaicoder_jax import checkpoints  # here, since it imports jax, and finished stages should answer at once

    try:
        meta = checkpoints.read_meta(name)
        step = meta.get("progress", {}).get("step", 0)  # the run may be going on
        return files.path(name), f"{meta['identity']}@{step}"
    except UserError as error:
        raise UserError(error.what, where=where, remedy=error.remedy) from error


def _content(context: Context, where: str, place: str) -> str:
    """Digest of a file that a stage reads; one of an earlier run of the stage itself may stand aside by now."""
    file = files.path(place)
    inside = _inside(context.folder, file)
    if inside is not None:
        context.own_files.append(inside)
        if not file.exists() and (replaced := _aside(context.folder) / inside).exists():
            file = replaced
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{place}: {error.strerror}", where=where, remedy="name a file that can be read") from error


def _inside(folder: Any, file: Any) -> str | None:
    """Where in `folder` the file lies, or None."""
    outer, inner = (str(x) if "://" in str(x) else os.path.realpath(x) for x in (folder, file))
    return inner[len(outer) + 1 :] if inner.startswith(f"{outer}/") else None


def _bring_along(context: Context) -> None:
    """Copies what the stage reads of its own earlier run out of the folder that was put aside."""
    for inside in context.own_files:
        target = context.folder / inside
        if not target.exists():
            files.write_bytes(target, (_aside(context.folder) / inside).read_bytes())


def _compare(context: Context, record: dict[str, Any]) -> None:
    """Refuses to go on with files that were made from another config or another input; names the field."""
    file = context.folder / "stage.json"
    if _is_untouched(context.folder):
        return
    if not file.exists():
        remedy = "restore it, or start the stage over with --restart"
        raise UserError("is missing, so nobody knows what the stage was made from", where=str(file), remedy=remedy)
    old, name = files.read_json(file), context.stage.name
    state = "finished" if (context.folder / "summary.json").exists() else "begun"
    remedy = f"undo the change, use another --workdir, or start the stage over with --restart ({name} was {state})"
    before, after = _flatten(old["config"]), _flatten(record["config"])
    for field in sorted({**before, **after}):
        if before.get(field) != after.get(field):
            change = f"was {before.get(field, 'absent')!r}, is now {after.get(field, 'absent')!r}"
            raise UserError(change, where=field, remedy=remedy)
    for role in sorted({**old["inputs"], **record["inputs"]}):
        if old["inputs"].get(role) != record["inputs"].get(role):
            source = f"its input {record['stages'].get(role, '')}".rstrip()
            raise UserError(f"{source} is not the one it was made from", where=f"{name}.{role}", remedy=remedy)


def check_fresh(workdir: Any, name: str) -> None:
    """UserError if the finished stage was made from another run of a stage than the one that stands in `workdir`."""
    made = files.read_json(workdir / name / "stage.json")
    for role, source in made.get("stages", {}).items():
        file = workdir / source / "stage.json"
        if not file.exists() or files.read_json(file)["identity"] != made["inputs"][role]:
            what = f"{name} was made from another {source} than the one that stands here"
            raise UserError(what, where=f"{name}.{role}", remedy=f"run {name} again, with --restart")


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, each in value.items() for k, v in _flatten(each, f"{name}.{key}" if name else key).items()}


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples become lists, enums their values."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _is_untouched(folder: Any) -> bool:
    """Whether nothing was done in the folder yet, so that nothing is lost when it is made from something else."""
    return not folder.exists() or all(file.name in ("stage.json", ".lock") for file in folder.iterdir())


@contextlib.contextmanager
def _put_aside(folder: Any, restart: bool) -> Iterator[None]:
    """Around the work of a stage: bad input that shows only there leaves the folder as it was.

    With `restart` the old folder stands aside until the new one is finished; a stage that another process is running is
    left alone.
    """
    aside, fresh = _aside(folder), restart or _is_untouched(folder)
    if restart and folder.exists():
        with _only_process(folder):
            if aside.exists() and not (folder / "summary.json").exists():  # restarted before, and not finished since
                folder.rmtree()
            else:
                _remove_aside(folder)
                folder.rename(aside)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise UserError("cannot be made here", where=str(folder), remedy="choose another --workdir") from error
    try:
        yield
    except UserError as error:
        if fresh and not _has_checkpoint(folder) and not _is_of_the_disk(error):
            folder.rmtree()
            if aside.exists():
                aside.rename(folder)
        raise
    _remove_aside(folder)


def _aside(folder: Any) -> Any:
    """Where a stage folder stands while the stage is started over."""
    return folder.parent / f".{folder.name}.replaced"


def _remove_aside(folder: Any) -> None:
    """Removes what a finished run replaces, or what a kill left of it; where nobody may write it stays."""
    with contextlib.suppress(OSError):
        if _aside(folder).exists():
            _aside(folder).rmtree()


def _is_of_the_disk(error: BaseException | None) -> bool:
    """Whether a disk was full, say: no bad input, so the same command goes on from what was written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return True
        error = error.__cause__
    return False


def _has_checkpoint(folder: Any) -> bool:
    place = folder / "checkpoints"
    return place.exists() and any(step.name.isdigit() for step in place.iterdir())


@contextlib.contextmanager
def _only_process(folder: Any) -> Iterator[None]:
    """Holds a lock on the stage folder, where the file system has locks (an object store has none)."""
    if not os.path.isdir(folder):
        yield
        return
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another process is running this stage", where=str(folder)) from None
        yield


def _git_commit() -> str:
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", here, "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _reset_peak() -> None:
    """Starts the kernel's high-water mark of resident memory anew, so that each stage reports its own."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since the stage began, in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
