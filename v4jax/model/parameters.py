"""Declaring parameters: shape, stored format and logical axes in one line each.

A matrix is kept [out, in], as in the checkpoint, so that reading and writing change no byte. Its
value is a plain array or a `ScaledArray`.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax.config import ModelConfig
from v4jax.model.draw import draw_normal
from v4jax.quant import ScaledArray, abstract_weight, quantize_weight

Storage = Literal["released", "float32", "bfloat16"]
Format = Literal["fp4", "fp8", "bfloat16", "float32"]


class Buffer(nnx.Variable):
    """A stored value that no gradient trains: routing tables and router biases."""


@dataclasses.dataclass(frozen=True)
class Declare:
    """Makes the parameters of one block.

    storage: "released" keeps each parameter in the format of the released checkpoint; "float32" and
      "bfloat16" keep what the release quantizes or stores as bfloat16 in that dtype. Parameters
      released as float32 stay so.
    rngs: draws the values; None declares shapes (`jax.ShapeDtypeStruct`) in place of arrays.
    repeats: leading axis of every parameter of a scanned block; None for a single block.
    """

    config: ModelConfig
    storage: Storage
    rngs: nnx.Rngs | None
    repeats: int | None = None

    def matrix(self, fmt: Format, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
        """Declares a weight [..., out, in], normally distributed with `initializer_range`."""
        shape = self._lead(shape)
        if self.rngs is None:
            return self._param(jax.ShapeDtypeStruct(shape, jnp.float32), fmt, axes)
        value = draw_normal(next_key(self.rngs), shape, self.config.initializer_range)
        return self._param(value, fmt, axes)

    def constant(self, fmt: Format, value: float, shape: tuple[int, ...], axes: tuple[str, ...]):
        """Declares a parameter that starts at one value everywhere."""
        shape = self._lead(shape)
        if self.rngs is None:
            return self._param(jax.ShapeDtypeStruct(shape, jnp.float32), fmt, axes)
        return self._param(np.full(shape, value, np.float32), fmt, axes)

    def buffer(self, value: np.ndarray, axes: tuple[str, ...]) -> Buffer:
        """Declares a stored value that is not trained; every repeat starts equal."""
        shape = self._lead(value.shape)
        if self.rngs is None:
            return Buffer(jax.ShapeDtypeStruct(shape, value.dtype), axes=self._axes(axes))
        return Buffer(jnp.broadcast_to(value, shape), axes=self._axes(axes))

    def _param(self, value, fmt, axes):
        if fmt != "float32" and self.storage != "released":
            fmt = self.storage
        if self.rngs is None:
            value = _abstract_value(value.shape, fmt)
        elif fmt in ("fp4", "fp8"):
            value = quantize_weight(value, fmt)
        else:
            value = jnp.asarray(value.astype(jnp.dtype(fmt)))
        return nnx.Param(value, axes=self._axes(axes))

    def _lead(self, shape):
        return shape if self.repeats is None else (self.repeats, *shape)

    def _axes(self, axes):
        return axes if self.repeats is None else ("layers", *axes)


def _abstract_value(shape: tuple[int, ...], fmt: Format) -> jax.ShapeDtypeStruct | ScaledArray:
    if fmt in ("fp4", "fp8"):
        return abstract_weight(shape, fmt)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(fmt))


def next_key(rngs: nnx.Rngs) -> jax.Array:
    """Returns what `rngs.params()` returns.

    Under a transformation flax's own call takes most of the time of building a model: it asks
    tracers for a sharding, and JAX searches the whole trace to explain that they have none.
    """
    stream = rngs.params
    count = stream.count.get_value()
    stream.count.set_value(count + 1)
    return jax.random.fold_in(stream.key.get_value(), count)
