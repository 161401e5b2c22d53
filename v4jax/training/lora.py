"""Low-rank adapters (LoRA): a model with adapters beside frozen weights, and what they merge to.

    model = add_adapters(load(folder, "bfloat16"), LoraConfig(rank=16))
    ...                                  # trained: `step.split_model` takes the adapters out
    merged = merge(model)                # plain weights, no adapters

A weight with adapters is a `LowRank`: base + (alpha / rank) · up · down. The base stays as it is
stored (FP4, FP8); every expert, and gate and up of each, have adapters of their own. So have the
groups of the grouped output projection an `up`, while they share one `down`: it is one matrix
[g·r, k], as in other LoRA code.
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
from v4jax.model.weights import read_weights, variables, write_weights
from v4jax.parallel.weights import spec_of, split_parts
from v4jax.quant import LowRank, ScaledArray, quantize_weight


def add_adapters(
    model: Transformer, lora: LoraConfig, seed: int = 0, among: Iterable[str] | None = None
) -> Transformer:
    """Returns the model with adapters, which change nothing yet: `down` is random, `up` is 0.

    On a mesh each adapter lies like its weight, the rank whole. Shapes in place of arrays give
    shapes.

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
            down = jax.random.normal(own, (*lead, lora.rank, columns)) / math.sqrt(columns)
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
    """Returns the names of the matrices that have a target: its words in a row, as whole words.

    Matrices are what the release stores as FP4, FP8 or bfloat16 and multiplies with vectors, which
    leaves out the embedding.

    Raises:
      ConfigError: a target names none of `among`.
    """
    formats, held = stored_formats(model.config), variables(model)
    matrices = [
        name
        for name in among
        if formats[name] != "float32" and name != "embed" and len(_matrix_axes(held[name])) >= 2
    ]
    found = {target: [n for n in matrices if _has(n, target)] for target in lora.targets}
    for target, names in found.items():
        if not names:
            known = sorted({".".join(n.split(".")[-2:]) for n in matrices})
            raise ConfigError(
                f"train.lora.targets: {target!r} names no matrix that may be trained; there are "
                f"{', '.join(known)}"
            )
    chosen = {name for names in found.values() for name in names}
    return [name for name in matrices if name in chosen]


def _matrix_axes(variable) -> list[str]:
    return [name for name in variable.get_metadata()["axes"] if name != "layers"]


def _has(name: str, target: str) -> bool:
    return f".{target}." in f".{name}."


def merge(model: Transformer, dtype: str | None = None, *, requantize: bool = False) -> Transformer:
    """Returns the model with plain weights in place of those with adapters; others stay as stored.

    Args:
      dtype: of the merged weights; None: the activations' dtype, in which they give the logits of
        the model with adapters. (Numerics that round what enters quantized weights round what
        enters a weight with adapters, but not what enters a plain one.)
      requantize: back to the format of the base. A change smaller than a step of the format is
        lost; how much is logged.
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
    """Returns the weight in the base's format, and the squared norms of change and rounding."""
    weight = value.merge("float32")
    stored = quantize_weight(weight, "fp4" if value.base.is_fp4 else "fp8")
    change, loss = weight - value.base.dequantize(), stored.dequantize() - weight
    return stored, (jnp.square(change).sum(), jnp.square(loss).sum())


_merge = jax.jit(LowRank.merge, static_argnums=1)


def count_bytes(frozen: Transformer, state) -> dict[str, int]:
    """Returns the bytes that a run keeps, by kind; shapes are enough.

    fp4, fp8: frozen weights and their scales. bfloat16, float32, int32: other frozen arrays.
    trained: the weights of the optimizer, in float32. optimizer: its moments. On a mesh these are
    bytes of all devices together.

    From shapes, in GiB: Flash with rank 16 on attention and experts under AdamW keeps fp4 140.3,
    fp8 5.6, bfloat16 2.6, float32 0.1, trained 12.6, optimizer 25.2; with attention alone trained
    0.2 and optimizer 0.4.
    """
    kinds: dict[str, int] = {}

    def add(kind: str, tree) -> None:
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        if size:
            kinds[kind] = kinds.get(kind, 0) + size

    for variable in variables(frozen).values():
        value = variable.get_value()
        base = value.base if isinstance(value, LowRank) else value
        if isinstance(base, ScaledArray):
            add("fp4" if base.is_fp4 else "fp8", base)
        else:
            for leaf in jax.tree.leaves(base):
                add(str(leaf.dtype), leaf)
    add("trained", (state.weights, state.biases))
    add("optimizer", state.optimizer)
    return kinds
