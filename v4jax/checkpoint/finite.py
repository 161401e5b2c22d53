"""Finds infinities and NaNs in files while they are read, by comparing integers.

One NaN in one weight turns every answer of a model into noise, and nothing reports it. In each
format the codes of infinities and NaNs are the largest ones, among the codes with sign bit 0 and
among those with sign bit 1. Two maxima find them, of the codes read as signed and as unsigned
integers:

    F8_E8M0    scale 255 (NaN)            F8_E4M3    0x7F and 0xFF (NaN)
    BF16, F16, F32, F64, F8_E5M2          exponent all ones (infinity and NaN)

FP4 has no such codes.
"""

import numpy as np

from v4jax.checkpoint.safetensors_file import Tensor
from v4jax.errors import CheckpointError

# {dtype in the file: (width in bytes, smallest bad code with sign bit 0, with sign bit 1)}
_BAD = {
    "F8_E8M0": (1, None, 0xFF),
    "F8_E4M3": (1, 0x7F, 0xFF),
    "F8_E5M2": (1, 0x7C, 0xFC),
    "F16": (2, 0x7C00, 0xFC00),
    "BF16": (2, 0x7F80, 0xFF80),
    "F32": (4, 0x7F800000, 0xFF800000),
    "F64": (8, 0x7FF0 << 48, 0xFFF0 << 48),
}
_BLOCK_BYTES = 1 << 20  # compared twice while it is in the processor's cache


def check_finite(
    tensor: Tensor, values: np.ndarray, start: tuple[int, ...] = (), *, scales: bool = False
) -> None:
    """Raises unless all values of a tensor, or of a part of it, are numbers.

    Args:
      values: as stored, contiguous.
      start: index of the part's first element in the tensor.
      scales: bytes are e8m0 scales, and no packed FP4.

    Raises:
      CheckpointError: one is not; the message says which, where and how it is stored.
    """
    dtype = "F8_E8M0" if scales and tensor.dtype == "U8" else tensor.dtype
    if dtype not in _BAD:
        return
    width, positive, negative = _BAD[dtype]
    codes = np.ascontiguousarray(values).reshape(-1).view(f"u{width}")
    signed = codes.view(f"i{width}")
    step = _BLOCK_BYTES // width
    for first in range(0, len(codes), step):
        block = slice(first, first + step)
        bad = codes[block].max() >= negative
        if bad or (positive is not None and signed[block].max() >= positive):
            raise _error(tensor, values.shape, start, codes, positive, negative)


def _error(tensor, shape, start, codes, positive, negative) -> CheckpointError:
    bad = codes >= negative
    if positive is not None:
        bad |= (codes >= positive) & (codes < 1 << (8 * codes.itemsize - 1))
    place = np.unravel_index(int(np.argmax(bad)), shape)
    start = (0,) * (len(shape) - len(start)) + start
    index = [int(at + first) for at, first in zip(place, start, strict=True)]
    code = int(codes[np.argmax(bad)])
    return CheckpointError(
        f"tensor {tensor.name} in {tensor.file} must hold finite numbers, got the {tensor.dtype} "
        f"code 0x{code:0{2 * codes.itemsize}X} (infinity or NaN) at {index}; fetch the file again, "
        "or write it from a run that has not diverged"
    )
