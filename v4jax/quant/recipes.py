"""Recipes: values in place of a weight, from which the weight is made right before its use.

    LowRank   a frozen weight as it is stored, and the adapters that are trained beside it
    Master    a float32 weight that computes as its stored format will hold it

`model.weights.materialize` expands them layer by layer: an expanded weight lives no longer than its
layer. Trained arrays may be missing (None) while they are kept elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from v4jax.quant.formats import round_to
from v4jax.quant.scaled_array import FP4_BLOCK, FP8_BLOCK, ScaledArray, quantize_weight

Format = Literal["fp4", "fp8", "bfloat16"]
Decode = Callable[[ScaledArray, str], jax.Array]
_BLOCKS = {"fp4": FP4_BLOCK, "fp8": FP8_BLOCK}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + scale · up · down: a frozen weight with low-rank adapters (LoRA).

    base: [..., out, in], an array or a `ScaledArray`. down: float32 [..., rank, in]. up: float32
    [..., out, rank]. Leading axes (layers, experts, gate and up) are batch. dtype: of the expanded
    weight. rounds_inputs: a matmul rounds what enters, if it does for `base`.
    """

    base: jax.Array | ScaledArray
    down: jax.Array | None
    up: jax.Array | None
    scale: float = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    rounds_inputs: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.base.shape

    @property
    def block(self) -> tuple[int, int] | None:
        """The tile that shares a scale in the base; None without scales."""
        return getattr(self.base, "block", None)

    def expand(self, decode: Decode) -> jax.Array | ScaledArray:
        """Returns the weight as a layer uses it.

        One expert at a time: what is float32 on the way stays small.

        Args:
          decode: what makes an array of a stored base, exactly.
        """
        parts, merge = self._parts, functools.partial(_merge, self.scale, self.dtype, decode)
        mapped = self.up.ndim > 2
        weight = jax.lax.map(lambda one: merge(*one), parts) if mapped else merge(*parts)
        quantized = isinstance(self.base, ScaledArray)
        return _as_quantized(weight) if quantized and self.rounds_inputs else weight

    def merge(self, dtype: str) -> jax.Array:
        """Returns the weight as a plain array, summed in float32 and rounded once."""
        return _merge(self.scale, dtype, ScaledArray.dequantize, *self._parts)

    @property
    def _parts(self):
        return self.base, self.down, self.up


def _merge(scale, dtype, decode, base, down, up):
    if isinstance(base, ScaledArray):
        base = decode(base, dtype)
    base = base.astype(jnp.float32)
    change = jnp.einsum(
        "...or,...ri->...oi", up, down, preferred_element_type=jnp.float32, precision="highest"
    )
    return round_to(base + scale * change, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Master:
    """A float32 weight that is rounded to its stored format on the way (spec G.6).

    The gradient passes the rounding as if it were none. values: float32 [..., out, in]; a vector
    if the format is bfloat16. dtype: of the expanded weight. rounds_inputs: a matmul rounds what
    enters, as it does for the weight stored in FP4 or FP8.
    """

    values: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    rounds_inputs: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def block(self) -> tuple[int, int] | None:
        """The tile that shares a scale in the stored format; None without scales."""
        return _BLOCKS.get(self.format)

    def store(self) -> jax.Array | ScaledArray:
        """Returns the weight in its stored format."""
        if self.format == "bfloat16":
            return round_to(self.values, jnp.bfloat16)
        return quantize_weight(self.values, self.format)

    def expand(self, decode: Decode) -> jax.Array | ScaledArray:
        """Returns what `store` holds, in `dtype`; nothing stored is there to be decoded."""
        del decode
        weight = _round(self.values, self.format, self.dtype)
        return _as_quantized(weight) if self.block and self.rounds_inputs else weight


Recipe = LowRank | Master


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _round(values, fmt: Format, dtype: str):
    stored = Master(values, fmt, dtype, rounds_inputs=False).store()
    return stored.dequantize(dtype) if isinstance(stored, ScaledArray) else stored.astype(dtype)


@_round.defjvp
def _round_tangent(fmt, dtype, primals, tangents):
    return _round(*primals, fmt, dtype), tangents[0].astype(dtype)


def _as_quantized(weight: jax.Array) -> ScaledArray:
    """Returns an expanded weight for which a matmul rounds its inputs as for a quantized one.

    Its values are the weight's own, so that gradients pass, under one scale, which is 1.
    """
    *lead, out, width = weight.shape
    return ScaledArray(weight, jnp.ones((*lead, 1, 1), jnp.float32), (out, width))
