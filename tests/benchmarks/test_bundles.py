"""Reading the compiler's bundles: loops, rounds, skipped regions, spills, time of the units."""

import textwrap

import pytest

from benchmarks.kernels import bundles
from benchmarks.kernels.bundles import Units
from v4jax.errors import UnsupportedError

UNITS = Units(width=256, flops_per_cycle=524_288)
ONE = 2 * 16 * 256 * 256  # FLOPs of one matrix instruction in bfloat16
DELAY = "\n".join(f" 0x{90 + i}   :  {{}}" for i in range(bundles.DELAY_BUNDLES))

# A grid of three steps; inside, a region that the first loop is skipped with, and two loops: one
# of four rounds, whose counter is spilled, one of as many as a scalar says.
TEXT = f"""\
= control target key start
LH: loop header
= control target key end

     0   :  {{ %s1_s0 = inlined_call_operand.hbm [shape: bf16[8,8], index: 0, kind: input
second_minor_factor: 1 */ }} /* entry bundle */
   0x1   :  {{ %s5_s5 = smov 0 /* copy for cssa */ }}
   0x2 LB: > {{ %s2_s2 = sphi %s5_s5, %s3_s3 /* phi copy :: iteration index, stage = 0 */ }} /*\
 Start region 9 */
   0x3   : > {{ %s6_s6 = smov (!%p1_p1), 0 /* copy for cssa */  ;;  %9 = sbr.rel (%p1_p1) target =\
 $region20 }}
{DELAY}
   0x8 LB: >> {{ %s7_s7 = sphi %s6_s6, %s8_s8 /* phi copy */ }} /* Start region 10 ::\
 Start region 11 */
   0x9   : >> {{ %s9_s9 = sadd.s32 1, %s7_s7  ;;  %v1 = vmatmul.mubr.bf16.gmra.mxu0 %v2 }}
   0xa   : >> {{ %10 = sst [smem:[#allocation4_spill]] %s9_s9 }}
   0xb   : >> {{ %s8_s8 = sld [smem:[#allocation4_spill]]  ;;  %11 = vst [vmem:[#allocation3_spill]\
 sm:$0xff] /*vst_source=*/%v1  ;;  %v4 = vld [vmem:[#allocation3_spill] sm:$0xff] }}
   0xc   : >> {{ %p2_p2 = scmp.ge.s32.totalorder %s8_s8, 4 /* loop exit test */ }}
   0xd   : >> {{ %12 = sbr.rel (!%p2_p2) target = $region10 }}
{DELAY}
  0x12 PF: > {{ %s3_s3 = sadd.s32 1, %s2_s2 }} /* Start/End empty region 20 */
  0x13 LB: >> {{ %s20_s20 = sphi %s21_s21, %s22_s22 /* phi copy */ }} /* Start region 12 */
  0x14   : >> {{ %s22_s22 = sadd.s32 1, %s20_s20 }}
  0x15   : >> {{ %p3_p3 = scmp.ge.s32.totalorder %s22_s22, %s40_s40 }}
  0x16   : >> {{ %13 = sbr.rel (!%p3_p3) target = $region12 }}
{DELAY}
  0x1b   : > {{ %p4_p4 = scmp.ge.s32.totalorder %s3_s3, 5 /* loop exit test */ }}
  0x1c   :  {{ %14 = sbr.rel (!%p4_p4) target = $region9 }}
{DELAY}
  0x21   :  {{ %15 = sbr.rel (%p5_p5) target = $region99 }}
{DELAY}
  0x26   :  {{ %16 = vsyncpa [#allocation7], 1 }}
"""
# Bundles: 2 before the grid; in it 2 + 4 delay, loop of 6 + 4, 1, loop of 4 + 4, 2 + 4; 6 after it.
GRID, FOUR, UNKNOWN = 31, 10, 8


def read(text: str = TEXT, units: Units = UNITS) -> bundles.Program:
    return bundles.read_program(textwrap.dedent(text), units)


def test_loops_and_rounds():
    found = [(loop.name, loop.end - loop.begin, loop.rounds, loop.is_grid) for loop in read().loops]
    assert found == [
        ("0", GRID, 3, True),  # five rounds, of which one fills and one drains the pipeline
        ("0.0", FOUR, 4, False),
        ("0.1", UNKNOWN, None, False),
    ]


def test_skipped_regions():
    """The jump behind the text ends the program: nothing inside the loops is skipped by it."""
    found = [(region.name, region.end - region.begin) for region in read().regions]
    assert found == [("0?0", FOUR), ("?0", 1)]


def test_totals():
    program = read()
    assert [loop.name for loop in program.unknown_loops({})] == ["0.1"]
    with pytest.raises(KeyError, match=r"0\.1"):
        program.total({}, {})
    work = program.total({"0.1": 7}, {"0.0": 0.5})
    outside = GRID - FOUR - UNKNOWN
    assert work.cycles == 8 + 3 * (outside + 0.5 * 4 * FOUR + 7 * UNKNOWN)
    assert work.issued_flops == 3 * 0.5 * 4 * ONE
    assert work.spills == 3 * 0.5 * 4 * 2  # a register each way; scalars do not count
    assert program.total({"0.1": 7}, {"0?0": 0.5}) == work


def test_one_round():
    program = read()
    grid, four, _ = program.loops
    assert program.total({"0.1": 0}, {}, four).cycles == FOUR
    assert program.total({"0.1": 0}, {}, grid).issued_flops == 4 * ONE
    assert program.own(grid).issued_flops == 0
    assert program.own(four, around_matrix_work=True).cycles == ONE / UNITS.flops_per_cycle
    assert program.busiest_loop({}, {}) == four
    assert program.runs(four, {}, {"0?0": 0.5}) == 6


def test_the_units_may_need_longer_than_the_bundles():
    slow = read(units=Units(width=256, flops_per_cycle=ONE // 128))
    assert slow.total({"0.1": 0}, {}, slow.loops[1]).cycles == 128


def test_products_that_do_not_fill_a_unit():
    half = read(units=Units(width=256, flops_per_cycle=524_288, depth=128))
    assert half.total({"0.1": 0}, {}).issued_flops == 3 * 4 * ONE / 2
    assert half.total({"0.1": 0}, {}).cycles == read().total({"0.1": 0}, {}).cycles


# What the reader must not guess about → a word of the message.
BROKEN = {
    "no bundles": ("nothing here", "no bundles"),
    "a loop that no branch closes": (
        TEXT.replace("target = $region10 ", "target = $region99 "),
        "marks",
    ),
    "an unknown type": (TEXT.replace("mubr.bf16", "mubr.e2m1"), "e2m1"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN.keys())
def test_broken(case):
    text, word = case
    with pytest.raises(UnsupportedError, match=word):
        read(text)


# How the last comparison reads → rounds.
TESTS = {
    "ge, repeat unless": ("ge", "!", 4),
    "ne, repeat if": ("ne", "", 4),
    "lt, repeat unless": ("lt", "!", None),
}


@pytest.mark.parametrize("case", TESTS.values(), ids=TESTS.keys())
def test_exit_tests(case):
    compare, negated, rounds = case
    text = TEXT.replace("%p2_p2 = scmp.ge", f"%p2_p2 = scmp.{compare}")
    text = text.replace("(!%p2_p2)", f"({negated}%p2_p2)")
    assert read(text).loops[1].rounds == rounds
