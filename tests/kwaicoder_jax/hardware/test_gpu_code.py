"""Reading what the compiler for H100 dumps: excerpts of our forward kernel's dump by jax 0.10.2 and nvdisasm 13.5."""

from pathlib import Path

import pytest

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware import gpu_code

DUMP = Path(__file__).parent / "gpu_dump"


def test_a_dump():
    (code,) = gpu_code.read(DUMP)
    assert code.name == "grouped_product_gpu"
    assert (code.registers, code.spilled_bytes, code.threads) == (158, 0, 128)
    assert code.shared_bytes == 131_104 + 1  # four steps of two tiles of 128 x 64, four barriers; and ptxas' own byte
    assert code.shared_bytes <= gpu_code.SHARED_LIMIT
    assert code.waits == (1, 0)


def test_the_loop_over_the_contracted_axis():
    loop = gpu_code.loop((DUMP / "grouped_product_gpu_0.sass_ctrl").read_text().splitlines())
    assert loop.tensor == 8  # 128 rows in two halves, 64 of depth in four parts
    assert loop.flops == 2 * 128 * 128 * 64
    assert loop.instructions == 104


def test_without_a_disassembler(tmp_path):
    for path in DUMP.iterdir():
        if path.suffix != ".sass_ctrl":
            (tmp_path / path.name).write_text(path.read_text())
    (code,) = gpu_code.read(tmp_path)
    assert code.loop is None
    assert code.registers == 158


# Of jax's ragged_dot_mgpu for 256 groups, over which it unrolls.
SPILLING = """ptxas warning : Registers are spilled to local memory, 696 bytes spill stores, 696 bytes spill loads
ptxas info    : 0 bytes gmem
    696 bytes stack frame, 696 bytes spill stores, 696 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 696 bytes cumulative stack size, 1 bytes smem"""


def test_spills_are_seen():
    assert gpu_code.report(SPILLING) == (255, 1392, 1)


def test_no_loop_and_nested_loops():
    straight = ["/*0010*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24"]
    assert gpu_code.loop(straight) is None
    inner = [".L_x_2:", *straight, "/*0020*/ @P1 BRA `(.L_x_2)"]
    outer = [".L_x_1:", "/*0000*/ IADD3 R1, R2, R3", *inner, "/*0030*/ BRA `(.L_x_1)"]
    assert gpu_code.loop(outer) == gpu_code.Loop(2, 1, 2 * 64 * 128 * 16)


def test_what_is_missing_or_reads_otherwise_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no compiled kernel; set MOSAIC_GPU_DUMP_TO before"):
        gpu_code.read(tmp_path)
    with pytest.raises(ValueError, match="0 counts of registers and 0 of spills"):
        gpu_code.report("ptxas info: another format")
    with pytest.raises(ValueError, match="no launch with constant sizes"):
        gpu_code.launch("module {}")
