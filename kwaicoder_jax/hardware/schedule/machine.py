"""The emulated core: scalar memory, semaphores, and a record of its copies."""

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware.schedule.operations import Operand
from kwaicoder_jax.hardware.schedule.unknown import Unknown, chosen, least, most

GRANULE = 32  # bytes that a copy's size is counted in
_VMEM_STEP = 512  # bytes from one address to the next; copies have theirs in granules
_LANES = 128


class EndlessError(ValueError):
    """A kernel that does not end."""


class Event(NamedTuple):
    """What a core did with a semaphore.

    Attributes:
      cycle: of the core, without any stalls.
      kind: "start" of a copy, "wait", "signal", "reset", or "remote": a signal to the core `core`.
      semaphore: its address.
      amount: that it rises by, is waited for, or is set to.
      hbm_bytes: that the copy reads and writes there.
      core: that a remote signal goes to.
    """

    cycle: int
    kind: str
    semaphore: int
    amount: int
    hbm_bytes: int = 0
    core: int = 0


class _Memory(dict[int, Any]):
    def __missing__(self, address: Any) -> Unknown:
        return Unknown("scalar memory that nothing has written: give the values of the operand that it comes from")


class Machine:
    """One core.

    Args:
      operands: of the kernel, by index.
      scalars: values of operands, int32 of any shape, by index.
      hbm_step: bytes from one address in HBM to the next.
      smem: words that are there before the kernel begins, as the core's index, by address.
    """

    longest = 1 << 31  # cycles: more than a second
    unset = Unknown("a register that nothing has set, or what the vector unit computed")
    floating_point = Unknown("a floating-point number")
    chosen = staticmethod(chosen)
    least = staticmethod(least)
    most = staticmethod(most)

    def __init__(
        self, operands: Mapping[int, Operand], scalars: Mapping[int, Any], hbm_step: int, smem: Mapping[int, int]
    ):
        self.smem = _Memory(smem)
        self.events: list[Event] = []
        self.bytes: Counter[tuple[str, int]] = Counter()
        self.copies: Counter[tuple[str, int]] = Counter()
        self._scalars = {index: np.asarray(value) for index, value in scalars.items()}
        self._semaphores: Counter[int] = Counter()
        self._declared = operands
        self._granules: dict[int, int] = {}  # where each operand begins
        self._ends = {"hbm": 16, "vmem": 16, "smem": 16}
        self._steps = {"hbm": hbm_step, "vmem": _VMEM_STEP, "smem": _VMEM_STEP}
        for index, each in operands.items():
            if each.space:
                self._granules[index] = self._ends[each.space]
                self._ends[each.space] += each.nbytes // _VMEM_STEP * (_VMEM_STEP // GRANULE) + 16
            if each.space == "smem":
                self._write(self.operand(index), index, 0, each.nbytes // 4)

    def operand(self, index: int) -> Any:
        """The value of a scalar, or the address of an array."""
        described = self._declared[index]
        if described.space:
            return self._granules[index] * GRANULE // self._steps[described.space]
        if index not in self._scalars:
            return Unknown(f"operand {index}, {described.shape}: give its value in `scalars`")
        return int(self._scalars[index].item())

    def give_up(self) -> NoReturn:
        """The kernel does not end."""
        raise EndlessError(f"the kernel goes on for more than {self.longest} cycles: one of its loops does not end")

    def store(self, address: Any, value: Any) -> None:
        """Writes a word of scalar memory."""
        self.smem[operator.index(address)] = value

    def start(self, cycle: int, kind: str, source: Any, granules: Any, target: Any, semaphore: Any) -> None:
        """Starts a copy; addresses are in granules, but of scalar memory in words."""
        size = operator.index(granules)
        origin, destination = kind.split("_to_")
        index = self._operand_at("hbm", target) if destination == "hbm" else self._operand_at(origin, source)
        self.bytes[kind, index] += size * GRANULE
        self.copies[kind, index] += 1
        if destination == "smem":
            offset = source - self._granules[index] if index >= 0 else 0
            self._write(operator.index(target), index, offset * GRANULE // 4, size * GRANULE // 4)
        traffic = size * GRANULE * ((origin == "hbm") + (destination == "hbm"))
        self._semaphores[operator.index(semaphore)] += size
        self.events.append(Event(cycle, "start", semaphore, size, traffic))

    def wait(self, cycle: int, semaphore: Any, amount: Any) -> None:
        """Waits until a semaphore has risen so far."""
        self.events.append(Event(cycle, "wait", operator.index(semaphore), operator.index(amount)))

    def signal(self, cycle: int, semaphore: Any, amount: Any) -> None:
        """Adds to a semaphore."""
        self._semaphores[operator.index(semaphore)] += operator.index(amount)
        self.events.append(Event(cycle, "signal", semaphore, amount))

    def signal_remote(self, cycle: int, address: Any, amount: Any) -> None:
        """Adds to a semaphore of a core of this chip, whose number is a part of the address."""
        core, semaphore = operator.index(address) >> 14 & 1, address & ~(0x7 << 14)
        self.events.append(Event(cycle, "remote", semaphore, operator.index(amount), core=core))

    def reset(self, cycle: int, semaphore: Any, amount: Any) -> None:
        """Sets a semaphore."""
        self._semaphores[operator.index(semaphore)] = operator.index(amount)
        self.events.append(Event(cycle, "reset", semaphore, amount))

    def semaphore(self, semaphore: Any) -> int:
        """What it stands at once all copies that this core started have ended."""
        return self._semaphores[operator.index(semaphore)]

    def _operand_at(self, space: str, granule: Any) -> int:
        """The operand there; -1 for memory of the kernel's own, or if the address is not known."""
        if isinstance(granule, Unknown) or granule & 0xFFFFFFFF >= self._ends[space]:
            return -1
        below = [each for each, start in self._granules.items() if start <= granule & 0xFFFFFFFF]
        return max(
            (each for each in below if self._declared[each].space == space), key=self._granules.__getitem__, default=-1
        )

    def _write(self, address: int, index: int, offset: int, words: int) -> None:
        """Words of an operand to scalar memory; forgets what was there where they are not known."""
        for place in range(address, address + words):
            self.smem.pop(place, None)
        if index in self._scalars:
            values = _padded_words(self._scalars[index], self._declared[index])[offset : offset + words]
            self.smem.update(enumerate(values, address))


def _padded_words(values: np.ndarray, operand: Operand) -> list[int]:
    """As an array of int32 lies in memory: rows of 128 words."""
    if not operand.shape.startswith(("s32", "u32")):
        raise UserError(
            f"operand {operand.index} is {operand.shape}", where="scalars", remedy="32-bit integers can be given"
        )
    if values.ndim > 1:
        if values.shape[-1] > _LANES:
            raise UserError(
                f"{values.shape}", where="scalars", remedy=f"one dimension, or a last one of at most {_LANES}"
            )
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, _LANES - values.shape[-1])])
    return [int(each) for each in values.reshape(-1)]
