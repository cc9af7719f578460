"""Kernels compiled for chips that are not here, against loops and bytes counted by hand."""

import numpy as np
import pytest

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware import schedule
from tests.kwaicoder_jax.hardware import schedule_kernels, tokamax_kernels
from tests.kwaicoder_jax.hardware.schedule_kernels import ROWS, WIDTH, array

SQUARE = array(2048, 2048)
FLOPS = 2.0 * 2048**3
ROW_BYTES = 2 * WIDTH
BLOCKS = {("hbm_to_vmem", 0): 32, ("hbm_to_vmem", 1): 32, ("vmem_to_hbm", 2): 8}


def test_a_matmul_visits_its_grid_and_moves_its_blocks():
    prediction = schedule.predict(schedule_kernels.matmul, (SQUARE, SQUARE), chip="v5e", useful_flops=FLOPS)
    cores = schedule.tensor_cores("v5e")
    assert prediction.steps == 4 * 2 * 4
    assert dict(prediction.copies) == BLOCKS
    assert prediction.hbm_bytes == 2 * (32 * 512 * 512 + 32 * 512 * 1024 + 8 * 512 * 1024)
    # Each matrix instruction is 16 rows of 128 x 128: together they are the arithmetic of the product, to the last one.
    assert prediction.mxu_share * prediction.cycles == pytest.approx(FLOPS / 2 / cores.macs_per_cycle)
    assert prediction.cores_used == 1
    assert prediction.seconds == pytest.approx((prediction.cycles + prediction.stall_cycles) / cores.clock)
    assert prediction.seconds_low < prediction.seconds < prediction.seconds_high
    assert prediction.ideal_seconds == FLOPS / 197e12
    assert prediction.utilization == pytest.approx(prediction.ideal_seconds / prediction.seconds)
    assert prediction.hbm_seconds == prediction.hbm_bytes / 819e9
    # Two buffers of each block, and the sum.
    assert prediction.vmem_bytes == pytest.approx(2 * 2 * (512 * 512 + 2 * 512 * 1024) + 4 * 512 * 1024, rel=0.02)


def test_v6e_has_wider_units():
    prediction = schedule.predict(schedule_kernels.matmul, (SQUARE, SQUARE), chip="v6e")
    assert dict(prediction.copies) == BLOCKS
    assert prediction.mxu_share * prediction.cycles == pytest.approx(2048**3 / (4 * 256 * 256))
    assert prediction.utilization is None


@pytest.fixture(scope="module")
def one_core():
    kernels = schedule.compile_kernels(schedule_kernels.one_core, schedule_kernels.ONE_CORE, chip="v5e")
    return {kernel.name.split(".")[0]: kernel for kernel in kernels}


def test_copies_of_sizes_known_at_run_time(one_core):
    sizes = np.array([16, 0, 512, 1024, 32, 2048, 256, 208])
    prediction = one_core["rows_of_groups"].predict({0: sizes})
    assert sum(sizes) == ROWS
    assert prediction.bytes["hbm_to_vmem", 1] == prediction.bytes["vmem_to_hbm", 2] == ROWS * ROW_BYTES
    assert prediction.copies["hbm_to_vmem", 1] == prediction.copies["vmem_to_hbm", 2] == 8
    # Nothing overlaps, so that each of 16 copies takes the latency, and all bytes the full bandwidth.
    waits = 16 * 1e-6 + 2 * ROWS * ROW_BYTES / 819e9
    assert prediction.seconds == pytest.approx(waits, rel=0.15)
    assert prediction.seconds_high - prediction.seconds == pytest.approx(16 * 0.5e-6, rel=0.1)
    assert prediction.mxu_share == prediction.steps == 0


def test_loops_over_scalars_that_a_kernel_copies(one_core):
    entries = np.random.default_rng(0).integers(0, 256, 99)
    prediction = one_core["follow"].predict({0: np.append(entries, -1)})
    assert prediction.copies["hbm_to_smem", 0] == 1
    assert prediction.copies["hbm_to_vmem", 1] == 99
    turns = sum(entries % 7) * 2 // 3
    assert prediction.copies["vmem_to_hbm", 2] == -(-turns // 2)
    with pytest.raises(schedule.UnknownValueError, match="nothing has written"):
        one_core["follow"].predict({0: entries})  # runs off what is known


def test_copies_inside_of_hbm_read_and_write(one_core):
    prediction = one_core["inside_of_hbm"].predict()
    assert prediction.copies == {("hbm_to_hbm", 1): 1}
    assert prediction.hbm_bytes == 2 * ROWS * ROW_BYTES
    assert prediction.seconds == pytest.approx(1e-6 + prediction.hbm_bytes / 819e9, rel=0.01)


def test_inner_pipelines_of_dynamic_length(one_core):
    counts = np.zeros((10, 3), np.int32)
    for blocks in (1, 7, 16):
        counts[9, 2] = blocks
        prediction = one_core["pipeline"].predict({0: counts})
        assert prediction.copies["hbm_to_vmem", 1] == prediction.copies["vmem_to_hbm", 2] == blocks


def test_waits_that_do_not_fit_are_errors(one_core):
    with pytest.raises(schedule.DeadlockError):
        one_core["never"].predict()
    with pytest.raises(schedule.SemaphoreError):
        one_core["unawaited"].predict()
    with pytest.raises(schedule.UnknownValueError):
        one_core["rows_of_groups"].predict()
    with pytest.raises(UserError, match=r"scalars: .*no operands \[5\].*0: s32\[8\]"):
        one_core["rows_of_groups"].predict({5: 1})


@pytest.fixture(scope="module")
def on_v5p():
    return schedule.compile_kernels(schedule_kernels.on_v5p, (SQUARE, SQUARE, array(ROWS, WIDTH)), chip="v5p")


def test_both_cores_share_a_parallel_dimension(on_v5p):
    split, alone = sorted(
        (kernel.predict(useful_flops=FLOPS) for kernel in on_v5p if "matmul" in kernel.name),
        key=lambda each: each.seconds,
    )
    assert (split.cores_used, alone.cores_used) == (2, 1)
    assert split.steps == alone.steps == 32
    assert dict(split.copies) == dict(alone.copies) == BLOCKS
    assert split.cycles == pytest.approx(alone.cycles / 2, rel=0.05)
    assert 2 * 0.9 < alone.seconds / split.seconds < 2 * 1.1
    assert split.mxu_share * split.cycles == pytest.approx(FLOPS / 2 / 65536 / 2)


def test_cores_of_a_mesh_signal_each_other(on_v5p):
    (kernel,) = (kernel for kernel in on_v5p if "in_turns" in kernel.name)
    prediction = kernel.predict()
    assert prediction.cores_used == 2
    assert dict(prediction.copies) == {("hbm_to_vmem", 0): 32, ("vmem_to_hbm", 1): 32}
    piece = 64 * ROW_BYTES / (2765e9 / 2)
    assert prediction.seconds == pytest.approx(16 * (3e-6 + 2 * piece), rel=0.05)  # two copies and a signal a turn


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"chip: no TensorCores.*h100"):
        schedule.predict(schedule_kernels.matmul, (SQUARE, SQUARE), chip="h100")
    with pytest.raises(UserError, match="0 kernels are called 'attention'"):
        schedule.predict(schedule_kernels.matmul, (SQUARE, SQUARE), chip="v5e", kernel="attention")
    flags = ("--xla_tpu_scoped_vmem_limit_kib=1024",)
    with pytest.raises(UserError, match=r"(?is)refuses it.*vmem"):
        schedule.predict(schedule_kernels.matmul, (SQUARE, SQUARE), chip="v5e", flags=flags)


def errors(timings):
    """Relative errors of the predictions, which it prints."""
    found = {}
    for timing in timings:
        prediction = timing.predict()
        found.setdefault(timing.chip, []).append(prediction.seconds / timing.seconds - 1)
        shape = f"{timing.product} {timing.groups} groups {timing.rows} x {timing.k} x {timing.n}"
        milliseconds = f"{timing.seconds * 1e3:.3f} ms, predicted {prediction.seconds * 1e3:.3f}"
        print(f"{timing.chip} {shape}: {milliseconds} ({found[timing.chip][-1]:+.1%})")
    return {chip: np.abs(each) for chip, each in found.items()}


def test_some_published_timings():
    pytest.importorskip("tokamax")
    shape = (131072, 2048, 768)
    chosen = [each for each in tokamax_kernels.timings() if (each.rows, each.k, each.n) == shape]
    chosen = [each for each in chosen if (each.chip, each.product) in (("v5e", "forward"), ("v5p", "drhs"))]
    assert len(chosen) == 2
    assert max(np.concatenate(list(errors(chosen).values()))) < 0.06


@pytest.mark.slow
def test_all_published_timings():
    pytest.importorskip("tokamax")
    found = errors(tokamax_kernels.timings())
    assert {chip: len(each) for chip, each in found.items()} == {"v5e": 11, "v5p": 34}
    for chip, each in found.items():
        print(f"{chip}: mean error {each.mean():.1%}, worst {each.max():.1%}")
    # Nothing is fitted to these records; the bounds are a little above what comes out.
    assert found["v5e"].mean() < 0.02
    assert found["v5e"].max() < 0.06
    assert found["v5p"].mean() < 0.03
    assert found["v5p"].max() < 0.10
