"""`python -m benchmarks.kernels`: what it prints and refuses; the compiler is replaced."""

import dataclasses
import json

import pytest

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import figures, schedule
from v4jax.errors import UnsupportedError
from v4jax.planning import ahead_of_time

LOOP = figures.LoopFigures("0.1", 1000, 4, 1000.0, 2.5e8, 0.477, 12)
FIGURES = figures.KernelFigures(
    op="scaled_matmul",
    case="scaled_matmul/v4_flash/prefill",
    kernel="scaled_matmul_fp8",
    inner=LOOP,
    loops=(LOOP,),
    regions=(("0?1", 77),),
    bundles=1234,
    cycles=654_321.0,
    flops=2.4e11,
    issued_flops=2.5e11,
    share=0.7,
    bound=1.0,
    goal=0.65,
    moved_bytes=3.0 * 2**20,
    memory_cycles=4321.0,
    spills=99.0,
    inner_part=0.876,
    goal_inner=None,
    goal_inner_part=None,
    notes=("64 tiles of 256 rows [even load]",),
)


@pytest.fixture
def compiler(monkeypatch):
    """Stands for libtpu: every case gives the same figures, "decode" does not compile."""
    asked = []

    def measure(topology, case, keep):
        asked.append((topology, case.key, keep))
        if "decode" in case.key:
            raise UnsupportedError("out of VMEM")
        return [FIGURES]

    monkeypatch.setattr(schedule, "measure", measure)
    monkeypatch.setattr(ahead_of_time, "why_unavailable", lambda: None)
    return asked


def test_table(compiler, capsys):
    arguments = ["--topology=v5p:2x2x1", "--only=scaled_matmul/v4_flash/prefill"]
    assert command.main(arguments) == 0
    assert compiler == [("v5p:2x2x1", "scaled_matmul/v4_flash/prefill", None)]
    shown = capsys.readouterr()
    assert "compiler's schedule, not a measurement" in shown.out
    for figure in ("654,321", "70.0 % ≥ 65 %", "87.6 %", "4,321", "64 tiles of 256 rows [even"):
        assert figure in shown.out
    assert "loop 0.1" not in shown.out
    assert "1 of 1, compiling scaled_matmul/v4_flash/prefill" in shown.err


def test_loops(compiler, capsys):
    assert command.main(["--only=scaled_matmul/v4_flash/prefill", "--loops"]) == 0
    shown = capsys.readouterr().out
    assert "1,234 bundles" in shown and "region 0?1" in shown
    (loop,) = [line for line in shown.splitlines() if "loop 0.1" in line]
    assert "1,000 bundles, 4 rounds, 0.250 GFLOPs a round, share 47.7 %, spills 12" in loop


def test_json_and_failures(compiler, capsys, tmp_path):
    arguments = ["--only=scaled_matmul", "--json", f"--keep={tmp_path}"]
    assert command.main([*arguments]) == 1
    raw = json.loads(capsys.readouterr().out)
    assert raw["source"] == "compiler's schedule, not a measurement"
    assert (raw["topology"], raw["flops_per_cycle"]) == ("v6e:2x2", 524_288)
    assert raw["kernels"][0]["share_of_bound"] == 0.7
    assert raw["failures"] == {"scaled_matmul/v4_flash/decode_64": "out of VMEM"}
    assert compiler[0][2] == tmp_path / "scaled_matmul-v4_flash-prefill"


def test_what_is_not_known_is_not_guessed():
    cells = command._cells(dataclasses.replace(FIGURES, cycles=None, share=None))
    assert cells[7] == "?" and cells[9] == "[red]-[/] ≥ 65 %"


def test_list(capsys):
    assert command.main(["--list", "--model=v4_pro", "--only=indexer"]) == 0
    assert capsys.readouterr().out.split() == [
        "indexer/v4_pro/prefill",
        "indexer/v4_pro/decode_16",
    ]


# name: arguments → words of the message
REFUSED = {
    "unknown model": ("--model=v3", "'v3'"),
    "unknown case": ("--only=softmax", "operations are"),
    "unknown generation": ("--topology=v4:2x2", "known generations"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refused(case, capsys):
    argument, words = case
    assert command.main([argument]) == 2
    assert words in capsys.readouterr().err


def test_without_libtpu(monkeypatch, capsys):
    monkeypatch.setattr(ahead_of_time, "why_unavailable", lambda: "libtpu is not installed")
    assert command.main([]) == 2
    assert "needs the TPU compiler: libtpu is not installed" in capsys.readouterr().err
