"""Infinities and NaNs in files: every code of every format is told from numbers, at its place."""

import pathlib
import re

import ml_dtypes
import numpy as np
import pytest

import v4jax
from v4jax.checkpoint import finite
from v4jax.checkpoint.finite import check_finite
from v4jax.checkpoint.safetensors_file import Tensor
from v4jax.errors import CheckpointError
from v4jax.parallel import make_mesh

from . import folders

# {dtype in a file: what reads its codes independently}
FORMATS = {
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


def tensor(dtype, shape) -> Tensor:
    return Tensor("layers.0.w", dtype, shape, pathlib.Path("a.safetensors"), 0)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_code(dtype):
    width = np.dtype(FORMATS[dtype]).itemsize
    codes = np.arange(1 << (8 * width), dtype=f"u{width}")
    good = np.isfinite(codes.view(FORMATS[dtype]).astype(np.float32))
    check_finite(tensor(dtype, codes[good].shape), codes[good])
    assert 1 <= (~good).sum() < len(codes) // 8
    for code in codes[~good]:
        values = np.array([[0, 1, 2], [3, code, 5]], codes.dtype)
        with pytest.raises(CheckpointError, match=rf"code 0x{code:0{2 * width}X} .* at \[1, 1\];"):
            check_finite(tensor(dtype, values.shape), values)


WIDE = {"F32": (np.float32, np.uint32), "F64": (np.float64, np.uint64)}


@pytest.mark.parametrize("dtype", WIDE)
def test_wide_formats(dtype):
    kind, unsigned = WIDE[dtype]
    largest = np.finfo(kind).max
    check_finite(tensor(dtype, (3,)), np.array([largest, -largest, -0.0], kind))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        values = np.array([0.0, 1.0, bad], kind)
        code = f"{values.view(unsigned)[2]:X}"
        with pytest.raises(CheckpointError, match=rf"the {dtype} code 0x{code} .* at \[2\]"):
            check_finite(tensor(dtype, (3,)), values)
    smallest_nan = np.array([finite._BAD[dtype][1] + 1], unsigned).view(kind)  # one bit set
    assert np.isnan(smallest_nan)
    with pytest.raises(CheckpointError):
        check_finite(tensor(dtype, (1,)), smallest_nan)


def test_bytes_are_scales_or_packed():
    values = np.array([[1, 255]], np.uint8)
    for dtype in ("I8", "U8"):
        check_finite(tensor(dtype, values.shape), values)
    with pytest.raises(CheckpointError, match=r"the U8 code 0xFF .* at \[0, 1\]"):
        check_finite(tensor("U8", values.shape), values, scales=True)
    check_finite(tensor("I64", (1,)), np.array([-1]))


def test_place_in_a_part(monkeypatch):
    monkeypatch.setattr(finite, "_BLOCK_BYTES", 8)
    values = np.zeros((6, 5), np.uint8)
    values[4, 3] = 0x7F
    with pytest.raises(CheckpointError, match=r"at \[104, 13\]; fetch the file again"):
        check_finite(tensor("F8_E4M3", (200, 20)), values, (100, 10))


# A name of the folder, the place, and what is put there.
STORED = {
    "scale of FP8": ("layers.2.attn.wq_a.scale", (0, 0), 255, "F8_E8M0 code 0xFF"),
    "scale of FP4": ("layers.3.ffn.experts.2.w1.scale", (5, 1), 255, "F8_E8M0 code 0xFF"),
    "FP8": ("layers.2.attn.wq_a.weight", (3, 7), 0x7F, "F8_E4M3 code 0x7F"),
    "negative FP8": ("mtp.0.attn.wo_b.weight", (63, 0), 0xFF, "F8_E4M3 code 0xFF"),
    "bfloat16": ("norm.weight", (9,), 0x7FC0, "BF16 code 0x7FC0"),
    "float32": ("layers.4.hc_ffn_fn", (2, 100), 0xFF800000, "F32 code 0xFF800000"),
}


@pytest.mark.parametrize("name, place, code, message", STORED.values(), ids=STORED.keys())
def test_folder(tmp_path, name, place, code, message):
    tensors = folders.tensors_of()
    array = tensors[name].copy()
    array.view(f"u{array.itemsize}")[place] = code
    folders.write(tmp_path, tensors | {name: array})
    said = rf"tensor {re.escape(name)} in .*safetensors must hold finite .*{message} "
    said += rf".* at {re.escape(str(list(place)))}"
    with pytest.raises(CheckpointError, match=said):
        v4jax.load(tmp_path)
    if name == "layers.3.ffn.experts.2.w1.scale":
        with pytest.raises(CheckpointError, match=said):
            v4jax.load(tmp_path, mesh=make_mesh(expert=4, context=2))
