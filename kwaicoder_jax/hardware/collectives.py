"""The collectives of a compiled module: bytes on the wire, the mesh axes they go along, and what hides them."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from kwaicoder_jax.hardware.hlo import Computation, Instruction, Module, nbytes
from kwaicoder_jax.hardware.work import computes

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
PAIRWISE = ("all-to-all", "ragged-all-to-all")  # every device has other bytes for each other one


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective, all its executions together.

    Attributes:
      kind: one of KINDS.
      name: of its instruction.
      source: where it comes from in the traced function.
      devices: in a group, or 2 for a permutation.
      group: ids of one group, positions in the mesh.
      times: executions.
      payload_bytes: of one execution: the gathered or the reduced array, or what one device sends. Of a ragged-all-to-all
        the smaller of its two buffers, an upper bound: what is sent is known only when it runs.
      wire_bytes: what a device sends in all executions, on a ring: (n-1)/n of the payload for a gather, a scatter or an
        all-to-all (whose rows are taken to be for all devices alike), twice that for an all-reduce.
      is_hidden: whether it is asynchronous, with arithmetic between its start and its end.
    """

    kind: str
    name: str
    source: str
    devices: int
    group: tuple[int, ...]
    times: int
    payload_bytes: float
    wire_bytes: float
    is_hidden: bool

    def axes(self, names: Sequence[str], sizes: Sequence[int]) -> tuple[str, ...]:
        """The mesh axes along which the group's devices differ, of a mesh with these axes."""
        places = np.array(np.unravel_index(np.array(self.group), tuple(sizes)))
        return tuple(name for name, row in zip(names, places, strict=True) if len(set(row.tolist())) > 1)


def find(module: Module, *, rare: Sequence[str] = (), products_only: bool = False) -> list[Collective]:
    """All collectives that are executed.

    Args:
      module: the program.
      rare: scopes whose collectives are left out, see `work.measure`.
      products_only: what else does not hide one, see `work.computes`.
    """
    found: list[Collective] = []
    chains: dict[tuple[int, str, str, float], int] = {}
    for computation, instruction, times in module.walk():
        if instruction.op in ("async-start", "call-start"):
            continue  # `walk` goes into what it calls
        hidden = _may_hide(instruction) and _is_hidden(module, computation, instruction, products_only)
        for inner, each in _inside(module, computation, instruction):
            if any(f"/{scope}/" in each.source for scope in rare):
                continue
            made = _collective(inner, each, times, hidden, module.partitions)
            # A TPU's asynchronous fusions write one collective several times: its start, its steps, its end.
            chain = each.attribute(r'chain_id="?(\w+)')
            key = (id(computation), chain or "", made.kind, made.payload_bytes)
            if chain is not None and inner is not computation and key in chains:
                found[chains[key]] = dataclasses.replace(found[chains[key]], is_hidden=True)
                continue
            chains[key] = len(found)
            found.append(made)
    hidden_calls = _hidden_calls(module, products_only)
    return [
        dataclasses.replace(each, is_hidden=True) if each.name in hidden_calls else each
        for each in found
        if each.devices > 1
    ]


def total(collectives: Iterable[Collective], *, hidden: bool | None = None) -> float:
    """Wire bytes, of all or of those that are (or are not) hidden."""
    return sum(each.wire_bytes for each in collectives if hidden is None or each.is_hidden == hidden)


def _kind(instruction: Instruction) -> str | None:
    name = instruction.op.removesuffix("-start")
    return name if name in KINDS else None


def _inside(
    module: Module, computation: Computation, instruction: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
    """The instruction if it is a collective, or those in its fusion."""
    if _kind(instruction) is not None:
        yield computation, instruction
    elif instruction.op == "fusion":
        inner = module.computations[instruction.attribute(r"calls=%?([\w.\-]+)") or ""]
        for each in inner.values():
            yield from _inside(module, inner, each)


def _may_hide(instruction: Instruction) -> bool:
    return instruction.op.endswith("-start")


def _is_hidden(module: Module, computation: Computation, start: Instruction, products_only: bool) -> bool:
    """Whether there is arithmetic between a start and its end, or no end in this iteration."""
    began = False
    for each in computation.values():
        if each.name == start.name:
            began = True
        elif began and start.name in each.operands and each.op.endswith(("-done", "-update")):
            return False
        elif began and computes(module, each, products_only=products_only):
            return True
    return True


def _hidden_calls(module: Module, products_only: bool) -> set[str]:
    """Names of collectives in computations that run beside the core, and behind which arithmetic goes on."""
    names = set()
    for computation, instruction, _ in module.walk():
        if instruction.op not in ("async-start", "call-start"):
            continue
        if _is_hidden(module, computation, instruction, products_only):
            callee = instruction.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")
            inner = module.computations.get(callee or "", Computation())
            names |= {found.name for each in inner.values() for _, found in _inside(module, inner, each)}
    return names


def _collective(
    computation: Computation, instruction: Instruction, times: int, hidden: bool, partitions: int
) -> Collective:
    kind = _kind(instruction)
    assert kind is not None
    group = _group(instruction, partitions)
    devices, operands = len(group), sum(map(nbytes, computation.operand_types(instruction)))
    payload, share = operands, (len(group) - 1) / len(group)
    if kind == "all-gather":
        payload = operands * devices
    elif kind == "all-reduce":
        share *= 2
    elif kind in ("collective-permute", "collective-broadcast"):
        share = 1.0
    elif kind == "ragged-all-to-all":  # sizes are known only when it runs: no more rows than either buffer holds
        payload = min(map(nbytes, computation.operand_types(instruction)[:2]))
    return Collective(
        kind, instruction.name, instruction.source, devices, group, times, payload, share * payload * times, hidden
    )


def _group(instruction: Instruction, partitions: int) -> tuple[int, ...]:
    """The ids of the group that device 0 is in, or of the first pair of a permutation that goes anywhere."""
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        all_pairs = [tuple(map(int, pair)) for pair in re.findall(r"\{?(\d+),(\d+)", pairs.group(1))]
        return next((pair for pair in all_pairs if pair[0] != pair[1]), (0,))
    if named := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))?\s*\{{([^}}]*)\}}", text):
        return _named_group(named.group(1), _iota(named.group(2), named.group(3), partitions), named.group(4))
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={IOTA}", text):
        ids = _iota(iota.group(2), iota.group(3), partitions)
        return tuple(int(i) for i in ids.reshape(_numbers(iota.group(1)))[0])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(i) for i in listed.group(1).split(",") if i) or (0,)
    if other := re.search(r"replica_groups=(?!\{\})\S+", text):
        raise ValueError(f"{instruction.name}: {other.group()} is written in a form that is not known here")
    return tuple(range(partitions))


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in (text or "").split(",") if number]


def _iota(shape: str | None, order: str | None, devices: int) -> np.ndarray:
    """Ids in the order that [8,64]T(1,0) gives: counted in that shape, then transposed. Without a shape as they are."""
    ids = np.arange(devices).reshape(_numbers(shape) or [devices])
    return ids.transpose(_numbers(order)) if order else ids


def _named_group(mesh: str, ids: np.ndarray, used: str) -> tuple[int, ...]:
    """Groups over axes of a mesh, as in 'axis_0'=4,'axis_1'=16 and 'axis_1' or 'axis_1':(4)4 (a part of the axis)."""
    sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", mesh)}
    ids = ids.reshape(list(sizes.values()))
    index: list[slice | int] = [0] * len(sizes)
    names = list(sizes)
    picked = []
    for name, before, size in re.findall(r"'?([A-Za-z_]\w*)'?(?::\((\d+)\)(\d+))?", used):
        outer, inner = (int(before), int(size)) if before else (1, sizes[name])
        step = sizes[name] // (outer * inner)
        picked.append((names.index(name), np.arange(inner) * step))
    grid = np.meshgrid(*(offsets for _, offsets in picked), indexing="ij")
    places = [np.zeros(grid[0].size, int) if grid else np.zeros(1, int) for _ in index]
    for (axis, _), offsets in zip(picked, grid, strict=True):
        places[axis] = places[axis] + offsets.reshape(-1)
    return tuple(int(i) for i in ids[tuple(places)])
