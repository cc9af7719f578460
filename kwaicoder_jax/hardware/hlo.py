"""Reads the text of a compiled XLA module: computations, instructions, and how often each is executed."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

BYTES: Mapping[str, float] = {
    "pred": 1, "s2": 0.25, "u2": 0.25, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0, "f8e4m3": 1,
    "f8e5m2": 1, "f8e4m3fn": 1, "f8e4m3b11fnuz": 1, "f8e4m3fnuz": 1, "f8e5m2fnuz": 1, "f8e8m0fnu": 1, "f4e2m1fn": 0.5,
}  # fmt: skip

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")
_OFF_CHIP = re.compile(r"S\((?!0\))\d+\)")  # a layout in another memory space than HBM


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a type: dtype, dimensions, and whether it lies in HBM."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True

    @property
    def nbytes(self) -> float:
        """Bytes of the logical shape, without padding to tiles."""
        return math.prod(self.shape) * BYTES[self.dtype]


@functools.lru_cache(maxsize=2**16)
def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type, those of a tuple one after the other."""
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        if dtype in BYTES:
            shape = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
            found.append(Array(dtype, shape, not (layout and _OFF_CHIP.search(layout))))
    return tuple(found)


def nbytes(text: str) -> float:
    """Bytes of a type."""
    return sum(array.nbytes for array in arrays(text))


@dataclasses.dataclass(slots=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without the percent sign.
      op: as in "dot".
      type: of its result.
      operands: names.
      argument: what stands between the parentheses.
      attributes: what stands behind them.
      is_root: whether its computation returns it.
    """

    name: str
    op: str
    type: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        """The first group of a pattern in the attributes, or None."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None

    @property
    def source(self) -> str:
        """Where it comes from in the traced function."""
        return self.attribute(r'op_name="([^"]*)"') or ""


class Computation(dict[str, Instruction]):
    """Instructions by name, in the order in which they are scheduled."""

    def operand_types(self, instruction: Instruction) -> list[str]:
        """Types of an instruction's operands."""
        return [self[name].type for name in instruction.operands if name in self]

    @property
    def root(self) -> Instruction:
        """What the computation returns."""
        return next(instruction for instruction in reversed(self.values()) if instruction.is_root)


@dataclasses.dataclass
class Module:
    """A compiled module.

    Attributes:
      computations: by name.
      entry: name of the one that is run.
      partitions: devices.
    """

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def walk(self) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that is executed outside of fusions, and how often; loops multiplied out.

        Of a conditional every branch is visited as if it were taken. UserErrors are not raised: a loop whose trip
        count cannot be read is taken for one iteration and listed in `unknown_loops`.
        """
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[Computation, Instruction, int]]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield computation, instruction, times
            if instruction.op == "while":
                body = instruction.attribute(r"body=%?([\w.\-]+)")
                assert body is not None
                yield from self._walk(body, times * (self.trip_count(computation, instruction) or 1))
            else:
                for callee in called(instruction):
                    yield from self._walk(callee, times)

    def unknown_loops(self, rare: Sequence[str] = ()) -> list[str]:
        """Names of loops whose trip count cannot be read, but for those in the scopes `rare` of the traced function."""
        return [
            instruction.name
            for computation in self.computations.values()
            for instruction in computation.values()
            if instruction.op == "while"
            and self.trip_count(computation, instruction) is None
            and not any(f"/{scope}/" in instruction.source for scope in rare)
        ]

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop's body runs: as the text says, or from `counter < constant` with a constant start."""
        known = loop.attribute(r'known_trip_count"?[:=]\{"n":"?(\d+)')
        if known:
            return int(known)
        condition = self.computations[loop.attribute(r"condition=%?([\w.\-]+)") or ""]
        inner, root, outer = condition, condition.root, None
        if root.op == "fusion":
            inner, outer = self.computations[root.attribute(r"calls=%?([\w.\-]+)") or ""], root
            root = inner.root
        if root.op != "compare":
            return None
        limit = counter = None
        for name in root.operands:
            place, instruction = inner, inner[name]
            if outer is not None and instruction.op == "parameter":
                place, instruction = condition, condition[outer.operands[int(instruction.argument)]]
            value = _constant(place, instruction)
            if value is not None:
                limit = value
            elif instruction.op == "get-tuple-element":
                counter = int(instruction.attribute(r"index=(\d+)") or 0)
        if limit is None or counter is None:
            return None
        start, state = 0, computation[loop.operands[0]]
        if state.op == "tuple":
            first = _constant(computation, computation[state.operands[counter]])
            start = 0 if first is None else first
        direction = root.attribute(r"direction=(\w+)")
        counts = {"LT": limit - start, "LE": limit - start + 1, "GT": start - limit, "GE": start - limit + 1}
        return counts.get(direction or "", abs(limit - start))


_CALLING = ("call", "async-start", "call-start", "conditional")


def called(instruction: Instruction) -> list[str]:
    """Computations that an instruction runs as they are: not those of a fusion, a reduction or a loop."""
    if instruction.op not in _CALLING:
        return []
    branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
    if branches:
        return re.findall(r"%?([\w.\-]+)", branches)
    two = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
    one = instruction.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
    return two or ([one] if one else [])


def _constant(computation: Computation, instruction: Instruction) -> int | None:
    for _ in range(20):
        if instruction.op == "constant":
            return int(instruction.argument) if re.fullmatch(r"\s*-?\d+\s*", instruction.argument) else None
        if instruction.op not in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
            return None
        instruction = computation[instruction.operands[0]]
    return None


def parse(text: str) -> Module:
    """Reads the text of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current, last = "", None, None
    for line in text.splitlines():
        if current is None:
            found = _COMPUTATION.match(line)
            if found and " = " not in line.split("(")[0]:
                current = computations.setdefault(found.group(2), Computation())
                entry = found.group(2) if found.group(1) else entry
        elif _END.match(line):
            current = last = None
        elif found := _INSTRUCTION.match(line):
            last = _instruction(bool(found.group(1)), found.group(2), found.group(3))
            current[last.name] = last
        elif last is not None:
            last.attributes += " " + line.strip()  # metadata of kernels has newlines
    partitions = re.search(r"num_partitions=(\d+)", text[:200_000])
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def _instruction(is_root: bool, name: str, rest: str) -> Instruction:
    end = _type_end(rest)
    type_, rest = rest[:end], rest[end:].lstrip()
    found = re.match(r"([\w\-]+)\(", rest)
    if found is None:
        return Instruction(name, "?", type_, (), "", rest, is_root)
    end = _closing(rest, found.end() - 1)
    argument, attributes = rest[found.end() : end], rest[end + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", argument))
    return Instruction(name, found.group(1), type_, operands, argument, attributes, is_root)


def _type_end(text: str) -> int:
    if text.startswith("("):
        return _closing(text, 0) + 1
    found = re.match(r"[a-z][a-z0-9]*\[[^\]]*\]", text)
    end = found.end() if found else 0
    return _closing(text, end) + 1 if text[end : end + 1] == "{" else end


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()\[\]{}]", text[start:]):
        depth += 1 if found.group() in "([{" else -1
        if depth == 0:
            return start + found.start()
    return len(text) - 1
