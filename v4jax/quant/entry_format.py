"""How one cached vector is stored: window entries, compressed entries, index keys.

`decode(encode(x))` is the rounding that the published code applies to a key-value vector, so
quantization of activations and storage in the cache are the same thing.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from v4jax.quant import formats
from v4jax.shapes import ceil_div, round_up

ENTRY_BLOCK = 64  # channels that share an FP8 scale
INDEX_BLOCK = 32  # channels that share an FP4 scale
SCALE_ALIGNMENT = (
    8  # scale bytes of an FP8 entry are padded to this, as in the published 584-byte layout
)


@dataclasses.dataclass(frozen=True)
class EntryFormat:
    """Storage of vectors of `channels`, of which the last `rope_channels` are rotated.

    kind: `float32` | `bfloat16` | `fp8` (e4m3 blocks, rotated channels in `dtype`) | `fp4` (all
      channels, Hadamard
    rotation first). `dtype` is the activations' and what `decode` returns.
    """

    kind: Literal["float32", "bfloat16", "fp8", "fp4"]
    channels: int
    rope_channels: int
    dtype: Literal["float32", "bfloat16"]

    def encode(self, x: Float[Array, "... c"]) -> dict[str, jax.Array]:
        """Returns the stored arrays of `x`, each [..., bytes or channels]."""
        if self.kind == "fp8":
            plain = self.channels - self.rope_channels
            values, scales = formats.quantize_fp8(x[..., :plain], ENTRY_BLOCK)
            padding = round_up(scales.shape[-1], SCALE_ALIGNMENT) - scales.shape[-1]
            scales = jnp.pad(scales, [(0, 0)] * (scales.ndim - 1) + [(0, padding)])
            return {
                "values": values,
                "rope": formats.round_to(x[..., plain:], self.dtype),
                "scales": scales,
            }
        if self.kind == "fp4":
            rotated = formats.hadamard(formats.round_to(x, self.dtype))
            packed, scales = formats.quantize_fp4(rotated, INDEX_BLOCK)
            return {"packed": packed, "scales": scales}
        return {"values": formats.round_to(x, self.kind)}

    def decode(self, stored: dict[str, jax.Array]) -> Float[Array, "... c"]:
        """Returns the vectors that `stored` holds, in `dtype`."""
        if self.kind == "fp8":
            count = ceil_div(self.channels - self.rope_channels, ENTRY_BLOCK)
            plain = formats.dequantize_fp8(
                stored["values"], stored["scales"][..., :count], ENTRY_BLOCK
            )
            rope = stored["rope"].astype(jnp.float32)
            return jnp.concatenate([plain, rope], axis=-1).astype(self.dtype)
        if self.kind == "fp4":
            return formats.dequantize_fp4(stored["packed"], stored["scales"], INDEX_BLOCK).astype(
                self.dtype
            )
        return stored["values"].astype(self.dtype)

    def round(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        """Returns `decode(encode(x))`, whose gradient passes the rounding as if it were none.

        For what is computed with and not kept: training (straight-through estimator), queries. A
        rotation is no rounding: its gradient rotates back.

        Source: spec G.6.
        """
        return _round(self, x)

    @property
    def unpacked(self) -> "EntryFormat":
        """The format that keeps what `round` returns as it is."""
        return dataclasses.replace(self, kind=self.dtype)

    def zeros(self, *lead: int) -> dict[str, jax.Array]:
        """Returns stored arrays of shape [*lead, …], all zero."""
        shapes = jax.eval_shape(self.encode, jax.ShapeDtypeStruct((1, self.channels), jnp.float32))
        return {name: jnp.zeros((*lead, x.shape[-1]), x.dtype) for name, x in shapes.items()}

    @property
    def bytes_per_entry(self) -> int:
        """Bytes of one stored vector with padding (published: entry 584, index key 68)."""
        shapes = jax.eval_shape(self.encode, jax.ShapeDtypeStruct((1, self.channels), jnp.float32))
        return sum(x.shape[-1] * x.dtype.itemsize for x in shapes.values())


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _round(stored_as: EntryFormat, x):
    return stored_as.decode(stored_as.encode(x))


@_round.defjvp
def _round_tangent(stored_as, primals, tangents):
    (x,), (tangent,) = primals, tangents
    # Autodiff of the casts would round the gradient to e4m3 without a scale; FP4 codes have none.
    tangent = tangent.astype(stored_as.dtype)
    if stored_as.kind == "fp4":
        tangent = formats.hadamard(tangent)
    return _round(stored_as, x), tangent
