"""The comparison with V3.2 against the report's printed digits (spec C.3, C.4)."""

import importlib.util
import json

import pytest

from docs.tools import efficiency

# tokens → V3.2, Pro, %, Flash, %
CACHE_GIB = {
    32_768: (1.4669, 0.1578, 10.76, 0.1102, 7.52),
    131_072: (5.8677, 0.6184, 10.54, 0.4320, 7.36),
    262_144: (11.7354, 1.2326, 10.50, 0.8610, 7.34),
    524_288: (23.4707, 2.4610, 10.49, 1.7189, 7.32),
    1_048_576: (46.9414, 4.9178, 10.48, 3.4349, 7.32),
}
GIGAFLOPS = {
    32_768: (179.4, 128.0, 71.4, 35.4, 19.7),
    131_072: (277.7, 146.5, 52.8, 43.6, 15.7),
    262_144: (408.7, 171.2, 41.9, 54.6, 13.4),
    524_288: (670.7, 220.6, 32.9, 76.7, 11.4),
    1_048_576: (1194.6, 319.4, 26.7, 120.7, 10.1),
}


@pytest.fixture(scope="module")
def rows():
    return efficiency.compare()


@pytest.mark.parametrize("tokens", CACHE_GIB)
def test_cache_of_the_real_arrays(rows, tokens):
    pro, flash = (row for row in rows if row.tokens == tokens)
    gib = efficiency.GIB
    found = (
        *(efficiency.Predecessor().cache_bytes(tokens) / gib, pro.cache_bytes / gib),
        *(100 * pro.cache_share, flash.cache_bytes / gib, 100 * flash.cache_share),
    )
    assert [round(x, d) for x, d in zip(found, (4, 4, 2, 4, 2), strict=True)] == list(
        CACHE_GIB[tokens]
    )


@pytest.mark.parametrize("tokens", GIGAFLOPS)
def test_operations(rows, tokens):
    pro, flash = (row for row in rows if row.tokens == tokens)
    found = (
        *(efficiency.Predecessor().flops(tokens) / 1e9, pro.flops / 1e9, 100 * pro.flops_share),
        *(flash.flops / 1e9, 100 * flash.flops_share),
    )
    # The specification prints 71.4 for what is 71.349 here: its digits came from rounded sums.
    assert found == pytest.approx(GIGAFLOPS[tokens], abs=0.055)


def test_a_million_is_ten_to_the_sixth_in_the_figure():
    """The report's figure annotates 3.7 and 9.8 times, 9.5 and 13.7 times for the cache."""
    pro, flash = efficiency.compare((1_000_000,))
    assert [round(1 / row.flops_share, 2) for row in (pro, flash)] == [3.69, 9.83]
    assert [round(100 * row.flops_share, 2) for row in (pro, flash)] == [27.07, 10.17]
    assert [round(1 / row.cache_share, 1) for row in (pro, flash)] == [9.5, 13.7]


def test_predecessor_by_hand():
    fp8, plain = efficiency.Predecessor().linear_parameters()
    assert (fp8 + plain) / 1e9 == pytest.approx(37.48, abs=0.005)
    assert fp8 / 1e9 == pytest.approx(36.4, abs=0.05)


def test_command(capsys):
    assert efficiency.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "     1 M    46.9414     4.9178    10.48     3.4349     7.32" in lines
    assert lines[-1].endswith("10.10%") and lines[-1].count("█") == 5
    assert efficiency.main(["--json"]) == 0
    assert round(json.loads(capsys.readouterr().out)[-1]["flops_share"], 3) == 0.101
    states = "18.7 MB (v4_pro), 12.2 MB (v4_flash)"
    assert any(states in line for line in lines)


def test_plot(rows, tmp_path, capsys):
    path = tmp_path / "efficiency.png"
    status = efficiency.main([f"--plot={path}"])
    if importlib.util.find_spec("matplotlib") is None:
        assert status == 2 and "pip install matplotlib" in capsys.readouterr().err
        return
    assert path.read_bytes().startswith(b"\x89PNG")
