"""What is read in compiled programs, against closed forms."""

import types

import pytest

from kwaicoder_jax import hardware
from kwaicoder_jax.hardware import hlo, work
from tests.kwaicoder_jax.training import devices


@pytest.fixture(scope="module")
def found():
    return devices.run("hardware.programs", 8)


def test_loops_are_multiplied_out(found):
    once = 2 * 16 * 32 * 32
    assert found["scan"]["flops"] == 7 * once
    assert found["nested"]["flops"] == 3 * 7 * once
    assert not found["nested"]["unknown"]


def test_bytes_are_at_least_every_matrix_once_a_turn(found):
    matrices = 7 * 32 * 32 * 4
    assert matrices <= found["scan"]["hbm"] <= 8 * matrices  # on CPU copies lie between
    assert found["nested"]["hbm"] == pytest.approx(3 * found["scan"]["hbm"], rel=0.3)


WHOLE = 64 * 32 * 4


@pytest.mark.parametrize(
    ("program", "kind", "axes", "times", "payload", "share"),
    [
        ("gather", "all-gather", ["fsdp"], 1, WHOLE, 3 / 4),
        ("scatter", "reduce-scatter", ["fsdp"], 1, WHOLE, 3 / 4),
        ("sum", "all-reduce", ["data"], 5, WHOLE, 2 * 1 / 2),
        ("both", "all-reduce", ["data", "fsdp"], 1, WHOLE, 2 * 7 / 8),
        ("ring", "collective-permute", ["fsdp"], 1, WHOLE / 4, 1),
    ],
)
def test_bytes_on_the_wire(found, program, kind, axes, times, payload, share):
    (one,) = found[program]["collectives"]
    assert one == [kind, axes, times, payload, pytest.approx(times * payload * share)]


# A step as the TPU compiler writes it, shortened: a gather on the sparse core behind a product, one that is waited for.
SCHEDULED = """HloModule jit_step, is_scheduled=true, num_partitions=4

%on_sparse_core (p: bf16[8,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,128]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}

%also_there (q: bf16[8,128]) -> bf16[32,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,128]{1,0} all-gather(%q), replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (a: bf16[8,128], b: bf16[128,128]) -> bf16[32,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[128,128]{1,0:T(8,128)S(1)} parameter(1)
  %first = ((bf16[8,128]), bf16[32,128]) call-start(%a), async_execution_thread="sparsecore", to_apply=%on_sparse_core
  %product = bf16[8,128]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %got = bf16[32,128]{1,0} call-done(%first)
  %kernel.7 = bf16[8,128]{1,0} custom-call(%product, %b), custom_call_target="tpu_custom_call", backend_config={"body": "
}", "cost_estimate":{"flops":"1000","transcendentals":"0","bytes_accessed":"50"}}}
  %second = ((bf16[8,128]), bf16[32,128]) call-start(%kernel.7), async_execution_thread="sparsecore", to_apply=%also_there
  %late = bf16[32,128]{1,0} call-done(%second)
  ROOT %sum = bf16[32,128]{1,0} add(%got, %late)
}
"""


def test_what_runs_behind_arithmetic_and_what_does_not():
    from kwaicoder_jax.hardware import collectives

    first, second = collectives.find(hlo.parse(SCHEDULED))
    assert (first.name, first.is_hidden) == ("all-gather.1", True)
    assert (second.name, second.is_hidden) == ("all-gather.2", False)
    assert first.wire_bytes == 3 / 4 * 32 * 128 * 2


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("{}", (0, 1, 2, 3)),
        ("[2,2]<=[4]", (0, 1)),
        ("[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", (0, 2)),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", (0, 1)),
        ("mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0'}", (0, 1)),
        ("mesh['axis_0'=4] {'axis_0':(2)2}", (0, 1)),
        ("mesh['axis_0'=4] {'axis_0':(1)2}", (0, 2)),
    ],
)
def test_forms_in_which_groups_are_written(groups, first):
    from kwaicoder_jax.hardware import collectives

    text = RAGGED.replace("{{0,1},{2,3}}", groups)
    assert {each.group for each in collectives.find(hlo.parse(text))} == {first}


def test_groups_in_a_form_that_is_not_known():
    from kwaicoder_jax.hardware import collectives

    with pytest.raises(ValueError, match=r"there: replica_groups=rows\(2\), is written in a form"):
        collectives.find(hlo.parse(RAGGED.replace("{{0,1},{2,3}}", "rows(2)")))


# An exchange among pairs of four devices, as the TPU compiler writes it, shortened; another in a loop that hardly runs.
RAGGED = """HloModule jit_step, is_scheduled=true, num_partitions=4

%rarely (c: (s32[], bf16[48,2,64])) -> (s32[], bf16[48,2,64]) {
  %c = (s32[], bf16[48,2,64]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = bf16[48,2,64]{2,1,0} get-tuple-element(%c), index=1
  %k = s32[2]{0} constant({1,1})
  %again = bf16[48,2,64] ragged-all-to-all(%x, %x, %k, %k, %k, %k), GROUPS, FROMjit(step)/overflow/while/body/again"}
  ROOT %next = (s32[], bf16[48,2,64]) tuple(%i, %again)
}

%goes_on (d: (s32[], bf16[48,2,64])) -> pred[] {
  %d = (s32[], bf16[48,2,64]) parameter(0)
  ROOT %more = pred[] constant(false)
}

ENTRY %main (a: bf16[32,2,64], b: bf16[48,2,64], n: s32[2]) -> (s32[], bf16[48,2,64]) {
  %a = bf16[32,2,64]{2,1,0} parameter(0)
  %b = bf16[48,2,64]{2,1,0} parameter(1)
  %n = s32[2]{0} parameter(2)
  %there = bf16[48,2,64] ragged-all-to-all(%a, %b, %n, %n, %n, %n), GROUPS, FROMjit(step)/there"}
  %zero = s32[] constant(0)
  %start = (s32[], bf16[48,2,64]) tuple(%zero, %there)
  ROOT %loop = (s32[], bf16[48,2,64]) while(%start), condition=%goes_on, body=%rarely
}
""".replace("GROUPS", "channel_id=1, replica_groups={{0,1},{2,3}}").replace("FROM", 'metadata={op_name="')


def test_rows_of_unknown_number_count_as_the_smaller_buffer():
    from kwaicoder_jax.hardware import collectives

    (one,) = collectives.find(hlo.parse(RAGGED), rare=("overflow",))
    assert (one.kind, one.axes(("fsdp", "expert"), (2, 2)), one.is_hidden) == ("ragged-all-to-all", ("expert",), False)
    assert (one.payload_bytes, one.wire_bytes) == (32 * 128 * 2, 32 * 128 * 2 / 2)
    assert [each.name for each in collectives.find(hlo.parse(RAGGED))] == ["there", "again"]


@pytest.mark.parametrize(("length", "closes"), [(4, True), (16, True), (4, False), (2, False)])
def test_an_all_to_all_is_bound_by_the_links_in_the_middle(length, closes):
    """Each half has a half of its bytes for the other: of `length`/2 devices, over one link, or two where it is a ring."""
    chip = hardware.chip("v5e")
    machine = hardware.Topology("line", chip, (), (length, 16), (closes, True))
    members = [types.SimpleNamespace(coords=(place, 3)) for place in range(length)]
    link = chip.link_bandwidth / 4  # of a 2D torus, in one direction
    seconds = length / 2 * 1 / 2 / (link * (2 if closes else 1))  # of a payload of one byte
    assert (length - 1) / length / machine.bandwidth(members, pairwise=True) == pytest.approx(seconds)
    assert machine.bandwidth(members) == (2 if closes else 1) * link


def test_kernels_count_by_their_estimate_or_by_what_the_caller_knows():
    module = hlo.parse(SCHEDULED)
    product = 2 * 8 * 128 * 128
    assert work.measure(module).by_kind == {"matmul": product, "kernel": 1000}

    def known(kernel):
        assert kernel.name == "kernel"
        assert [array.shape for array in kernel.operands] == [(8, 128), (128, 128)]
        assert kernel.estimate == (1000, 50)
        return 7.0, 0.0

    assert work.measure(module, known).by_kind["kernel"] == 7
    assert work.measure(module, lambda kernel: None).unknown_kernels == {"kernel": 1}


def test_products_of_eight_bits_count_apart():
    module = hlo.parse(SCHEDULED.replace("%a = bf16", "%a = s8").replace("%b = bf16", "%b = s8"))
    assert work.measure(module).by_kind == {"matmul s8": 2 * 8 * 128 * 128, "kernel": 1000}
    assert [work.operand_type(kind) for kind in ("matmul s8", "matmul f8e5m2", "matmul", "gmm")] == [
        "s8", "f8e5m2", "bf16", "bf16",
    ]  # fmt: skip
    half = hlo.parse(SCHEDULED.replace("%a = bf16", "%a = s8"))
    assert work.measure(half).by_kind == {"matmul": 2 * 8 * 128 * 128, "kernel": 1000}


def test_what_lies_on_chip_is_no_traffic():
    # a: read by the product and nothing else that counts; b lies in another memory space; the sum reads and writes.
    whole, part = 32 * 128 * 2, 8 * 128 * 2
    assert work.measure(hlo.parse(SCHEDULED)).hbm_bytes == 2 * part + 50 + 3 * whole + 2 * (part + whole)


# As the GPU compiler writes it, shortened: behind the gather there is a small fusion, behind the scatter a product.
ON_GPU = """HloModule jit_step, is_scheduled=true, num_partitions=4

%small (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %minus = bf16[8,128]{1,0} negate(%p)
}

%gemm (q: bf16[8,128], r: bf16[128,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %r = bf16[128,128]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,128]{1,0} dot(%q, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[8,128], b: bf16[128,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = bf16[128,128]{1,0} parameter(1)
  %gather = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %fused = bf16[8,128]{1,0} fusion(%a), kind=kLoop, calls=%small
  %gathered = bf16[32,128]{1,0} all-gather-done(%gather)
  %scatter = ((bf16[32,128]{1,0}), (bf16[8,128]{1,0})) reduce-scatter-start(%gathered), replica_groups={{0,1,2,3}},
    dimensions={0}, to_apply=%add
  %product = bf16[8,128]{1,0} fusion(%fused, %b), kind=kCustom, calls=%gemm
  %scattered = bf16[8,128]{1,0} reduce-scatter-done(%scatter)
  %mpmd_map.3 = bf16[8,128]{1,0} custom-call(%product, %b), custom_call_target="mosaic_gpu_v2",
    metadata={op_name="jit(f)/transpose(jvp(grouped_product_gpu))/mpmd_map" stack_frame_id=6}
  ROOT %pallas_call.5 = bf16[8,128]{1,0} custom-call(%mpmd_map.3), custom_call_target="__gpu$xla.gpu.triton",
    metadata={op_name="jit(f)/pallas_call"},
    backend_config={grid_x = 1 : i32, name = "mha_forward", num_warps = 4 : i32}
}
"""


def test_on_gpu_a_collective_hides_behind_products_alone():
    from kwaicoder_jax.hardware import collectives

    module = hlo.parse(ON_GPU)
    assert [each.is_hidden for each in collectives.find(module)] == [True, True]
    gather, scatter = collectives.find(module, products_only=True)
    assert (gather.kind, gather.is_hidden) == ("all-gather", False)
    assert (scatter.kind, scatter.is_hidden) == ("reduce-scatter", True)
    assert gather.wire_bytes == scatter.wire_bytes == 3 / 4 * 32 * 128 * 2


def test_kernels_of_gpus_by_their_names_and_bytes_of_collectives_once():
    seen = []

    def known(kernel):
        seen.append(kernel.name)
        return 5.0, 0.0

    executed = work.measure(hlo.parse(ON_GPU), known)
    assert set(seen) == {"grouped_product_gpu", "mha_forward"}
    assert executed.by_kind == {"matmul": 2 * 8 * 128 * 128, "grouped_product_gpu": 5, "mha_forward": 5}
    part, whole, matrix = 8 * 128 * 2, 32 * 128 * 2, 128 * 128 * 2
    # Gather and scatter read and write one array each; the fusions read and write theirs.
    assert executed.hbm_bytes == 2 * (part + whole) + 2 * part + (2 * part + matrix)
