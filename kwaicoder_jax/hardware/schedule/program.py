"""A kernel's schedule as a Python function: what the scalar unit does, block by block, with the cycles that pass.

The function is written as source and compiled, since it runs for as many blocks as the kernel does.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from kwaicoder_jax.hardware.schedule.bundles import Bundle, DumpError
from kwaicoder_jax.hardware.schedule.operations import VARIABLE, Operand, Statement, Translator

_DELAY_SLOTS = 4  # bundles after a branch that are issued before it is taken
# What of the machine the function uses.
_MACHINE = (
    "smem", "store", "operand", "start", "wait", "signal", "signal_remote", "reset", "semaphore", "chosen", "least",
    "most",
    "floating_point",
)  # fmt: skip
_VMATMUL = re.compile(r"= vmatmul\S*?\.mxu(\d)")


@dataclasses.dataclass(frozen=True)
class Block:
    """Bundles that are always issued one after the other.

    Attributes:
      first: place of the first bundle.
      bundles: how many.
      cycles: that they take together.
      vmatmuls: matrix instructions per matrix unit.
    """

    first: int
    bundles: int
    cycles: int
    vmatmuls: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Program:
    """The emulated kernel.

    Attributes:
      blocks: of the schedule.
      allocations: the address that each allocation got.
      operands: by index.
      source: of the function.
      run: the function; its argument is a `machine.Machine`, its result how many times each block was executed.
    """

    blocks: tuple[Block, ...]
    allocations: Mapping[str, int]
    operands: Mapping[int, Operand]
    source: str
    run: Callable[[Any], list[int]]


@dataclasses.dataclass(frozen=True)
class _Line:
    """A statement, and the cycle of its block after its bundle."""

    statement: Statement
    cycle: int


@dataclasses.dataclass(frozen=True)
class _Branch:
    condition: str | None
    target: int  # place of a bundle; behind the last one to leave the kernel


def build(bundles: Sequence[Bundle], cycles: Sequence[int]) -> Program:
    """The program of a kernel.

    Args:
      bundles: all of them.
      cycles: that each takes.

    Raises:
      DumpError: something in it is not known here.
    """
    if len(bundles) != len(cycles):
        raise DumpError(f"{len(bundles)} bundles, but cycles of {len(cycles)}")
    translator = Translator()
    branches = _branches(bundles, translator)
    targets = {place + _DELAY_SLOTS + 1 for place in branches} | {branch.target for branch in branches.values()}
    starts = sorted({0} | {place for place in targets if place < len(bundles)})
    ends = [*starts[1:], len(bundles)]
    blocks = tuple(_block(bundles, cycles, *span) for span in zip(starts, ends, strict=True))
    lines = [_lines(bundles, cycles, translator, *span) for span in zip(starts, ends, strict=True)]
    exits = [_exit(branches, *span) for span in zip(starts, ends, strict=True)]
    conditions = {branch.condition for branch in exits if branch and branch.condition}
    lines, carried = _needed(lines, conditions)
    source = _source(blocks, lines, exits, carried)
    scope: dict[str, Any] = {}
    exec(compile(source, "<schedule>", "exec"), scope)
    return Program(blocks, translator.allocations, translator.operands, source, scope["run"])


def _branches(bundles: Sequence[Bundle], translator: Translator) -> dict[int, _Branch]:
    places = {region: place for place, bundle in reversed(list(enumerate(bundles))) for region in bundle.regions}
    places |= {region: place for place, bundle in enumerate(bundles) for region in bundle.joins}
    found = {}
    for place, bundle in enumerate(bundles):
        for operation in bundle.operations:
            if branch := translator.branch(operation):
                found[place] = _Branch(branch[0], places.get(branch[1], len(bundles)))
    return found


def _exit(branches: Mapping[int, _Branch], start: int, end: int) -> _Branch | None:
    """The branch at the end of a block."""
    inside = [place for place in branches if start <= place < end]
    if len(inside) > 1 or any(place + _DELAY_SLOTS + 1 != end for place in inside):
        raise DumpError("a branch in the delay slots of another, or a target there")
    return branches[inside[0]] if inside else None


def _block(bundles: Sequence[Bundle], cycles: Sequence[int], start: int, end: int) -> Block:
    operations = [operation for bundle in bundles[start:end] for operation in bundle.operations]
    units = [found.group(1) for operation in operations if (found := _VMATMUL.search(operation))]
    return Block(start, end - start, sum(cycles[start:end]), collections.Counter(units))


def _lines(
    bundles: Sequence[Bundle], cycles: Sequence[int], translator: Translator, start: int, end: int
) -> list[_Line]:
    lines, passed = [], 0
    for place in range(start, end):
        passed += cycles[place]
        translated = [translator.statement(each, bundles[place].comment) for each in bundles[place].operations]
        lines += [_Line(each, passed) for each in _in_order([each for each in translated if each])]
    return lines


def _in_order(statements: Sequence[Statement]) -> list[Statement]:
    """Of one bundle: each after those whose results it reads, by stages."""
    setters = {each.target: each for each in statements if each.target}
    ordered: dict[int, Statement] = {}

    def place(statement: Statement) -> None:
        if id(statement) not in ordered:
            for name in statement.reads:
                if setters.get(name, statement) is not statement and not statement.carried:
                    place(setters[name])
            ordered[id(statement)] = statement

    for statement in sorted(statements, key=lambda each: each.stage):
        place(statement)
    return list(ordered.values())


def _needed(lines: list[list[_Line]], conditions: Collection[str]) -> tuple[list[list[_Line]], set[str]]:
    """Without what nothing follows from, such as checks of bounds; and the variables that go through a loop's register."""
    setters: dict[str, list[Statement]] = collections.defaultdict(list)
    for each in (each for block in lines for each in block if each.statement.target):
        setters[each.statement.target or ""].append(each.statement)
    wanted = {name for condition in conditions for name in re.findall(VARIABLE, condition)}
    wanted |= {name for block in lines for each in block if not each.statement.target for name in each.statement.reads}
    open_, carried = list(wanted), set[str]()
    while open_:
        for statement in setters[open_.pop()]:
            if not statement.is_known:
                raise DumpError(f"a scalar operation that is not known here: {statement.source}")
            carried |= set(statement.carried)
            open_ += statement.reads - wanted
            wanted |= statement.reads
    kept = [
        [each for each in block if each.statement.target is None or each.statement.target in wanted] for block in lines
    ]
    return kept, carried


def _source(
    blocks: Sequence[Block], lines: Sequence[Sequence[_Line]], exits: Sequence[_Branch | None], carried: Collection[str]
) -> str:
    written = [[each.statement.line(carried) for each in block] for block in lines]
    conditions = " ".join(branch.condition or "" for branch in exits if branch)
    names = sorted(set(re.findall(VARIABLE + r"|\bregister_[sp]\d+\b", f"{written} {conditions}")))
    head = [
        "def run(machine):",
        *(f"    {name} = machine.{name}" for name in _MACHINE),
        *(f"    {' = '.join(names[place : place + 20])} = machine.unset" for place in range(0, len(names), 20)),
        f"    times = [0] * {len(blocks)}",
        "    block = cycle = 0",
        "    while cycle < machine.longest:",
    ]
    places = {block.first: number for number, block in enumerate(blocks)}
    bodies = []
    for number, (block, its_lines) in enumerate(zip(blocks, lines, strict=True)):
        body = [
            each.statement.line(carried).replace("(now, ", f"(cycle + {each.cycle}, ", each.statement.is_event)
            for each in its_lines
        ]
        body += [f"cycle += {block.cycles}", f"times[{number}] += 1"]
        branch = exits[number]
        onward = f"block = {number + 1}" if number + 1 < len(blocks) else "return times"
        if branch is not None:
            taken = f"block = {places[branch.target]}" if branch.target in places else "return times"
            onward = taken if branch.condition is None else f"if {branch.condition}: {taken}\nelse: {onward}"
        bodies.append([*body, *onward.splitlines()])
    return "\n".join([*head, *_choice(bodies, 0, "        "), "    machine.give_up()"]) + "\n"


def _choice(bodies: Sequence[Sequence[str]], first: int, indent: str) -> list[str]:
    """Finds the block by halving, so that a long program costs little more than a short one."""
    if len(bodies) == 1:
        return [indent + line for line in bodies[0]]
    half = len(bodies) // 2
    return [
        f"{indent}if block < {first + half}:",
        *_choice(bodies[:half], first, indent + "  "),
        f"{indent}else:",
        *_choice(bodies[half:], first + half, indent + "  "),
    ]
