"""`Layout`: where a model lies. `Axes`: how the code of one device sees the axes that are split."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from v4jax.parallel.axes import ARRAY_RULES, COMPUTED_ON, WEIGHT_RULES, Tokens, WeightLayout


@dataclasses.dataclass(frozen=True)
class ExpertExchange:
    """How tokens travel to their experts.

    transport: "all_to_all" runs everywhere and sends whole buffers. "ragged" (TPU) sends only the
      rows in use. "gather" sends every token everywhere, for the few tokens of decoding. "auto"
      takes "gather" where all devices of the experts have the same tokens, else "all_to_all".
    payload: what travels to the experts: "activations", or "fp8" (e4m3 in blocks of 128). Numerics
      that round the experts' inputs to FP8 give the same results with both.
    slack: rows of a buffer, as a multiple of an even load's. A fuller load takes more rounds;
      nothing is dropped. A device with very many tokens sends an even load in several rounds, and
      the multiple is of one round's.
    """

    transport: Literal["auto", "all_to_all", "ragged", "gather"] = "auto"
    payload: Literal["activations", "fp8"] = "activations"
    slack: float = 1.5


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the rules by which weights are split over it, and how tokens reach their experts.

    A model carries its layout as a static attribute, so that a program compiled for one layout is
    never taken for another.
    """

    mesh: Mesh
    weight_layout: WeightLayout = "serve"
    exchange: ExpertExchange = ExpertExchange()

    @property
    def trains(self) -> bool:
        """Whether weights are also split for storage, and gathered where they are used."""
        return self.weight_layout == "train"

    def size(self, axes: tuple[str, ...]) -> int:
        """Returns the number of devices along these mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def array_axes(self, name: str | None, tokens: Tokens = "split") -> tuple[str, ...]:
        """Returns the mesh axes that split a logical axis of an array; those of size 1 left out."""
        return self._split(ARRAY_RULES[tokens].get(name, ()))

    def array_spec(self, *names: str | None, tokens: Tokens = "split") -> P:
        """Returns how an array with these logical axes is split (None: whole)."""
        return P(*(self.array_axes(name, tokens) or None for name in names))

    def weight_axes(self, name: str | None) -> tuple[str, ...]:
        """Returns the mesh axes that split a logical axis of a weight; those of size 1 left out."""
        return self._split(WEIGHT_RULES[self.weight_layout].get(name, ()))

    def _split(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The split logical axes, in the code that every device runs on its own shard.

    Sizes, indices and collectives by the name of a logical axis. Names of `COMPUTED_ON` follow the
    rules of the weights, all others those of the call's arrays. Without a layout, or for an axis
    that is not split, a size is 1 and a collective returns its argument.

    layout: None on a single device. tokens: whether the call's tokens are split.
    """

    layout: Layout | None = None
    tokens: Tokens = "split"

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes that split the logical axis `name`."""
        if self.layout is None:
            return ()
        if name in COMPUTED_ON:
            return self.layout.weight_axes(name)
        return self.layout.array_axes(name, self.tokens)

    def size(self, name: str) -> int:
        """Returns over how many devices the axis is split."""
        axes = self.mesh_axes(name)
        return self.layout.size(axes) if axes else 1

    def index(self, name: str) -> jax.Array | int:
        """Returns which shard of the axis this device has."""
        axes = self.mesh_axes(name)
        return jax.lax.axis_index(axes) if axes else 0

    def offset(self, name: str, size: int) -> jax.Array | int:
        """Returns the index of this device's first element, where every device has `size`."""
        return self.index(name) * size

    def psum(self, x: jax.Array, name: str) -> jax.Array:
        """Returns the sum of x over the devices that share the axis, computed in float32."""
        axes = self.mesh_axes(name)
        return jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype) if axes else x

    def pmax(self, x: jax.Array, name: str) -> jax.Array:
        """Returns the largest x of the devices that share the axis; it has no gradient."""
        axes = self.mesh_axes(name)
        return jax.lax.pmax(x, axes) if axes else x

    def all_gather(self, x: jax.Array, name: str, axis: int) -> jax.Array:
        """Returns the shards of all devices, joined in order along the array's `axis`."""
        axes = self.mesh_axes(name)
        return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


ONE_DEVICE = Axes()
