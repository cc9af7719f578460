"""The scalar operations of a bundle as Python statements.

A core's scalar unit decides what the rest of it does: it counts loops, branches, computes addresses, starts copies and waits
for them. So a kernel's time follows from emulating that unit alone; of the vector unit only the number of cycles counts.

A value is a Python int between -2**31 and 2**31, as of a signed 32-bit register, or `Unknown`.
"""

import dataclasses
import math
import re
from collections.abc import Collection

from kwaicoder_jax.hardware.schedule.bundles import DumpError


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of a kernel.

    Attributes:
      index: among its inputs and then its outputs.
      shape: as XLA writes it, "bf16[8,512]".
      kind: "input" or "output".
      space: "hbm", "vmem" or "smem", where XLA put it; empty for a scalar that is passed in a register.
    """

    index: int
    shape: str
    kind: str
    space: str

    @property
    def nbytes(self) -> int:
        """At most so many, however it is tiled."""
        bits, sizes = _parts(r"[a-z]*(\d*)\w*\[([\d,]*)\].*", self.shape)
        dimensions = [1, 1, *(int(each) for each in sizes.split(",") if each)]
        dimensions[-1] += -dimensions[-1] % 1024
        dimensions[-2] += -dimensions[-2] % 32
        return math.prod(dimensions) * max(int(bits or 8), 8) // 8


@dataclasses.dataclass(frozen=True)
class Statement:
    """One operation.

    Attributes:
      target: the variable that it sets, if any.
      source: an expression for the target, or a statement for the effect.
      predicate: it happens only if this expression holds.
      stage: 0 reads a register that a loop carries, 1 computes, 2 stores, copies, signals or waits. In one bundle the
        lower ones come first.
      register: the physical register of the target.
      carried: of stage 0, the variables whose value that register may hold.
      is_event: it needs to know the cycle.
      is_known: whether the operation is one that this package knows.
    """

    target: str | None
    source: str
    predicate: str | None = None
    stage: int = 1
    register: str | None = None
    carried: tuple[str, ...] = ()
    is_event: bool = False
    is_known: bool = True

    @property
    def reads(self) -> frozenset[str]:
        """Variables that it needs."""
        return frozenset((*self.carried, *re.findall(VARIABLE, f"{self.source} {self.predicate or ''}")))

    def line(self, carried: Collection[str]) -> str:
        """As Python, where the variables in `carried` are set in their register too."""
        line = self.source if self.target is None else f"{self.target} = {self.source}"
        if self.target in carried:
            line = f"register_{self.register} = {line}"
        return line if self.predicate is None else f"if {self.predicate}: {line}"


VARIABLE = r"\b(?:[spvt]\d+|ccrf)\b"
_REFERENCE = re.compile(r"(!?)%([spv]?)(\d+)(?:_[spv]\d+)?")
_ASSIGNMENT = re.compile(r"%(?:([a-z]+)(\d+)(?:_([a-z]+\d+))?|(\d+)) = (\S+) ?(.*)$")
_PREDICATE = re.compile(r"\((!?%p\d+(?:_p\d+)?)\),?")
_MASK = "0xFFFFFFFF"

_BINARY = {
    "sadd.s32": "{} + {}", "ssub.s32": "{} - {}", "smul.u32": "{} * {}", "sand.u32": "{} & {}", "sor.u32": "{} | {}",
    "sxor.u32": "{} ^ {}", "sshll.u32": "{} << ({} & 31)", "sshra.s32": "{} >> ({} & 31)",
    "sshrl.u32": f"({{}} & {_MASK}) >> ({{}} & 31)", "smulhi.u32": f"({{}} & {_MASK}) * ({{}} & {_MASK}) >> 32",
    "smin.s32": "least({}, {})", "smax.s32": "most({}, {})",
    "smin.u32": f"least({{}} & {_MASK}, {{}} & {_MASK})", "smax.u32": f"most({{}} & {_MASK}, {{}} & {_MASK})",
}  # fmt: skip
_NEVER_OVERFLOW = {"sand.u32", "sor.u32", "sxor.u32", "sshra.s32", "smin.s32", "smax.s32"}
_PREDICATES = {
    "por": "{} | {}", "pand": "{} & {}", "pxor": "{} ^ {}", "pnor": "True ^ ({} | {})", "pnand": "True ^ ({} & {})",
    "pneg": "True ^ {}", "pmov": "{}",
}  # fmt: skip
_SIGNALS = {"vsyncadd": "signal", "vsyncadd.remote": "signal_remote", "vsyncpa": "reset"}
_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
# Nothing follows from these: fences, traces, and checks of what the kernel's author promised.
_IGNORED = re.compile(r"sfence|shalt\.err|strace|sdelay|sbr\.rel|vtrace|vdelay|compiler-scheduling-barrier")
_FLOATS = re.compile(r"scvt\.|s\w+\.f32|scmp\.\w+\.f32")


class Translator:
    """Translates the operations of one kernel, in the order of its text."""

    def __init__(self) -> None:
        self.allocations: dict[str, int] = {}
        self.operands: dict[int, Operand] = {}
        self._popped: dict[str, int] = {}  # results that were taken of each division so far
        self._spaces: dict[str, str] = {}  # of pointers

    def statement(self, operation: str, comment: str) -> Statement | None:
        """Of one operation; None if nothing follows from it. DumpError if it is not known.

        Args:
          operation: as in a bundle.
          comment: the bundle's comments.
        """
        found = _ASSIGNMENT.match(operation)
        if found is None:
            raise DumpError(f"no operation is written like this: {operation[:200]}")
        kind, number, register, anonymous, name, rest = found.groups()
        if _IGNORED.match(name):
            return None
        target = f"{kind}{number}" if kind else f"t{anonymous}"
        if pointer := re.fullmatch(r"(?:int_to_ptr|scalar_lea)\.(\w+)", name):
            self._spaces[target] = pointer.group(1)
        rest = re.sub(r"\[(?:thread|resolvable):\S+\]", "", rest)
        predicate = _PREDICATE.search(rest)
        if predicate:
            rest = rest.replace(predicate.group(0), "", 1)
        made = self._memory(target, name, rest, comment) or self._synchronisation(target, name, rest)
        if made is None and name.startswith("v"):
            return None  # the vector unit's
        made = made or self._arithmetic(target, name, _arguments(rest), operation)
        condition = self._value(predicate.group(1)) if predicate else None
        return dataclasses.replace(made, predicate=condition, register=register if made.target else None)

    def branch(self, operation: str) -> tuple[str | None, str] | None:
        """The condition and the region that a branch goes to; None if the operation is no branch."""
        found = re.search(r" = sbr\.rel (?:\((!?%p\d+(?:_p\d+)?)\) )?target = \$region(\d+)", operation)
        if found is None:
            if re.search(r" = (sbr|scall)", operation):
                raise DumpError(f"a branch that is not known here: {operation[:200]}")
            return None
        return self._value(found.group(1)) if found.group(1) else None, found.group(2)

    def _memory(self, target: str, name: str, rest: str, comment: str) -> Statement | None:
        if name == "sld":
            (place,) = _parts(r"\[smem:(.*)\]", rest)
            return Statement(target, f"smem[{self._value(place)}]")
        if name == "sst":
            place, value = _parts(r"\[smem:(.*\]?)\]\s+(\S+|\[.*\])", rest)
            return Statement(None, f"store({self._value(place)}, {self._value(value)})", stage=2)
        if name.startswith("inlined_call_operand"):
            return self._operand(target, name.removeprefix("inlined_call_operand."), rest)
        if name.startswith("dma.done.wait"):
            flag, amount = _arguments(rest)[:2]
            return Statement(None, f"wait(now, {self._value(flag)}, {self._value(amount)})", stage=2, is_event=True)
        if name.startswith("dma."):
            copy = name.removeprefix("dma.")
            if copy == "general":
                ends = [self._spaces.get(self._value(each), "?") for each in _arguments(rest)[:3:2]]
                told = re.findall(r"\b\w+-to-\w+\b", comment)
                copy = told[0].replace("-", "_") if told else "_to_".join(ends)
            if re.fullmatch(r"(hbm|vmem|smem)_to_(hbm|vmem|smem)", copy) is None:
                raise DumpError(f"a copy that is not known here: {name} {rest[:200]}")
            values = ", ".join(self._value(each) for each in _arguments(rest)[:4])  # from, granules, to, semaphore
            return Statement(None, f"start(now, {copy!r}, {values})", stage=2, is_event=True)
        return None

    def _operand(self, target: str, space: str, rest: str) -> Statement:
        shape, index, kind = _parts(r".*shape: (.*?), index: (\d+), kind: (\w+).*", rest)
        if space not in ("<no", "hbm", "vmem", "smem"):
            raise DumpError(f"an operand in {space}, which is not known here")
        self.operands[int(index)] = Operand(int(index), shape, kind, "" if space == "<no" else space)
        return Statement(target, f"operand({index})")

    def _synchronisation(self, target: str, name: str, rest: str) -> Statement | None:
        if name == "vsyncmov":
            return Statement(target, f"semaphore({self._value(rest)})")
        if name == "vpop.sfrf":
            return Statement(target, self._value(rest))
        if name in _SIGNALS or name.startswith("vwait.ge"):
            flag, amount = (self._value(each) for each in _arguments(rest))
            call = _SIGNALS.get(name, "wait")
            return Statement(None, f"{call}(now, {flag}, {amount})", stage=2, is_event=True)
        if name.startswith(("vsync", "vwait")):
            raise DumpError(f"a synchronisation that is not known here: {name} {rest[:200]}")
        # A constant goes through the vector unit where the two cores of a chip compare their places in the program.
        if name == "vmov" and re.fullmatch(r"\d+", rest.strip()):
            return Statement(target, self._value(rest))
        if name in ("vpush.ccrf", "vpush"):
            return Statement("ccrf" if name == "vpush.ccrf" else target, self._value(rest))
        return Statement(target, "ccrf") if name == "vpop.ccrf" else None

    def _arithmetic(self, target: str, name: str, arguments: list[str], operation: str) -> Statement:
        if name in ("sphi", "pphi"):
            return self._carried(target, arguments, operation)
        if name in ("smov", "scalar_select") and len(arguments) > 1:
            if len(arguments) == 3:  # scalar_select %p, %then, %otherwise
                condition, chosen, otherwise = arguments
            else:  # smov (%p, %otherwise), %then
                condition, otherwise = arguments[0].strip("()").split(",")
                chosen = arguments[1]
            yes, no, either = (self._value(each) for each in (chosen, otherwise, condition))
            return Statement(target, f"chosen({either}, {yes}, {no})")
        if name == "sdivrem.u32":
            left, right = (self._value(each) for each in arguments)
            return Statement(target, f"divmod({left} & {_MASK}, {right} & {_MASK})")
        if name == "spop.drf":
            pair = self._value(arguments[0])
            self._popped[pair] = self._popped.get(pair, -1) + 1
            return Statement(target, f"{pair}[{self._popped[pair]}]")
        if name in ("smov", "spop") or name.startswith("int_to_ptr"):
            return Statement(target, self._value(arguments[0]))
        if name.startswith("scalar_lea"):
            base, offset = (self._value(each) for each in arguments)
            return Statement(target, f"{base} + {offset}")
        if _FLOATS.match(name):
            return Statement(target, "floating_point")
        values = [self._value(each) for each in arguments]
        if name.startswith("scmp."):
            _, comparison, kind, _ = name.split(".")
            left, right = (f"({each} & {_MASK})" if kind == "u32" else each for each in values)
            return Statement(target, f"{left} {_COMPARISONS[comparison]} {right}")
        if name in _PREDICATES:
            return Statement(target, _PREDICATES[name].format(*values))
        if name in _BINARY:
            expression = _BINARY[name].format(*values)
            if name not in _NEVER_OVERFLOW:
                expression = f"(({expression}) + 0x80000000 & {_MASK}) - 0x80000000"
            return Statement(target, expression)
        if target.startswith("t"):
            raise DumpError(f"an operation that is not known here: {operation[:200]}")
        return Statement(target, repr(operation), is_known=False)

    def _carried(self, target: str, arguments: list[str], operation: str) -> Statement:
        """A value that depends on where the core came from: all of them are kept in the register that it is read from."""
        registers = {each.rpartition("_")[2] for each in arguments}
        if len(registers) != 1 or not re.fullmatch(rf"%{target}_{min(registers)}", operation.split()[0]):
            raise DumpError(f"a value that is carried in several registers: {operation[:200]}")
        return Statement(target, f"register_{min(registers)}", stage=0, carried=tuple(map(self._value, arguments)))

    def _value(self, text: str) -> str:
        """An operand as an expression: a register, a number, an address."""
        text = text.strip()
        if found := _REFERENCE.fullmatch(text):
            negated, kind, number = found.groups()
            variable = f"{kind or 't'}{number}"
            return f"(True ^ {variable})" if negated else variable
        if re.fullmatch(r"\$?-?(?:0x[0-9a-f]+|\d+)", text):
            number = int(text.lstrip("$"), 0)
            return str((number + (1 << 31)) % (1 << 32) - (1 << 31))
        if text.startswith("#"):
            return f"{self._address(text[1:]):#x}"
        if text.startswith("[") and text.endswith("]"):
            terms = [self._value(each) for each in text[1:-1].split("+")]
            return terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"
        raise DumpError(f"an operand that is not known here: {text[:200]}")

    def _address(self, name: str) -> int:
        """Of an allocation. Its place is not printed, and only has to differ from the others' and from the operands'."""
        return self.allocations.setdefault(name, (len(self.allocations) << 18) + (1 << 20))


def _parts(pattern: str, text: str) -> tuple[str, ...]:
    found = re.fullmatch(pattern, text.strip())
    if found is None:
        raise DumpError(f"operands that are not known here: {text[:200]}")
    return found.groups()


def _arguments(text: str) -> list[str]:
    """Split at commas outside of brackets, without the allocation that an address is said to be in."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    return [re.sub(r"(?<=\w)\s+\[#\w+\]$", "", each.strip()) for each in parts]
