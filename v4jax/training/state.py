"""A model in training: the arrays that a step changes, and the rest.

    frozen, weights, biases = split_model(model, names)
    state = init_state(frozen, weights, biases, optimizer)
    model = join_model(frozen, state)     # in every step: weights as the computation uses them
    model = finish(frozen, state)         # in the end: weights as they are exported

An array has the name of its weight. Adapters append what they are: "….lora_down", "….lora_up".
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from v4jax.config import ModelConfig
from v4jax.model import Transformer
from v4jax.model.weights import read_weights, variables, write_weights
from v4jax.parallel import Layout
from v4jax.parallel.weight_sharding import name_of, weight_shardings, weight_spec
from v4jax.quant import LowRank, Master, ScaledArray

# What an array's name appends to its weight's, by its path inside the weight's value.
_SUFFIXES = {".values": "", ".down": ".lora_down", ".up": ".lora_up"}
_RELEASED_FLOAT32 = ("fn", "base", "scale", "sink", "position_bias")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A model without its trained arrays.

    arrays: the others by name. names: of all arrays in the order of the tree. narrowed: trained
    ones that the computation takes in the dtype of its activations.
    """

    arrays: dict[str, Array]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    narrowed: frozenset[str] = dataclasses.field(metadata={"static": True})
    tree: jax.tree_util.PyTreeDef = dataclasses.field(metadata={"static": True})

    def join(self, trained: Mapping[str, Array]) -> Transformer:
        """Returns the whole model."""
        arrays = self.arrays | trained
        return self.tree.unflatten(arrays[name] for name in self.names)

    @functools.cached_property
    def outline(self) -> Transformer:
        """The model with the name of every array in its place."""
        return self.tree.unflatten(self.names)

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.outline.config

    @property
    def layout(self) -> Layout | None:
        """Where the model is on a mesh."""
        return self.outline.layout

    def shardings(self) -> dict[str, NamedSharding]:
        """Returns the sharding of every array of a model on a mesh, by name."""
        leaves = jax.tree.leaves(weight_shardings(self.outline, self.layout))
        return dict(zip(self.names, leaves, strict=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes, and a checkpoint keeps.

    step: updates done or skipped, the position in the schedule of the rate. weights: trained arrays
    by name, float32. biases: of the routers that choose by score. optimizer: optax's state.
    skipped: steps in a row that were skipped.
    """

    step: Int[Array, ""]
    weights: dict[str, Array]
    biases: dict[str, Array]
    optimizer: optax.OptState
    skipped: Int[Array, ""]


def split_model(
    model: Transformer, trained: Iterable[str], formats: Mapping[str, str] | None = None
) -> tuple[Frozen, dict, dict]:
    """Returns the frozen part, the trained arrays as they are stored, and the routers' biases.

    Of a weight with adapters, these are trained. Biases move where their router is trained. Shapes
    in place of arrays give shapes.

    Args:
      trained: names of weights.
      formats: of trained weights that the computation rounds to a stored format.

    Raises:
      ConfigError: the mesh splits a weight inside the tiles it is rounded in.
    """
    held, weights, used, narrowed = variables(model), {}, {}, set()
    for name in trained:
        value = held[name].get_value()
        if isinstance(value, LowRank):
            weights |= {f"{name}.lora_down": value.down, f"{name}.lora_up": value.up}
            continue
        weights[name], used[name] = value, jax.ShapeDtypeStruct(value.shape, jnp.float32)
        if fmt := (formats or {}).get(name):
            used[name] = _round_later(model, held[name], name, fmt)
        elif name.rsplit(".", 1)[-1] not in _RELEASED_FLOAT32:
            narrowed.add(name)
    biases = {
        name: value
        for name, value in read_weights(model, buffers=True).items()
        if name.endswith("router.bias") and name.removesuffix("bias") + "weight" in weights
    }
    leaves, tree = jax.tree_util.tree_flatten_with_path(write_weights(model, used))
    arrays = {_array_name(path): leaf for path, leaf in leaves}
    frozen = {k: v for k, v in arrays.items() if k not in weights and k not in biases}
    return Frozen(frozen, tuple(arrays), frozenset(narrowed), tree), weights, biases


def _round_later(model: Transformer, variable, name: str, fmt: str) -> Master:
    """Returns the shape of a weight that the computation rounds."""
    numerics, shape = model.numerics, variable.get_value().shape
    values = jax.ShapeDtypeStruct(shape, jnp.float32)
    master = Master(values, fmt, numerics.activation_dtype, numerics.quantize_activations)
    if model.layout is not None:
        # Checks the tiles. What is split for storage alone is rounded after it is gathered.
        weight_spec(name, master, variable.get_metadata()["axes"], model.layout)
    return master


def _array_name(path) -> str:
    owner, _, part = name_of(path).partition(".value")
    return owner + _SUFFIXES.get(part, part)


def init_state(
    frozen: Frozen, weights: dict, biases: dict, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step, every array made on the devices that hold it.

    Args:
      weights, biases: of `split_model`.
    """
    build = functools.partial(_build_state, optimizer)
    if frozen.layout is None:
        return build(weights, biases)
    abstract = abstract_state(frozen, weights, biases, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(build, out_shardings=shardings)(weights, biases)


def abstract_state(
    frozen: Frozen, weights: dict, biases: dict, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state as `jax.ShapeDtypeStruct`s with shardings; nothing is allocated.

    Moments are split like their weights; everything small is whole on every device.
    """
    state = jax.eval_shape(functools.partial(_build_state, optimizer), weights, biases)
    if frozen.layout is None:
        return state
    shardings, everywhere = frozen.shardings(), NamedSharding(frozen.layout.mesh, P())

    def annotate(path, leaf):
        # Under the name of a weight there is that weight or a moment of it.
        names = [entry.key for entry in path if getattr(entry, "key", None) in shardings]
        sharding = shardings[names[-1]] if names else everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(annotate, state)


def _build_state(optimizer, weights: dict, biases: dict) -> TrainState:
    # Copies, because a step may reuse the buffers of its state.
    masters = {name: as_float32(value) for name, value in weights.items()}
    biases = jax.tree.map(lambda x: jnp.array(x, copy=True), biases)
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    return TrainState(step, masters, biases, optimizer.init(masters), skipped)


def as_float32(value) -> Array:
    """Returns a new float32 array of a weight, however it is stored."""
    if isinstance(value, ScaledArray):
        return value.dequantize()
    return jnp.array(value, jnp.float32, copy=True)


def join_model(frozen: Frozen, state: TrainState) -> Transformer:
    """Returns the whole model, the trained weights as the computation uses them.

    Matrices are in the dtype of the activations. What is released as float32 stays so, and so do
    adapters and weights that are rounded on the way.
    """
    dtype = frozen.outline.numerics.activation_dtype
    weights = {
        name: array.astype(dtype) if name in frozen.narrowed else array
        for name, array in state.weights.items()
    }
    return frozen.join(weights | state.biases)


def compile_forward(frozen: Frozen, function: Callable) -> Callable:
    """Returns function(model, …) as a compiled function of (state, …); all devices get its results.

    Args:
      function: takes the whole model as the computation uses it.
    """

    def run(frozen, state, *arguments):
        return function(join_model(frozen, state), *arguments)

    everywhere = frozen.layout and NamedSharding(frozen.layout.mesh, P())
    return functools.partial(jax.jit(run, out_shardings=everywhere), frozen)


def finish(frozen: Frozen, state: TrainState) -> Transformer:
    """Returns the trained model: weights in float32, or as they were rounded on the way; adapters.

    A weight that was rounded while it trained comes out in its stored format, exactly as the
    computation used it. Adapters stay beside their base: `lora.merge`, `write_adapters`.
    """
    model = frozen.join(state.weights | state.biases)
    masters = {k: v for k, v in read_weights(model).items() if isinstance(v, Master)}
    return write_weights(model, {name: store(value) for name, value in masters.items()})


store = jax.jit(Master.store)
