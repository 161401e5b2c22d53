"""Reading needs the model's memory and no second copy of it, measured in a fresh process."""

from benchmarks import load
from v4jax.checkpoint import census, total
from v4jax.config import get_numerics
from v4jax.model import abstract_transformer

MIB = 2**20
# What a process needs besides arrays: parsed headers, threads' buffers, the allocator's reserve.
OVERHEAD_BYTES = 32 * MIB


def test_peak_memory(tmp_path):
    config = load.make_config(0.25)
    load.write_random(config, tmp_path / "in")
    result = load.measure_elsewhere(tmp_path / "in", tmp_path / "out")
    entries = census(abstract_transformer(config, get_numerics("released")))
    size, largest = total(entries).memory_bytes, max(entry.memory_bytes for entry in entries)
    assert result["model_bytes"] == size > 200 * MIB
    assert result["host_peak_bytes"] < largest + OVERHEAD_BYTES
    assert result["read_peak_bytes"] < size + OVERHEAD_BYTES
    assert result["write_peak_bytes"] < size + largest + OVERHEAD_BYTES
