"""The table of cases: keys, and FLOPs and bytes against numbers worked out by hand."""

import pytest

from benchmarks.kernels import cases
from v4jax.errors import RequestError
from v4jax.kernels import Target

TPU = Target("tpu")

# case, kernel → FLOPs, in factors that can be checked against the model's sizes.
FLOPS = {
    # 2,048 tokens × 6 experts × 2 · 4,096 · (2 · 2,048)
    ("grouped_matmul/v4_flash/prefill_fp4", "grouped_matmul_gated_fp4"): 412_316_860_416,
    ("grouped_matmul/v4_flash/prefill_fp4", "scaled_matmul_fp4"): 206_158_430_208,
    # 16 × 6 × 2 · 7,168 · 3,072
    ("grouped_matmul/v4_pro/decode_16", "scaled_matmul_fp4"): 96 * 2 * 7168 * 3072,
    # 2,048 tokens × 2 · (64 · 512) · 1,024
    ("scaled_matmul/v4_flash/prefill", "scaled_matmul_fp8"): 137_438_953_472,
    # entries seen: 4 tokens each see 261,633 … 262,143, the last 262,144; × 2 · 64 · 128
    ("indexer/v4_flash/decode_16", "indexer_select"): 16 * 262_144 * 16_384,
    ("indexer/v4_flash/prefill", "indexer_select"): (
        16_384 * (4 * sum(range(261_633, 262_144)) + 3 * 261_632 + 262_144)
    ),
    # 2,048 tokens × 64 heads × (128 + 512) keys × 4 · 512
    ("sparse_attention/v4_flash/prefill", "sparse_attention"): 171_798_691_840,
    # 16 sequences × 128 heads × (128 + 8,192) × 4 · 512
    ("dense_attention/v4_pro/decode_16", "dense_attention"): 16 * 128 * 8320 * 2048,
    # every token sees 128 raw keys of a window that is full
    ("dense_attention/v4_flash/prefill_window_layer", "dense_attention"): 2048 * 64 * 128 * 2048,
    # 2,048 tokens × 2 · (4 · 7,168) · 24
    ("hyper_connections/v4_pro/prefill", "hyper_connections"): 2048 * 2 * 28_672 * 24,
}


@pytest.mark.parametrize(("key", "name"), FLOPS)
def test_flops(key, name):
    (kernel,) = [k for k in cases.find(key, TPU).kernels if k.name == name]
    assert kernel.flops == FLOPS[key, name]


def test_training_counts_first_windows_and_entries():
    """8,192 tokens from the start on, an entry per 128; the backward pass has five products."""
    forward, backward = cases.find("dense_attention/v4_flash/training_8192", TPU).kernels
    windows = 128 * 129 // 2 + (8192 - 128) * 128
    entries = 128 * sum(range(64)) + 64
    assert forward.flops == (windows + entries) * 64 * 4 * 512
    assert backward.flops == forward.flops * 5 / 2


def test_bytes_of_experts():
    """Half a byte and a 32nd a weight, rows in and out in bfloat16."""
    gated, _ = cases.find("grouped_matmul/v4_flash/prefill_fp4", TPU).kernels
    weights = 32 * 2 * 2048 * 4096
    assert gated.moved_bytes == weights / 2 + weights / 32 + 12_288 * 2 * (4096 + 2048)


def test_bytes_of_an_expansion():
    """As stored, and two bytes a weight."""
    (kernel,) = cases.find("scaled_matmul/v4_flash/expansion_fp4", TPU).kernels
    weights = 32 * 2 * 2048 * 4096
    assert kernel.moved_bytes == weights / 2 + weights / 32 + 2 * weights
    assert kernel.flops is None


def test_bounds():
    """64 rows of heads fill a quarter of a unit 256 wide; 128 channels half of its depth."""
    _, sparse, _ = cases.find("sparse_attention/v4_flash/prefill", TPU).kernels
    assert (sparse.bound_for(256), sparse.bound_for(128)) == (0.25, 0.5)
    assert sparse.goal_for(256) == pytest.approx(0.15)
    (index,) = cases.find("indexer/v4_flash/prefill", TPU).kernels
    assert (index.bound_for(256), index.bound_for(128)) == (0.5, 1.0)
    (dense,) = cases.find("dense_attention/v4_flash/prefill", TPU).kernels
    assert (dense.bound_for(256), dense.goal_for(256)) == (1.0, 0.65)


def test_keys_are_found_again():
    keys = [case.key for case in cases.select(TPU, cases.MODELS)]
    assert len(set(keys)) == len(keys)
    assert cases.find(keys[-1], TPU).key == keys[-1]
    only = cases.select(TPU, ("v4_pro",), ("indexer", "decode_64"))
    decoding = {"rotation", "hyper_connections", "scaled_matmul"}
    assert {case.op for case in only} == {"indexer"} | decoding
    assert {case.model for case in only} == {"v4_pro"}


def test_unknown_cases():
    with pytest.raises(RequestError, match="operations are dense_attention"):
        cases.select(TPU, ("v4_flash",), ("index", "softmax"))
    with pytest.raises(RequestError, match="no benchmark case"):
        cases.find("indexer/v4_flash", TPU)
