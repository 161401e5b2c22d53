"""The arrays a plan counts: every weight of the abstract model, every array of the abstract cache.

Shapes come from the code that runs (`abstract_transformer`, `init_cache`); nothing is allocated.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from flax import nnx

from v4jax.cache import init_cache
from v4jax.config import LayerKind, ModelConfig, Numerics
from v4jax.model import abstract_transformer
from v4jax.model.parameters import Buffer, Storage
from v4jax.quant import ScaledArray

# Component of a weight: the first pattern that its path contains.
_COMPONENTS = (
    (r"^mtp\.", "MTP"),
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
_NO_PRODUCT = ("embed", "position_bias", "table")  # looked up or added, not multiplied


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter of the model.

    shape, axes: logical, as in the checkpoint. value: the abstract array, or `ScaledArray` of
    abstract arrays. fmt: "fp4", "fp8" or a dtype. trained: False for routing tables and biases.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fmt: str
    value: jax.ShapeDtypeStruct | ScaledArray
    component: str
    trained: bool

    @property
    def parameters(self) -> int:
        """Logical elements, scales not counted."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of values and scales on one device without any split."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.value))

    @property
    def is_matrix(self) -> bool:
        """Whether tokens are multiplied with it."""
        rank = len(self.shape) - ("layers" in self.axes)
        return rank >= 2 and self.path.rpartition(".")[2] not in _NO_PRODUCT

    @property
    def is_routed(self) -> bool:
        """Whether a token passes only its chosen share of the leading expert axis."""
        return self.axes[-4:-3] == ("experts",) or self.axes[-3:-2] == ("experts",)


@functools.lru_cache(maxsize=16)
def list_weights(config: ModelConfig, storage: Storage = "released") -> tuple[Weight, ...]:
    """Returns every parameter of the model, MTP blocks included."""
    model = abstract_transformer(config, _numerics(), storage=storage)
    return tuple(
        _describe(".".join(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    )


def _numerics() -> Numerics:
    from v4jax.config import get_numerics

    return get_numerics("released")  # decides no weight's shape


def _describe(path: str, variable: nnx.Variable) -> Weight:
    value = variable.get_value()
    scaled = isinstance(value, ScaledArray)
    fmt = ("fp4" if value.is_fp4 else "fp8") if scaled else str(jnp.dtype(value.dtype))
    component = next(name for pattern, name in _COMPONENTS if re.search(pattern, f"{path}"))
    return Weight(
        path=path,
        shape=tuple(value.shape),
        axes=tuple(variable.get_metadata().get("axes") or ()),
        fmt=fmt,
        value=value,
        component=component,
        trained=not isinstance(variable, Buffer),
    )


@dataclasses.dataclass(frozen=True)
class CacheArray:
    """One array of the cache: what it holds ("window", "csa", "hca", "index", "unfinished …")."""

    path: str
    holds: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        """Bytes on one device without any split."""
        return math.prod(self.shape) * self.itemsize


@functools.lru_cache(maxsize=64)
def list_cache(
    config: ModelConfig, numerics: Numerics, batch: int, max_tokens: int, entry_shares: int = 1
) -> tuple[CacheArray, ...]:
    """Returns every array that `init_cache` would allocate, whole."""
    sizes = batch, max_tokens, entry_shares
    cache = jax.eval_shape(lambda: init_cache(config, numerics, *sizes))
    found = []
    for name, arrays in cache.stored.items():
        rows = "window" if name == "window" else "entries"
        for key, array in arrays.items():
            axes = ("layers", "batch", rows, "entry")
            found.append(_cached(f"stored.{name}.{key}", name, array, axes))
    for name, array in cache.unfinished.items():
        axes = ("layers", "batch", "slot", "pair", "entry")
        found.append(_cached(f"unfinished.{name}", f"unfinished {name}", array, axes))
    found.append(_cached("lengths", "lengths", cache.lengths, ("batch",)))
    return tuple(found)


def _cached(path, holds, array, axes) -> CacheArray:
    assert len(axes) == array.ndim, (path, array.shape)
    return CacheArray(path, holds, tuple(array.shape), axes, array.dtype.itemsize)


def count_layers(config: ModelConfig, kind: LayerKind) -> int:
    """Returns how many main layers are of a kind."""
    return sum(layer.kind is kind for layer in config.layers)
