"""Low-rank adapters (LoRA): adding them to frozen weights, and merging them again.

    model = add_adapters(load(folder, "bfloat16"), LoraConfig(rank=16))
    ...                                  # trained: `state.split_model` separates the adapters
    merged = merge(model)                # plain weights, no adapters

A weight with adapters is a `LowRank`: base + (alpha / rank) · up · down. The base stays in its
stored format (FP4, FP8). Every expert has its own adapters, and so have its gate and its up
projection. The grouped output projection is one matrix [g·r, k], as in other LoRA code: its groups
share one `down`, and each has its own `up`.
"""

import math
import zlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from v4jax import log
from v4jax.checkpoint.names import stored_formats
from v4jax.config.run import LoraConfig
from v4jax.errors import ConfigError
from v4jax.model import Transformer
from v4jax.model.draw import draw_normal
from v4jax.model.weights import read_weights, variables, write_weights
from v4jax.parallel.weight_sharding import spec_of, split_parts
from v4jax.quant import LowRank, ScaledArray, quantize_weight
from v4jax.training.patterns import choose_named


def add_adapters(
    model: Transformer, lora: LoraConfig, seed: int = 0, among: Iterable[str] | None = None
) -> Transformer:
    """Returns the model with adapters that change nothing yet: `down` is random, `up` is 0.

    On a mesh an adapter is split like its weight; the rank is not split. Shapes in place of arrays
    give shapes.

    Args:
      among: names of the weights that may have adapters; None: all.

    Raises:
      ConfigError: a target names no weight that may, or a weight has adapters already.
    """
    weights = read_weights(model)
    names = choose_targets(model, lora, weights if among is None else among)
    numerics, layout = model.numerics, model.layout
    for name in names:
        if isinstance(weights[name], LowRank):
            raise ConfigError(f"{name} has adapters already; merge them first, or train those")

    def build(key) -> dict[str, LowRank]:
        made = {}
        for name in names:
            *lead, rows, columns = weights[name].shape
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            down = draw_normal(own, (*lead, lora.rank, columns), columns**-0.5)
            made[name] = down, jnp.zeros((*lead, rows, lora.rank))
        return made

    def join(made) -> dict[str, LowRank]:
        scale, rounds = lora.alpha / lora.rank, numerics.quantize_activations
        options = scale, numerics.activation_dtype, rounds
        return {name: LowRank(weights[name], *made[name], *options) for name in names}

    key = jax.random.key(seed)
    made = jax.eval_shape(build, key)
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model)):
        shardings = None
        if layout is not None:
            specs = {name: spec_of(variable) for name, variable in variables(model).items()}
            parts = {name: split_parts(value, specs[name]) for name, value in join(made).items()}
            put = lambda spec: NamedSharding(layout.mesh, spec)  # noqa: E731
            shardings = {name: (put(part.down), put(part.up)) for name, part in parts.items()}
        made = jax.jit(build, out_shardings=shardings)(key)
    return write_weights(model, join(made))


def choose_targets(model: Transformer, lora: LoraConfig, among: Iterable[str]) -> list[str]:
    """Returns the names of the matrices that a target names (`patterns.find_named`).

    Matrices are the weights that the release stores as FP4, FP8 or bfloat16 and multiplies with
    vectors; the embedding is none.

    Raises:
      ConfigError: a target names none of `among`.
    """
    formats, held = stored_formats(model.config), variables(model)
    matrices = [
        name
        for name in among
        if formats[name] != "float32" and name != "embed" and len(_matrix_axes(held[name])) >= 2
    ]
    chosen = choose_named(lora.targets, matrices, "lora.targets", what="matrix that may be trained")
    return [name for name in matrices if name in chosen]


def _matrix_axes(variable) -> list[str]:
    return [name for name in variable.get_metadata()["axes"] if name != "layers"]


def merge(model: Transformer, dtype: str | None = None, *, requantize: bool = False) -> Transformer:
    """Returns the model with plain weights in place of those with adapters; others stay as stored.

    Args:
      dtype: of the merged weights; None: the dtype of the activations, which gives the logits of
        the model with adapters. (Numerics that round the inputs of quantized weights round the
        inputs of a weight with adapters, but not those of a plain one.)
      requantize: whether merged weights get the format of their base again. Changes smaller than a
        step of the format are lost; the log says how much.
    """
    changed, norms = {}, []
    for name, value in read_weights(model).items():
        if not isinstance(value, LowRank):
            continue
        if requantize and isinstance(value.base, ScaledArray):
            changed[name], found = _requantize(value)
            norms.append(found)
        else:
            changed[name] = _merge(value, dtype or model.numerics.activation_dtype)
    if norms:
        change, loss = (math.sqrt(sum(float(norm[i]) for norm in norms)) for i in (0, 1))
        log.info(
            f"merge: {len(norms)} weights quantized again; the roundings are {loss / change:.0%} "
            "of the adapters' change (norms over all weights)"
            if change
            else f"merge: {len(norms)} weights quantized again; the adapters changed nothing"
        )
    return write_weights(model, changed)


@jax.jit
def _requantize(value: LowRank) -> tuple[ScaledArray, tuple[jax.Array, jax.Array]]:
    """Returns the weight in its base's format, and the squared norms of change and rounding."""
    weight = value.merge("float32")
    stored = quantize_weight(weight, "fp4" if value.base.is_fp4 else "fp8")
    change, loss = weight - value.base.dequantize(), stored.dequantize() - weight
    return stored, (jnp.square(change).sum(), jnp.square(loss).sum())


_merge = jax.jit(LowRank.merge, static_argnums=1)
