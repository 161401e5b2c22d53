"""`Stacked`: one layer of an array that holds all layers, indexed only where it is used."""

import dataclasses

import jax
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """Stands for `array[layer]`, without copying it.

    A scan that slices its weights copies them on every step. Routed experts are most of a model and
    a step uses few of them, so scanned layers that only infer pass their experts as this.
    """

    array: jax.Array
    layer: Int[Array, ""]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the one layer."""
        return self.array.shape[1:]

    @property
    def dtype(self):
        """Dtype of the array."""
        return self.array.dtype

    def __getitem__(self, index: Int[Array, ""]) -> jax.Array:
        """Returns `array[layer, index]`, one dynamic slice."""
        start = (self.layer, index, *(0,) * (self.array.ndim - 2))
        sizes = (1, 1, *self.array.shape[2:])
        return jax.lax.dynamic_slice(self.array, start, sizes)[0, 0]
