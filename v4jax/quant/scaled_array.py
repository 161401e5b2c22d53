"""`ScaledArray`: a quantized weight as one pytree, kept in memory as the checkpoint stores it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.quant import formats
from v4jax.shapes import ceil_div

FP8_BLOCK = (128, 128)
FP4_BLOCK = (1, 32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledArray:
    """Values and their block scales; `block` gives the tile [out, in] that shares a scale.

    values: float8_e4m3fn [..., out, in], or uint8 [..., out, in/2] holding two FP4 codes a byte.
    scales: uint8 (e8m0 bytes) or float32 (powers of two) [..., ⌈out/block₀⌉, ⌈in/block₁⌉].

    Leading axes (experts, layers) are batch.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})

    @property
    def is_fp4(self) -> bool:
        """Whether the values are packed FP4."""
        return self.values.dtype == jnp.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., out, in]."""
        *lead, width = self.values.shape
        return (*lead, 2 * width if self.is_fp4 else width)

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales together."""
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in (self.values, self.scales))

    def __getitem__(self, index) -> "ScaledArray":
        """Indexes leading (batch) axes only."""
        return ScaledArray(self.values[index], self.scales[index], self.block)

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """Returns value × scale [..., out, in]; exact in float32 and in bfloat16 (spec D.3)."""
        values = formats.decode_fp4(formats.unpack_fp4(self.values)) if self.is_fp4 else self.values
        scales = self.scales
        if scales.dtype == jnp.uint8:
            scales = formats.decode_e8m0(scales)
        out, width = self.shape[-2:]
        for axis, (size, block) in enumerate(zip((out, width), self.block, strict=True), start=-2):
            if block > 1:
                scales = jnp.repeat(scales, block, axis=axis)
            scales = jax.lax.slice_in_dim(scales, 0, size, axis=scales.ndim + axis)
        return (values.astype(jnp.float32) * scales).astype(dtype)


def abstract_weight(shape: tuple[int, ...], fmt: str) -> ScaledArray:
    """Returns the shapes and dtypes of a quantized weight [..., out, in], without arrays."""
    *lead, out, width = shape
    block, dtype, stored = FP8_BLOCK, jnp.float8_e4m3fn, width
    if fmt == "fp4":
        block, dtype, stored = FP4_BLOCK, jnp.uint8, width // 2
    scales = (*lead, ceil_div(out, block[0]), ceil_div(width, block[1]))
    values = jax.ShapeDtypeStruct((*lead, out, stored), dtype)
    return ScaledArray(values, jax.ShapeDtypeStruct(scales, jnp.uint8), block)


@partial(jax.jit, static_argnames="fmt")
def quantize_weight(weight: jax.Array, fmt: str) -> ScaledArray:
    """Quantizes a weight [..., out, in] to the release's storage format.

    Args:
      fmt: "fp8" (e4m3, one scale per 128×128 tile) or "fp4" (packed e2m1, one scale per row and 32
        columns).

    Source: spec D.6: s = 2^⌈log2(amax/largest)⌉.
    """
    weight = jnp.asarray(weight, jnp.float32)
    if fmt == "fp4":
        return ScaledArray(*formats.quantize_fp4(weight, FP4_BLOCK[1]), FP4_BLOCK)
    assert fmt == "fp8", fmt
    (out, width), (rows, columns) = weight.shape[-2:], FP8_BLOCK
    lead = [(0, 0)] * (weight.ndim - 2)
    padded = jnp.pad(weight, [*lead, (0, -out % rows), (0, -width % columns)])
    # [..., out, in] → [..., out/128, 128, in/128, 128]: amax over each tile
    tiles = padded.reshape(
        *weight.shape[:-2], ceil_div(out, rows), rows, ceil_div(width, columns), columns
    )
    scales = formats.scale_byte(
        jnp.max(jnp.abs(tiles), axis=(-3, -1)), formats.FP8_MAX, formats.FP8_AMAX_FLOOR
    )
    scaled = tiles / formats.decode_e8m0(scales)[..., :, None, :, None]
    values = jnp.clip(scaled, -formats.FP8_MAX, formats.FP8_MAX).reshape(padded.shape)
    return ScaledArray(values[..., :out, :width].astype(jnp.float8_e4m3fn), scales, FP8_BLOCK)
