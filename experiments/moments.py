"""Adam's moments and the data position from stage to stage, so that training can go on instead of starting over.

STAGE/moments/first, STAGE/moments/second    checkpoints laid out as the stage's parameters; the count is in their meta
"""

from typing import Any

from experiments.contract import Context
from kwaicoder_jax import checkpoints, transforms
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import optimizer_state

FOLDERS = ("first", "second")
_PLACES = ("opt_state/1/mu/model/", "opt_state/1/nu/model/")  # behind clipping, in training.make_optimizer's chain
_COUNT = "opt_state/1/count"


def check(context: Context) -> checkpoints.Tensors:
    """The optimizer state of `upcycle.init_from`; UserError if it has none."""
    try:
        return checkpoints.open_tensors(context.inputs["init_from"], "train")
    except UserError as error:
        raise UserError(
            "its source has no optimizer state", where="upcycle.optimizer_state",
            remedy="start from a stage that trains, or set it to False",
        ) from error  # fmt: skip


def upcycle(context: Context, record: dict[str, Any], meta: dict[str, Any]) -> None:
    """Writes upcycle/moments from the optimizer state of `upcycle.init_from`, a layer of a parameter at a time."""
    stored = check(context)
    meta = {**meta, "adam_count": int(stored[_COUNT].read())}
    choice = context.section["second_moment"]
    for order, (folder, place) in enumerate(zip(FOLDERS, _PLACES)):
        transforms.streaming.run(
            optimizer_state.Moment(order, choice), stored.below(place), context.folder / "moments" / folder / "checkpoints",
            record, meta=meta,
        )  # fmt: skip


def check_carried(place: Any) -> None:
    """UserError if a stage's folder holds no moments."""
    if not (place / "moments").exists():
        what, remedy = f"{place} holds no moments", "upcycle with upcycle.optimizer_state=True, or set it to False"
        raise UserError(what, where="cpt.continue_optimizer", remedy=remedy)


def read(place: Any, abstract: Any) -> tuple[Any, Any, int]:
    """m, v and the step count that a stage's folder holds, in the shapes and shardings of `abstract`."""
    first, second = (checkpoints.read_params(place / "moments" / folder, abstract) for folder in FOLDERS)
    return first, second, checkpoints.read_meta(place / "moments" / FOLDERS[0])["adam_count"]


def data_position(meta: dict[str, Any]) -> dict[str, Any]:
    """The part of a transformed checkpoint's description that says how far training data was read; empty if unknown."""
    position = meta.get("loader") or meta.get("data_position")
    return {"data_position": position} if position else {}
