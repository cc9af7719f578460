"""From a kernel's schedule and its scalar operands to its time."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware.schedule.bundles import Allocation, cycles_of_bundles, parse_allocations, parse_bundles
from kwaicoder_jax.hardware.schedule.compilation import Dump
from kwaicoder_jax.hardware.schedule.cores import TensorCores
from kwaicoder_jax.hardware.schedule.machine import Machine
from kwaicoder_jax.hardware.schedule.operations import Operand
from kwaicoder_jax.hardware.schedule.program import Block, Program, build
from kwaicoder_jax.hardware.schedule.timeline import Memory, replay

LATENCIES = (0.5e-6, 1.0e-6, 1.5e-6)  # seconds from the start of a copy to its first bytes: low, expected, high


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a launch of a kernel takes, predicted from the compiled schedule; nothing of it was measured.

    Where both cores of a chip work, `cycles` to `mxu_share` are of the one that takes longer, the rest is of both.

    Attributes:
      seconds: until the slower core has issued its last bundle, with a copy latency of 1 us.
      seconds_low, seconds_high: with 0.5 and 1.5 us.
      cycles: that its bundles take, without waits for copies.
      stall_cycles: that it waits for copies.
      bundles: issued.
      mxu_share: of `cycles` in which its busiest matrix unit works.
      cores_used: that copy anything or multiply.
      steps: executions of blocks with matrix instructions: the visited steps of a grid that has one product a step.
      copies: by kind, as in "hbm_to_vmem", and index of the operand (-1: none, or not known).
      bytes: the same.
      hbm_bytes: read and written, in all.
      hbm_seconds: that they take at full bandwidth.
      vmem_bytes: that the kernel allocates on a core.
      useful_flops: as given.
      ideal_seconds: of these, at the chip's peak; None where none are given.
      utilization: `ideal_seconds` over `seconds`.
    """

    seconds: float
    seconds_low: float
    seconds_high: float
    cycles: int
    stall_cycles: float
    bundles: int
    mxu_share: float
    cores_used: int
    steps: int
    copies: Mapping[tuple[str, int], int]
    bytes: Mapping[tuple[str, int], int]
    hbm_bytes: int
    hbm_seconds: float
    vmem_bytes: int
    useful_flops: float | None = None
    ideal_seconds: float | None = None
    utilization: float | None = None


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel, ready to be emulated with any values of its scalars.

    Attributes:
      name: in the compiled module.
      cores: of the chip that it was compiled for.
      program: its schedule.
      vmem_bytes: that it allocates on a core.
      core_index: addresses of the word that tells a core which of the two it is; none where nothing depends on it.
      chip_index: of the word that tells it which chip it is on.
    """

    name: str
    cores: TensorCores
    program: Program
    vmem_bytes: int
    core_index: tuple[int, ...]
    chip_index: tuple[int, ...]

    @property
    def operands(self) -> Mapping[int, Operand]:
        """By index: scalars (a grid's dynamic bounds, then prefetched ones) come before arrays."""
        return dict(sorted(self.program.operands.items()))

    def predict(self, scalars: Mapping[int, Any] | None = None, *, useful_flops: float | None = None) -> Prediction:
        """Emulates a launch.

        Args:
          scalars: values of the operands that control flow and copies depend on, by index: ints or int32 arrays.
          useful_flops: of the work that was asked for, twice its multiply-adds.

        Raises:
          UserError: the kernel has no such scalars.
          UnknownValueError: control flow depends on a value that is not in `scalars`.
          DeadlockError: the kernel waits for a copy or a signal that never comes.
          SemaphoreError: it ends without having waited for all of them.
        """
        if unknown := set(scalars or {}) - set(self.operands):
            has = ", ".join(f"{index}: {each.shape}" for index, each in sorted(self.operands.items()))
            raise UserError(f"{self.name} has no operands {sorted(unknown)}", where="scalars", remedy=f"it has {has}")
        runs = [self._run(core, scalars or {}) for core in range(self.cores.count if self.core_index else 1)]
        working = sum(run.works for run in runs) or 1
        bandwidth = self.cores.hbm_bytes_per_cycle(working)
        stalls = [
            replay([run.machine.events for run in runs], Memory(latency * self.cores.clock, bandwidth))
            for latency in LATENCIES
        ]
        ends = [[run.cycles + stall for run, stall in zip(runs, each, strict=True)] for each in stalls]
        low, seconds, high = (max(each) / self.cores.clock for each in ends)
        slowest = max(range(len(runs)), key=ends[1].__getitem__)
        run, hbm_bytes = runs[slowest], sum(event.hbm_bytes for each in runs for event in each.machine.events)
        ideal = None if useful_flops is None else useful_flops / self.cores.chip.bf16_flops
        return Prediction(
            seconds=seconds,
            seconds_low=low,
            seconds_high=high,
            cycles=run.cycles,
            stall_cycles=stalls[1][slowest],
            bundles=run.bundles,
            mxu_share=self.cores.vmatmul_cycles * max(run.vmatmuls.values(), default=0) / run.cycles,
            cores_used=working,
            steps=sum(each.steps for each in runs),
            copies=sum((each.machine.copies for each in runs), Counter()),
            bytes=sum((each.machine.bytes for each in runs), Counter()),
            hbm_bytes=hbm_bytes,
            hbm_seconds=hbm_bytes / self.cores.chip.hbm_bandwidth,
            vmem_bytes=self.vmem_bytes,
            useful_flops=useful_flops,
            ideal_seconds=ideal,
            utilization=None if ideal is None else ideal / seconds,
        )

    def _run(self, core: int, scalars: Mapping[int, Any]) -> "_Run":
        smem = dict.fromkeys(self.chip_index, 0) | dict.fromkeys(self.core_index, core)
        machine = Machine(self.operands, scalars, self.cores.hbm_step, smem)
        return _Run(self.program, machine, self.program.run(machine))


@dataclasses.dataclass(frozen=True)
class _Run:
    """What one core did: the machine at the end, and how many times each block was executed."""

    program: Program
    machine: Machine
    times: list[int]

    @property
    def cycles(self) -> int:
        return sum(times * block.cycles for block, times in self._executed())

    @property
    def bundles(self) -> int:
        return sum(times * block.bundles for block, times in self._executed())

    @property
    def steps(self) -> int:
        return sum(times for block, times in self._executed() if block.vmatmuls)

    @property
    def vmatmuls(self) -> Counter[str]:
        """Matrix instructions per unit."""
        return sum(
            (
                Counter({unit: times * count for unit, count in block.vmatmuls.items()})
                for block, times in self._executed()
            ),
            Counter(),
        )

    @property
    def works(self) -> bool:
        return self.steps > 0 or any(event.hbm_bytes for event in self.machine.events)

    def _executed(self) -> Iterator[tuple[Block, int]]:
        return zip(self.program.blocks, self.times, strict=True)


def kernel_of(dump: Dump, cores: TensorCores) -> Kernel:
    """Reads a dump; DumpError if something in it is not known here."""
    cycles = cycles_of_bundles(dump.before_delays, dump.after_delays)
    program = build(parse_bundles(dump.bundles), cycles)
    allocations = parse_allocations(dump.allocations)
    vmem = sum(each.nbytes for each in allocations if each.space == "vmem" and each.is_scoped)
    core = _words(allocations, program, "core index")
    is_read = any(f"{address:#x}" in program.source for address in core)
    return Kernel(dump.name, cores, program, vmem, core if is_read else (), _words(allocations, program, "chip ID"))


def _words(allocations: Sequence[Allocation], program: Program, tag: str) -> tuple[int, ...]:
    """Addresses of a word of the chip's, under each of the names that the program has for it."""
    return tuple(
        program.allocations[each.name]
        for each in allocations
        if each.tag.endswith(tag) and each.name in program.allocations
    )
