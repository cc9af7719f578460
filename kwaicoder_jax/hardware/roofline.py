"""What a compiled program would need on its machine: memory, FLOPs, collectives, and the time that bounds it from below."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from kwaicoder_jax.hardware import collectives, hlo, work
from kwaicoder_jax.hardware.topologies import Topology

SPARE = 0.1  # of the memory that stays free


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of one kind along the same mesh axes, per chip.

    Attributes:
      kind: as in "all-gather".
      axes: of the mesh.
      count: executions.
      wire_bytes: sent.
      hidden_bytes: those behind which arithmetic goes on.
      seconds: at the bandwidth of the links that these axes have.
      hidden_seconds: of those that are hidden.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    wire_bytes: float
    hidden_bytes: float
    seconds: float
    hidden_seconds: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one run of the program, per chip; static figures of the compiler, not measurements.

    Attributes:
      memory: bytes of arguments, outputs (those that are not arguments given away), temporaries, code.
      hbm_bytes: at most in use, the sum of `memory`.
      capacity: bytes of the chip.
      model_flops: what the mathematics needs.
      work: what is executed.
      traffic: collectives, the largest first.
      compute_seconds: FLOPs at the chip's peak for their type.
      memory_seconds: bytes at its bandwidth.
      hidden_seconds: of collectives that run beside arithmetic.
      exposed_seconds: of those that are waited for.
    """

    memory: Mapping[str, int]
    hbm_bytes: int
    capacity: float
    model_flops: float
    work: work.Work
    traffic: Sequence[Traffic]
    compute_seconds: float
    memory_seconds: float
    hidden_seconds: float
    exposed_seconds: float
    peak_flops: float
    hbm_bandwidth: float

    @property
    def fits(self) -> bool:
        """Whether a tenth of the memory stays free."""
        return self.hbm_bytes <= (1 - SPARE) * self.capacity

    @property
    def seconds(self) -> float:
        """The longest of arithmetic, memory and hidden collectives, and what is waited for."""
        return max(self.compute_seconds, self.memory_seconds, self.hidden_seconds) + self.exposed_seconds

    @property
    def bound(self) -> str:
        """What `seconds` is made of most."""
        parts = {
            "compute": self.compute_seconds, "memory": self.memory_seconds, "interconnect": self.hidden_seconds,
            "exposed interconnect": self.exposed_seconds,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])

    @property
    def mfu_bound(self) -> float:
        """Model FLOPs over the bf16 peak in `seconds`: no run can do better. In 8 bits it may pass 1."""
        return self.model_flops / self.peak_flops / self.seconds

    @property
    def flops_ratio(self) -> float:
        """Executed over model FLOPs."""
        return self.work.flops / self.model_flops

    @property
    def wire_bytes(self) -> float:
        """Sent in all collectives."""
        return sum(each.wire_bytes for each in self.traffic)

    @property
    def hidden_share(self) -> float:
        """Of the bytes on the wire, those that are hidden."""
        return sum(each.hidden_bytes for each in self.traffic) / max(self.wire_bytes, 1.0)


def analyze(
    compiled: Any,
    machine: Topology,
    mesh: Mesh,
    model_flops: float,
    kernel_work: work.KernelWork = work.estimated,
    *,
    rare: Sequence[str] = (),
) -> Roofline:
    """Looks at a compiled program.

    Args:
      compiled: from `jit(...).lower(...).compile()`.
      machine: what it was compiled for.
      mesh: over all devices of it.
      model_flops: of one run, per chip.
      kernel_work: tells what hand-written kernels execute.
      rare: see `work.measure`.
    """
    module = hlo.parse(compiled.as_text())
    executed = work.measure(module, kernel_work, rare=rare)
    found = collectives.find(module, rare=rare, products_only=not machine.chip.torus_axes)
    stats = compiled.memory_analysis()
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    traffic = _traffic(found, machine, mesh)
    hidden = sum(each.hidden_seconds for each in traffic)
    return Roofline(
        memory=memory,
        hbm_bytes=sum(memory.values()),
        capacity=machine.chip.hbm_bytes,
        model_flops=model_flops,
        work=executed,
        traffic=traffic,
        compute_seconds=sum(
            flops / machine.chip.peak(work.operand_type(kind)) for kind, flops in executed.by_kind.items()
        ),
        memory_seconds=executed.hbm_bytes / machine.chip.hbm_bandwidth,
        hidden_seconds=hidden,
        exposed_seconds=sum(each.seconds for each in traffic) - hidden,
        peak_flops=machine.chip.bf16_flops,
        hbm_bandwidth=machine.chip.hbm_bandwidth,
    )


def _traffic(found: Sequence[collectives.Collective], machine: Topology, mesh: Mesh) -> list[Traffic]:
    devices, sizes = mesh.devices.reshape(-1), tuple(mesh.shape.values())
    groups = collections.defaultdict(list)
    for each in found:
        members, pairwise = [devices[i] for i in each.group], each.kind in collectives.PAIRWISE
        seconds = each.wire_bytes / machine.bandwidth(members, pairwise=pairwise)
        groups[each.kind, each.axes(mesh.axis_names, sizes)].append((each, seconds))
    made = [
        Traffic(
            kind, axes, sum(each.times for each, _ in members), collectives.total(each for each, _ in members),
            collectives.total((each for each, _ in members), hidden=True), sum(seconds for _, seconds in members),
            sum(seconds for each, seconds in members if each.is_hidden),
        )
        for (kind, axes), members in groups.items()
    ]  # fmt: skip
    return sorted(made, key=lambda each: -each.wire_bytes)
