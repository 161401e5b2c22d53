"""The arrays of a model and of a cache: name, size and format of each.

Arrays may be `jax.ShapeDtypeStruct`s; nothing is allocated. If they have shardings, `device_bytes`
says what one device holds.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.config import LayerKind, ModelConfig
from v4jax.quant import ScaledArray

DRAFT, MTP = "draft module", "MTP"

# Component of a weight: the first pattern that its path contains.
_COMPONENTS = (
    (r"^mtp\.", MTP),
    (r"^drafter\.", DRAFT),
    (r"attention\.indexer\.", "index projections"),
    (r"attention\.compressor\.", "compressor"),
    (r"_hyper\.|^collapse\.", "hyper-connections"),
    (r"moe\.experts\.", "routed experts"),
    (r"moe\.shared\.", "shared expert"),
    (r"moe\.router\.", "router"),
    (r"norm\.|\.sink$", "norms and sinks"),
    (r"attention\.", "attention projections"),
    (r"^embed$", "embedding"),
    (r"^head$", "head"),
)
_DRAFT_KEYS = (
    r"^drafter\.(context_(projection|norm)|stages\.\d+\.attention\.key_value)"
    r"|^mtp\.0\.(embed_|stream_|block\.attention_(hyper|norm)|block\.attention\.key_value)"
)
_NO_PRODUCT = (
    "embed",
    "markov_embed",
    "position_bias",
    "table",
)  # looked up or added, not multiplied


@dataclasses.dataclass(frozen=True)
class Weight:
    """One stored value of a model.

    path: its name in the module, such as "stack.prefix.0.moe_norm.weight". shape, axes: logical;
    packed FP4 counts single codes. value: an array, a `ScaledArray`, or their shapes. trained:
    False for routing tables and router biases.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    value: Any
    trained: bool

    @property
    def fmt(self) -> str:
        """How it is stored: "fp4", "fp8" or a dtype."""
        if isinstance(self.value, ScaledArray):
            return "fp4" if self.value.is_fp4 else "fp8"
        return str(jnp.dtype(self.value.dtype))

    @property
    def component(self) -> str:
        """The part of the model that it belongs to, as reports name it."""
        return next(name for pattern, name in _COMPONENTS if re.search(pattern, self.path))

    @property
    def parameters(self) -> int:
        """Logical elements, scales not counted; 0 for routing tables, which are no weights."""
        return 0 if self.path.endswith(".table") else math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of values and scales, whole."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.value))

    @property
    def is_matrix(self) -> bool:
        """Whether tokens are multiplied with it."""
        rank = len(self.shape) - ("layers" in self.axes)
        return rank >= 2 and self.path.rpartition(".")[2] not in _NO_PRODUCT

    @property
    def drafts(self) -> bool:
        """Whether it belongs to what drafts tokens: a draft module, or an MTP block."""
        return self.component in (DRAFT, MTP)

    @property
    def makes_draft_keys(self) -> bool:
        """Whether every served token passes it, drafts or not: the keys that drafts will see."""
        return self.drafts and bool(re.search(_DRAFT_KEYS, self.path))

    @property
    def is_routed(self) -> bool:
        """Whether a token passes only its chosen share of the leading expert axis."""
        return self.axes[-4:-3] == ("experts",) or self.axes[-3:-2] == ("experts",)


@dataclasses.dataclass(frozen=True)
class Inventory:
    """A configuration and every stored value of its model, MTP blocks included."""

    config: ModelConfig
    weights: tuple[Weight, ...]


@dataclasses.dataclass(frozen=True)
class CacheArray:
    """One array of a cache: what it holds ("window", "csa", "hca", "index", "unfinished …")."""

    holds: str
    value: Any

    @property
    def bytes(self) -> int:
        """Bytes of the array, whole."""
        return math.prod(self.value.shape) * self.value.dtype.itemsize

    @property
    def entries(self) -> int | None:
        """How many compressed entries of a sequence fit; None if it holds no entries."""
        return self.value.shape[2] if self.holds in ("csa", "hca", "index") else None


def list_weights(variables: Mapping[str, nnx.Variable]) -> tuple[Weight, ...]:
    """Returns the weights of a model, given its variables by name (`model.weights.variables`)."""
    return tuple(_describe(path, variable) for path, variable in variables.items())


def _describe(path: str, variable: nnx.Variable) -> Weight:
    value = variable.get_value()
    axes = tuple(variable.get_metadata().get("axes") or ())
    return Weight(path, tuple(value.shape), axes, value, isinstance(variable, nnx.Param))


def list_cache(cache: Any) -> tuple[CacheArray, ...]:
    """Returns the arrays of a cache, but for its lengths."""
    stored = [
        CacheArray(name, array)
        for name, arrays in cache.stored.items()
        for array in arrays.values()
    ]
    unfinished = [
        CacheArray(f"unfinished {name}", array) for name, array in cache.unfinished.items()
    ]
    return (*stored, *unfinished)


def device_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of the arrays of a pytree.

    Arrays without a sharding are whole on every device.
    """
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "shape"))


def _shard_bytes(array: Any) -> int:
    sharding = getattr(array, "sharding", None)
    shape = array.shape if sharding is None else sharding.shard_shape(array.shape)
    return math.prod(shape) * array.dtype.itemsize


def count_layers(config: ModelConfig, kind: LayerKind) -> int:
    """Returns how many main layers are of a kind."""
    return sum(layer.kind is kind for layer in config.layers)
