"""Slices by name and by shape; the figures of the table are consistent."""

import pytest

from v4jax.costs import chips
from v4jax.errors import ConfigError

# name → shape, chips, devices (a tpu7x chip is two)
SLICES = {
    "v6e-16": ((4, 4), 16, 16),
    "v5e-256": ((16, 16), 256, 256),
    "v5p-16": ((2, 2, 2), 8, 8),
    "v5p:2x2x4": ((2, 2, 4), 16, 16),
    "tpu7x-8": ((2, 2, 1), 4, 8),
    "tpu7x:2x2x4": ((2, 2, 4), 16, 32),
    "h100-8": ((8,), 8, 8),
    "H200-16": ((16,), 16, 16),
}


@pytest.mark.parametrize("name", SLICES)
def test_names(name):
    topology = chips.parse_topology(name)
    assert SLICES[name] == (topology.shape, topology.chips, topology.devices)


def test_several_slices():
    topology = chips.parse_topology("v6e-256", slices=2)
    assert (topology.chips, topology.name) == (512, "2 slices of v6e:16x16")


BROKEN = {
    "unknown chip": ("a100-8", "must be one of v5e, v5p, v6e, tpu7x, h100, h200"),
    "no such slice": ("v6e-17", "usual are v6e-1, v6e-4, v6e-8, v6e-16"),
    "odd TensorCores": ("v5p-17", "TensorCores, two a chip"),
    "rank": ("v5p:4x4", "must have 3 positive sizes on v5p, such as v5p:2x2x2"),
    "zero": ("v6e:0x4", "2 positive sizes"),
}


@pytest.mark.parametrize("name, message", BROKEN.values(), ids=BROKEN.keys())
def test_errors(name, message):
    with pytest.raises(ConfigError, match=message):
        chips.parse_topology(name)


# Peak bf16 FLOPs per cycle and device × the clock consistent with it (GHz).
CLOCKS = {
    "v5e": (131_072, 1.5),
    "v5p": (2 * 131_072, 1.75),
    "v6e": (524_288, 1.75),
    "tpu7x": (524_288, 2.2),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_peaks_agree_with_units_times_clock(name):
    flops_per_cycle, gigahertz = CLOCKS[name]
    chip = chips.CHIPS[name]
    expected = flops_per_cycle * gigahertz * 1e9 * chip.devices
    assert chip.bf16_flops_per_second == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("chip", chips.CHIPS.values(), ids=chips.CHIPS.keys())
def test_figures(chip):
    assert chip.source
    assert chip.device_limit_bytes <= chip.hbm_bytes / chip.devices
    assert chip.network_bytes_per_second < chip.link_bytes_per_second < chip.hbm_bytes_per_second


def test_slices_grow():
    sizes = [topology.chips for topology in chips.larger(chips.parse_topology("v6e-16"))]
    assert sizes == [32, 64, 128, 256]


def test_hops():
    assert chips.parse_topology("v5p:4x4x4").mean_hops == 3.0  # three rings of four
    assert chips.parse_topology("v6e:4x4").mean_hops == 2.5  # two open lines of four
    assert chips.parse_topology("h100-8").mean_hops == 1.0
