"""Schedules as the compiler writes them, shortened, against what was counted by hand."""

import pytest

from kwaicoder_jax.hardware.schedule import bundles
from kwaicoder_jax.hardware.schedule.bundles import DumpError
from kwaicoder_jax.hardware.schedule.machine import EndlessError, Machine
from kwaicoder_jax.hardware.schedule.operations import Translator
from kwaicoder_jax.hardware.schedule.program import build
from kwaicoder_jax.hardware.schedule.unknown import Unknown, UnknownValueError

# Copies operand 1 to VMEM in operand 0's number of pieces of 64 granules, and multiplies once a piece.
LOOP = """= control target key start
LH: loop header
= control target key end

     0   :  { %s90_s0 = inlined_call_operand.<no memory space> [shape: s32[], index: 0, kind: input, shape index: {}] /* operand 0 */  ;;  %s91_s1 = inlined_call_operand.hbm [shape: bf16[64,512], index: 1, kind: input, shape index: {}] /* a comment /* in one { */ */ } /* entry bundle: %loop.1 = custom-call(%x) */
   0x1   :  { %s92_s2 = smov 0 /* copy for cssa */ }
   0x2 LB: > { %s10_s3 = sshll.u32 %s91_s1, 4  ;;  %s5_s2 = sphi %s92_s2, %s6_s2 /* phi copy */  ;;  %s7_s4 = int_to_ptr.hbm [resolvable:$true] %s10_s3 } /* Start region 7 :: Start region 8 */
   0x3   : > { %33 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s7_s4, /*size_in_granules=*/64, /*vmem=*/[#allocation2], /*dst_syncflagno=*/[#allocation3 + $0x1] }
   0x4   : > { %34 = dma.done.wait [#allocation3 + $0x1], 64  ;;  %v1_v0 = vmatmul.mubr.bf16.gmra.mxu1 %v0_v1 }
   0x5   : > { %35 = vsyncadd [#allocation3 + $0x1], 4294967232  ;;  %s6_s2 = sadd.s32 1, %s5_s2 }
   0x6   : > { %p8_p0 = scmp.ge.s32.totalorder %s6_s2, %s90_s0 }
   0x7   :  { %9 = sbr.rel (!%p8_p0) target = $region7 }
   0x8   :  {}
   0x9   :  {}
   0xa   :  {}
   0xb   :  {} /* End region 8 */
   0xc PF:  { %40 = shalt.err (%p8_p0) } /* Start/End empty region 9 */
"""  # noqa: E501


def test_bundles_are_read_with_their_regions_and_without_comments():
    parsed = bundles.parse_bundles(LOOP)
    assert [bundle.address for bundle in parsed] == list(range(13))
    assert len(parsed[0].operations) == 2
    assert parsed[2].regions == ("7", "8")
    assert parsed[12].joins == ("9",)
    assert parsed[3].operations[0].startswith("%33 = dma.hbm_to_vmem [thread:$0] %s7_s4, 64, [#allocation2]")
    assert "loop.1 = custom-call" in parsed[0].comment
    with pytest.raises(DumpError, match="no bundles"):
        bundles.parse_bundles("")


def emulate(text, scalars, cycles=None):
    parsed = bundles.parse_bundles(text)
    program = build(parsed, cycles or [1] * len(parsed))
    machine = Machine(program.operands, scalars, 512, {})
    return program, machine, program.run(machine)


def test_a_loop_is_executed_as_often_as_its_operand_says():
    cycles = [1, 1, 1, 1, 30, 1, 1, 1, 1, 1, 1, 1, 1]
    program, machine, times = emulate(LOOP, {0: 5}, cycles)
    assert times == [1, 5, 1]
    assert [block.cycles for block in program.blocks] == [2, 39, 1]
    assert [dict(block.vmatmuls) for block in program.blocks] == [{}, {"1": 1}, {}]
    assert dict(machine.copies) == {("hbm_to_vmem", 1): 5}
    assert dict(machine.bytes) == {("hbm_to_vmem", 1): 5 * 64 * 32}
    assert [event.kind for event in machine.events[:3]] == ["start", "wait", "signal"]
    assert [event.cycle for event in machine.events[:6:3]] == [2 + 2, 2 + 39 + 2]
    assert machine.events[2].amount == -64
    assert "shalt" not in program.source


def test_ends_of_a_general_copy_are_those_of_its_pointers():
    text = LOOP.replace("dma.hbm_to_vmem [thread:$0]", "dma.general").replace("[#allocation2]", "%s11_s5")
    text = text.replace("   0x1   :  { ", "   0x1   :  { %s11_s5 = scalar_lea.vmem [#allocation2], 8 ;;  ")
    assert dict(emulate(text, {0: 5})[1].copies) == {("hbm_to_vmem", 1): 5}
    with pytest.raises(DumpError, match="copy that is not known"):
        emulate(text.replace("scalar_lea.vmem", "scalar_lea.cmem"), {0: 5})


def test_a_loop_that_does_not_end_is_an_error(monkeypatch):
    monkeypatch.setattr(Machine, "longest", 10_000)
    with pytest.raises(EndlessError, match="does not end"):
        emulate(LOOP.replace("sadd.s32 1, %s5_s2", "sadd.s32 0, %s5_s2"), {0: 5})


def test_a_loop_of_unknown_length_is_an_error_that_names_the_operand():
    with pytest.raises(UnknownValueError, match=r"operand 0, s32\[\]: give its value in `scalars`"):
        emulate(LOOP, {})


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (LOOP.replace("sadd.s32 1, %s5_s2", "sfancy.s32 1, %s5_s2"), "scalar operation.*sfancy"),
        (LOOP.replace("vsyncadd [", "vsyncfancy ["), "synchronisation.*vsyncfancy"),
        (LOOP.replace("dma.hbm_to_vmem", "dma.hbm_to_moon"), "copy that is not known.*moon"),
        (LOOP.replace("%9 = sbr.rel (!%p8_p0) target = $region7", "%9 = sbr.ind %s5_s2"), "branch that is not known"),
        (LOOP.replace("%s5_s2 = sphi %s92_s2, %s6_s2", "%s5_s2 = sphi %s92_s2, %s6_s3"), "several registers"),
    ],
)
def test_what_is_not_known_is_an_error(broken, message):
    with pytest.raises(DumpError, match=message):
        emulate(broken, {0: 5})


def test_cores_that_compare_their_places_go_on():
    # Once at the beginning and once in the loop, each with a number of its own.
    barrier = (
        "%v7{0}_v0 = vmov {0}11 ;;  %7{0} = vpush.ccrf %v7{0}_v0 ;;  %v8{0}_v1 = vpop.ccrf ;;  %8{0} = vpush %v8{0}_v1"
    )
    check = " ;;  %s8{0}_s8 = spop %8{0} ;;  %p8{0}_p3 = scmp.ne.s32.totalorder %s8{0}_s8, {0}11 ;;  "
    halt = "%9{0} = sst [smem:[#allocation8]] (%p8{0}_p3), %s8{0}_s8"
    text = LOOP.replace("{ %s92_s2", "{ " + (barrier + check + halt).format(1) + " ;;  %s92_s2")
    text = text.replace("   0xa   :  {}", "   0xa   :  { " + (barrier + check + halt).format(2) + " }")
    program, machine, times = emulate(text, {0: 3})
    assert times == [1, 3, 1]
    assert program.allocations["allocation8"] not in machine.smem


def test_what_nothing_follows_from_may_be_unknown():
    unused = LOOP.replace("   0x8   :  {}", "   0x8   :  { %s50_s9 = sfancy.s32 1, %s5_s2 }")
    assert emulate(unused, {0: 2})[2] == [1, 2, 1]


def test_a_choice_by_what_is_unknown_is_unknown():
    choice = "%s50_s9 = sld [smem:[#allocation7]] ;;  %p51_p4 = scmp.eq.s32.totalorder %s50_s9, 1"
    select = " ;;  %s52_s9 = scalar_select %p51_p4, 2, 3 ;;  %53 = sst [smem:[#allocation8]] %s52_s9"
    program, machine, _ = emulate(LOOP.replace("{ %s92_s2", "{ " + choice + select + " ;;  %s92_s2"), {0: 2})
    assert isinstance(machine.smem[program.allocations["allocation8"]], Unknown)


def test_delays_come_from_the_tables_before_and_after():
    head = "== CAPACITY:\nMXU, XLU, VALU\n== UTILIZATION:\n"
    # The first two columns say what is occupied, and differ.
    before = head + "\n".join(["0 0 1", "1 0 0", "1 0 0", "1 0 0", "0 0 2", "0 0 0", "0 0 0", "0 0 3", "0 0 0"])
    after = head + "\n".join(["0 0 1", "1 0 2", "0 0 0", "0 0 3"])
    assert bundles.cycles_of_bundles(before, after) == (4, 1, 2, 2)
    assert sum(bundles.cycles_of_bundles(before, before)) == 9
    # What waits for the second unit is joined with what it waits for.
    joined = head + "\n".join(["0 0 0 1", "0 0 1 0", "0 0 0 0", "0 0 2 0"])
    assert bundles.cycles_of_bundles(joined, head + "0 0 1 1\n0 0 2 0\n") == (3, 1)
    with pytest.raises(DumpError, match="do not fit"):
        bundles.cycles_of_bundles(before, after.replace("3", "4"))
    with pytest.raises(DumpError, match="more idle bundles after"):
        bundles.cycles_of_bundles(after, before)
    with pytest.raises(DumpError, match="no table"):
        bundles.cycles_of_bundles("", after)


def test_allocations_are_read_with_their_space():
    text = """  #allocation0 [shape = 'u32[]', space=smem, size = 0x4, offset = 0x4, fixed_abs, tag = 'smem constant byte address 0x4 - core index']
  #allocation1 [shape = 'u32[72,128]{1,0:T(1,128)}', space=vmem, size = 0x9000, scoped, tag = 'internal scratch']
"""  # noqa: E501
    core, scratch = bundles.parse_allocations(text)
    assert (core.space, core.nbytes, core.is_scoped) == ("smem", 4, False)
    assert core.tag.endswith("core index")
    assert (scratch.name, scratch.space, scratch.nbytes, scratch.is_scoped) == ("allocation1", "vmem", 0x9000, True)


@pytest.mark.parametrize(
    ("operation", "values", "result"),
    [
        ("sadd.s32 %s1_s1, %s2_s2", (2**31 - 1, 1), -(2**31)),
        ("ssub.s32 0, %s1_s1", (-(2**31), 0), -(2**31)),
        ("sadd.s32 4294967295, %s1_s1", (7, 0), 6),
        ("smul.u32 %s1_s1, %s2_s2", (65537, 65537), 131073),
        ("smulhi.u32 2863311531, %s1_s1", (300, 0), 200),
        ("sshrl.u32 %s1_s1, 28", (-1, 0), 15),
        ("sshra.s32 %s1_s1, 3", (-17, 0), -3),
        ("sshll.u32 %s1_s1, 4", (2**28, 0), 0),
        ("smin.u32 %s1_s1, %s2_s2", (-5, 5), 5),
        ("smax.s32 %s1_s1, %s2_s2", (-5, 5), 5),
        ("smov (%p1_p1, %s1_s1), %s2_s2", (3, 4), 4),
        ("smov (!%p1_p1, %s1_s1), %s2_s2", (3, 4), 3),
        ("scalar_select %p1_p1, %s1_s1, %s2_s2", (3, 4), 3),
        ("scalar_lea.hbm %s1_s1, %s2_s2", (3, 4), 7),
        ("scalar_lea.vmem %s1_s1, %s2_s2 [#allocation5]", (3, 4), 7),
        ("scmp.lt.u32.totalorder %s1_s1, %s2_s2", (-1, 1), False),
        ("scmp.lt.s32.totalorder %s1_s1, %s2_s2", (-1, 1), True),
        ("pnand %p1_p1, !%p1_p1", (0, 0), True),
        ("por %p1_p1, !%p1_p1", (0, 0), True),
        ("pneg %p1_p1", (0, 0), False),
    ],
)
def test_scalar_arithmetic_is_that_of_32_bits(operation, values, result):
    statement = Translator().statement(f"%s9_s9 = {operation}", "")
    functions = {name: getattr(Machine, name) for name in ("chosen", "least", "most")}
    scope = {"s1": values[0], "s2": values[1], "p1": True} | functions
    assert eval(statement.source, scope) == result
    assert statement.target == "s9"


def test_quotient_and_remainder_are_popped_in_turn():
    translator = Translator()
    lines = ["%5 = sdivrem.u32 %s1_s1, 7", "%s2_s2 = spop.drf %5", "%s3_s3 = spop.drf %5"]
    scope = {"s1": 45}
    for line in lines:
        exec(translator.statement(line, "").line(()), scope)
    assert (scope["s2"], scope["s3"]) == divmod(45, 7)
