"""What the compiler made of a Mosaic GPU kernel: registers, spills, shared memory and instructions, read from its dump.

    MOSAIC_GPU_DUMP_TO=DIR            jax's CUDA plugin leaves there NAME_NUMBER.ptxas, .ptx and .mlir-passes.log
    MOSAIC_GPU_DUMP_SASS=1            and .sass_ctrl, if MOSAIC_GPU_CUDA_ROOT/bin has nvdisasm

All of it is the compiler's word, of a machine that need not be here: nothing is timed. The formats are those of jax 0.10.2;
a file that reads otherwise is an error, not a zero.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from kwaicoder_jax.errors import UserError

SHARED_LIMIT = 232_448  # bytes that a block of an H100 may ask for: 227 KB
_HGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(\S.*?)\s*$")


@dataclasses.dataclass(frozen=True)
class Loop:
    """The innermost loop that has tensor-core instructions.

    Attributes:
      instructions: of one iteration, with branches that are not always taken.
      tensor: those of tensor cores among them.
      flops: of one iteration and one warpgroup.
    """

    instructions: int
    tensor: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Code:
    """One compiled kernel.

    Attributes:
      name: as its author called it.
      registers: of a thread.
      spilled_bytes: stores and loads of registers that did not fit, of a thread.
      shared_bytes: shared memory of a block.
      threads: of a block.
      waits: `wgmma.wait_group` in the PTX: how many groups may still be in flight there.
      loop: None without the disassembler's output.
    """

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    waits: tuple[int, ...]
    loop: Loop | None


def read(folder: str | Path) -> list[Code]:
    """All kernels of a dump, in the order of their compilation; UserError if there is none."""
    reports = sorted(Path(folder).glob("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2]))
    if not reports:
        remedy = "set MOSAIC_GPU_DUMP_TO before a kernel is compiled for the first time in a process"
        raise UserError("no compiled kernel", where=str(folder), remedy=remedy)
    return [_code(path) for path in reports]


def _code(path: Path) -> Code:
    registers, spilled, static = report(path.read_text())
    threads, dynamic = launch(path.with_suffix(".mlir-passes.log").read_text())
    sass = path.with_suffix(".sass_ctrl")
    return Code(
        name=path.stem.rpartition("_")[0],
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=static + dynamic,
        threads=threads,
        waits=waits(path.with_suffix(".ptx").read_text()),
        loop=loop(sass.read_text().splitlines()) if sass.exists() else None,
    )


def report(text: str) -> tuple[int, int, int]:
    """Registers, spilled bytes, and bytes of static shared memory, of what ptxas prints of one kernel."""
    used = re.findall(r"Used (\d+) registers", text)
    spills = re.findall(r"bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if len(used) != 1 or len(spills) != 1:
        raise ValueError(
            f"ptxas tells of {len(used)} counts of registers and {len(spills)} of spills, not one kernel's"
        )
    static = re.search(r"(\d+) bytes smem", text)
    return int(used[0]), sum(map(int, spills[0])), int(static.group(1)) if static else 0


def launch(text: str) -> tuple[int, int]:
    """Threads of a block and bytes of dynamic shared memory, from the first launch in the log of passes."""
    found = re.search(r"launch async .*? threads\([^)]*\) in \(([^)]*)\) dynamic_shared_memory_size %c(\d+)_i32", text)
    if found is None:
        raise ValueError("the log of Mosaic GPU's passes has no launch with constant sizes")
    threads = 1
    for size in re.findall(r"= %c(\d+)", found.group(1)):
        threads *= int(size)
    return threads, int(found.group(2))


def waits(text: str) -> tuple[int, ...]:
    """Of every `wgmma.wait_group` in the PTX, how many groups it leaves in flight."""
    return tuple(int(count) for count in re.findall(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)", text))


def loop(lines: Sequence[str]) -> Loop | None:
    """The innermost loop with tensor-core instructions in a disassembled kernel; None if there is none."""
    labels = {line.strip()[:-1]: place for place, line in enumerate(lines) if re.fullmatch(r"\s*\.L_x_\d+:\s*", line)}
    best: Loop | None = None
    for place, line in enumerate(lines):
        target = re.search(r"BRA\s+`\((\.L_x_\d+)\)", line)
        start = labels.get(target.group(1), place) if target else place
        if start < place:
            found = _loop(lines[start : place + 1])
            if found.tensor and (best is None or found.instructions < best.instructions):
                best = found
    return best


def _loop(lines: Sequence[str]) -> Loop:
    instructions = [found.group(2) for line in lines if (found := _INSTRUCTION.search(line))]
    tensor = [found for each in instructions if (found := _HGMMA.search(each))]
    flops = sum(2 * int(m) * int(n) * int(k) for m, n, k in (each.groups() for each in tensor))
    return Loop(len(instructions), len(tensor), flops)
