"""From bundles to figures; one small kernel through the real compiler."""

import pytest
import test_bundles

from benchmarks.kernels import cases, figures, schedule
from benchmarks.kernels.cases import Case, Kernel
from benchmarks.kernels.figures import Traced
from v4jax.errors import UnsupportedError
from v4jax.planning import ahead_of_time

CORE = figures.CORES["v6e"]
CALL = Traced("product", grid=(None, 3), parallel=(False, True), result=(8, 8))
ONE = test_bundles.ONE


def count(kernel: Kernel, core=CORE, call=CALL) -> figures.KernelFigures:
    case = Case("op", "model", "shape", lambda: None, (), (kernel,))
    return figures.count(test_bundles.TEXT, core, case, "product.1", call)


def test_figures():
    found = count(Kernel("product", flops=11 * ONE, moved_bytes=2**20, grid=(1,), rounds=(7,)))
    cycles = 8 + 3 * (13 + 4 * test_bundles.FOUR + 7 * test_bundles.UNKNOWN)
    assert found.cycles == cycles
    assert found.share == pytest.approx(11 * ONE / cycles / 524_288)
    assert (found.issued_flops, found.spills) == (12 * ONE, 24)
    assert found.memory_cycles == pytest.approx(2**20 / (1638 / 918 * 524.288))
    assert (found.inner.name, found.inner.flops, found.inner.cycles) == ("0.0", ONE, 10)
    assert found.inner_part == pytest.approx(120 / cycles)
    assert found.notes == ()


def test_unknown_rounds_give_no_figures_of_the_whole():
    found = count(Kernel("product", flops=ONE, grid=(1,)))
    assert found.cycles is found.share is found.inner_part is None
    assert found.inner.share is not None
    assert "no rounds of 1 loops, the case of 0" in found.notes[0]
    assert "0.1 (8 bundles)" in found.notes[0]


def test_too_many_flops_are_an_error_of_the_case():
    found = count(Kernel("product", flops=13 * ONE, grid=(1,), rounds=(7,)))
    assert found.share is None
    assert "do not explain" in found.notes[0]


def test_kernels_without_description_are_shown():
    found = count(Kernel("other"))
    assert found.kernel == "product"
    assert "not described" in found.notes[0]


def test_two_cores_share_a_grid():
    """A grid of six of which the text runs three: the other core has the rest."""
    call = Traced("product", grid=(2, 3), parallel=(True, False), result=())
    kernel = Kernel("product", flops=4 * ONE, moved_bytes=100.0, rounds=(7,))
    both = count(kernel, figures.CORES["v5p"], call)
    assert (both.flops, both.moved_bytes, both.notes) == (2 * ONE, 50, ())
    call = Traced("product", grid=(1, 3), parallel=(True, False), result=())
    alone = count(kernel, figures.CORES["v5p"], call)
    assert alone.notes[0] == "runs on 1 of 2 cores"


def test_visits_of_the_region_around_loops():
    text = test_bundles.TEXT.replace("%s8_s8, 4 /*", "%s8_s8, %s41_s41 /*")
    case = Case("op", "model", "shape", lambda: None, (), (
        Kernel("product", grid=(1,), rounds=(4, 7), visits={(0, 0): 0.5}),
    ))  # fmt: skip
    found = figures.count(text, CORE, case, "product.1", CALL)
    assert found.issued_flops == 3 * 0.5 * 4 * ONE


def test_calls_are_told_apart_by_name_and_result():
    calls = [Traced("product", (), (), (8, 8)), Traced("product", (), (), (4, 8))]
    calls.append(Traced("product_backward", (), (), (4, 8)))
    assert schedule._called(calls, "jvp_product_.2", (4, 8)) is calls[1]
    assert schedule._called(calls, "transpose_product_backward.1", (1,)) is calls[2]
    assert schedule._called(calls, "fusion", (4, 8)) is None


def test_traced_calls():
    calls = schedule.trace(cases.find("grouped_matmul/v4_flash/decode_16", CORE.target))
    assert [call.name for call in calls] == ["grouped_matmul_gated_fp4", "scaled_matmul_fp4"]
    assert calls[0].grid[-1] is None and calls[0].parallel == (True, False)


def test_unknown_topology():
    with pytest.raises(UnsupportedError, match="known generations"):
        figures.core_of("v4:2x2x1")


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(ahead_of_time, "why_unavailable", lambda: "libtpu is not installed")
    case = cases.find("scaled_matmul/v4_flash/decode_64", CORE.target)
    with pytest.raises(UnsupportedError, match="libtpu is not installed"):
        schedule.measure("v6e:2x2", case)


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_end_to_end(topology, tmp_path):
    """Rounds of all loops are found, and explain the FLOPs: no padding in this shape."""
    case = cases.find("scaled_matmul/v4_flash/decode_64", CORE.target)
    (found,) = schedule.measure(topology, case, tmp_path / "kept")
    assert found.kernel == "scaled_matmul_fp8"
    assert 0.1 < found.share <= 1
    assert found.flops <= found.issued_flops < 2.1 * found.flops
    assert list((tmp_path / "kept").glob("*final_bundles.txt"))
