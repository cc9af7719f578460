"""Reads the compiler's dump of a kernel: its VLIW bundles, how many cycles each takes, and its allocations.

The text is libtpu's own and private to it. Everything here was written for LIBTPU_VERSION, and fails where a dump does not
look as that version writes it.
"""

import dataclasses
import operator
import re
from collections.abc import Sequence

LIBTPU_VERSION = "0.0.42"


class DumpError(ValueError):
    """A dump that is not written as this package knows it."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One VLIW instruction: the operations that a core issues together.

    Attributes:
      address: in the kernel.
      operations: as written, without comments.
      regions: numbers of the regions that begin here; a branch names one as its target.
      joins: of these the empty ones, which are where a branch rejoins.
      comment: the comments, where the compiler says what a copy is.
    """

    address: int
    operations: tuple[str, ...]
    regions: tuple[str, ...]
    joins: tuple[str, ...]
    comment: str


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Memory of a kernel.

    Attributes:
      name: as operations refer to it, "allocation3".
      space: "vmem", "smem" or "sflag" (semaphores).
      nbytes: size.
      is_scoped: it is the kernel's own, not a fixed address of the chip.
      tag: what it is for.
    """

    name: str
    space: str
    nbytes: int
    is_scoped: bool
    tag: str


_HEADER = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s+(?:>\s*)*\{", re.M)
_ALLOCATION = re.compile(r"^\s*#(allocation\w+) \[shape = .*?, space=(\w+), size = (0x[0-9a-f]+|\d+)(.*)$", re.M)


def parse_bundles(text: str) -> tuple[Bundle, ...]:
    """The bundles of a "final_bundles" dump, in order of address; DumpError if it is none."""
    headers = list(_HEADER.finditer(text))
    if not headers:
        raise DumpError("the dump has no bundles")
    ends = [header.start() for header in headers[1:]] + [len(text)]
    bundles = []
    for header, end in zip(headers, ends, strict=True):
        written = text[header.end() : end]
        body, comment = _split_comments(written)
        operations = body[: body.rindex("}")].split(";;")
        joins = tuple(re.findall(r"Start/End empty region (\d+)", comment))
        bundles.append(
            Bundle(
                int(header.group(1), 16),
                tuple(" ".join(each.split()) for each in operations if each.strip()),
                (*re.findall(r"Start region (\d+)", comment), *joins),
                joins,
                comment,
            )
        )
    return tuple(bundles)


def parse_allocations(text: str) -> tuple[Allocation, ...]:
    """The allocations of a "pre-finalize-registers-and-allocations" dump."""
    found = []
    for name, space, size, rest in _ALLOCATION.findall(text):
        tag = re.search(r"tag = '(.*?)'", rest)
        found.append(Allocation(name, space, int(size, 0), ", scoped" in rest, tag.group(1) if tag else ""))
    return tuple(found)


def _split_comments(text: str) -> tuple[str, str]:
    """What stands outside of comments, and the comments. They nest."""
    outside: list[str] = []
    inside: list[str] = []
    depth = 0
    for part in re.split(r"(/\*|\*/)", text):
        if part == "/*":
            depth += 1
        elif part == "*/" and depth:
            depth -= 1
        else:
            (inside if depth else outside).append(part)
    return "".join(outside), " ".join(inside)


def cycles_of_bundles(before: str, after: str) -> tuple[int, ...]:
    """Cycles that each of the final bundles takes.

    Bundles with nothing to do, which wait for results of earlier ones, become a delay in the bundle before them in the last
    pass, and the dump does not print it. But two tables of how much of each unit a bundle uses show it, of before that pass
    and of after it: in the first a delay is a run of rows of zeros. The pass also joins some bundles, of which each uses
    other units; the joint bundle then takes as long as both.

    Args:
      before: the "pre-delay" table.
      after: the "final" table.

    Returns:
      One number per final bundle, 1 where there is no delay. Together they are the rows of the first table.
    """
    scheduled, place = _rows(before), 0
    cycles: list[int] = []
    idle = 0
    for row in [*_rows(after), None]:
        if row is not None and not any(row):
            idle += 1
            continue
        waited = next((each for each, used in enumerate(scheduled[place:]) if any(used)), len(scheduled) - place)
        if waited < idle:
            raise DumpError("there are more idle bundles after the delays than before them")
        delayed = max(len(cycles) - (idle == 0), 0)  # the first idle bundle, or else the one before
        place += waited
        joined = _joined(scheduled[place:], row) if row else 0
        cycles += [1] * idle + [joined] * (row is not None)
        cycles[delayed] += waited - idle
        place, idle = place + joined, 0
    return tuple(cycles)


def _rows(table: str) -> list[tuple[int, ...]]:
    """What each bundle uses.

    The first two columns are left out: how many matrix and cross-lane units are still occupied. The last pass counts it anew.
    """
    if "UTILIZATION:" not in table:
        raise DumpError("the dump has no table of utilisation")
    return [tuple(map(int, line.split()[2:])) for line in table.split("UTILIZATION:")[1].strip().splitlines()]


def _joined(scheduled: Sequence[tuple[int, ...]], row: tuple[int, ...]) -> int:
    """How many of the scheduled rows are together this one."""
    total = (0,) * len(row)
    for count, each in enumerate(scheduled, 1):
        total = tuple(map(operator.add, total, each))
        if total == row:
            return count
        if any(map(operator.gt, total, row)):
            break
    raise DumpError("the tables of before and after the delays do not fit together")
