"""What became of a teacher's layers and channels in a student that was pruned from it, once or several times."""

from collections.abc import Mapping, Sequence
from typing import Any


def kept_of(
    records: Sequence[Mapping[str, Any]], student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> tuple[list[int], list[int]] | None:
    """The teacher's layers and channels that the student has, as the teacher counts them; None if it is no ancestor.

    Args:
      records: of the student's prunings, in order (see `transforms.prune.apply`); other steps leave both alone.
      student: its config, as a dict.
      teacher: the teacher's.
    """
    layers, channels = list(range(student["layers"])), list(range(student["model_dim"]))
    sizes = (teacher["layers"], teacher["model_dim"])
    for record in reversed(records):
        if record["config_after"] == teacher:
            return layers, channels
        kept = record["kept"]
        layers, channels = [kept["layers"][i] for i in layers], [kept["embed"][i] for i in channels]
        if record["config_before"] == teacher:
            return layers, channels
    return (layers, channels) if not records and sizes == (student["layers"], student["model_dim"]) else None
