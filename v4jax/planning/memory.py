"""Bytes of one device by kind: weights, cache, gradients and optimizer, activations.

Every array is asked of the code that makes it, and split by the rules that split it there
(`parallel.weight_sharding.weight_spec`, `parallel.axes`). Activations are an estimate from traced
layers (`layer_trace.py`); `v4jax plan --compile` asks the compiler instead.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from v4jax.cache import init_cache
from v4jax.config.run import LoraConfig
from v4jax.costs.inventory import CacheArray, Weight, list_cache
from v4jax.model import take_inventory
from v4jax.parallel.weight_sharding import weight_spec
from v4jax.planning.layer_trace import trace_layers
from v4jax.planning.workload import Workload
from v4jax.quant import ScaledArray
from v4jax.shapes import ceil_div


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """What one device holds during a step, by kind and within a kind by what it is."""

    weights: dict[str, int]
    cache: dict[str, int]
    optimizer: dict[str, int]
    activations: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(sum(getattr(self, field.name).values()) for field in dataclasses.fields(self))

    @property
    def arguments(self) -> int:
        """Bytes that a step is given; the others it makes.

        Where weights are trained, it is given them in float32, and makes what it computes with.
        """
        kept = sum(size for name, size in self.optimizer.items() if name != "gradients")
        weights = 0 if "float32 weights" in self.optimizer else sum(self.weights.values())
        return weights + sum(self.cache.values()) + kept


def count_bytes(work: Workload, traced: bool = True) -> DeviceBytes:
    """Returns the bytes of one device by kind.

    Args:
      traced: whether layers are traced for their activations (seconds); left out otherwise.
    """
    return DeviceBytes(
        weights=weight_bytes(work),
        cache={} if work.regime == "train" else cache_bytes(work),
        optimizer=optimizer_bytes(work) if work.regime == "train" else {},
        activations=activation_bytes(work) if traced else {},
    )


def weight_bytes(work: Workload) -> dict[str, int]:
    """Returns format → bytes of the weights on one device, scales included."""
    sums: dict[str, int] = {}
    for weight in take_inventory(work.config, work.storage).weights:
        size = sum(_bytes(array) for array in local_arrays(weight, work))
        sums[weight.fmt] = sums.get(weight.fmt, 0) + size
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def local_arrays(weight: Weight, work: Workload) -> list[jax.ShapeDtypeStruct]:
    """Returns the arrays of a weight as one device holds them: values, then scales.

    Raises:
      ConfigError: a mesh axis does not divide what the code computes on.
    """
    spec = weight_spec(weight.path, weight.value, weight.axes, work.layout)
    arrays = jax.tree.leaves(weight.value)
    return [_divide(array, spec, work) for array in arrays]


def _divide(array, spec: PartitionSpec, work: Workload) -> jax.ShapeDtypeStruct:
    parts = [work.layout.size(split) if split else 1 for split in map(_names, spec)]
    shape = tuple(ceil_div(size, part) for size, part in zip(array.shape, parts, strict=True))
    return jax.ShapeDtypeStruct(shape, array.dtype)


def _names(split) -> tuple[str, ...]:
    return () if split is None else (split,) if isinstance(split, str) else tuple(split)


def cache_bytes(work: Workload) -> dict[str, int]:
    """Returns what is cached → bytes on one device, for sequences of the full context.

    Entries are split over the devices of a sequence; windows and unfinished windows are on each.
    """
    sums: dict[str, int] = {}
    for array in list_local_cache(work):
        name = "unfinished windows" if array.holds.startswith("unfinished") else array.holds
        size = array.bytes // (work.parts("entries") if array.entries else 1)
        sums[name] = sums.get(name, 0) + size
    return sums


def list_local_cache(work: Workload) -> tuple[CacheArray, ...]:
    """Returns the cache of the sequences that one device has, their entries whole."""
    sizes = work.local_batch, work.context, work.parts("entries")
    return list_cache(jax.eval_shape(lambda: init_cache(work.config, work.numerics, *sizes)))


def optimizer_bytes(work: Workload) -> dict[str, int]:
    """Returns gradients and optimizer state of one device, as optax would allocate them.

    Beside bfloat16 weights stand a float32 copy that is updated and its state, float32 too: two
    moments (AdamW), or momentum for matrices (Muon). LoRA trains, beside frozen weights, two
    float32 matrices of its rank for every projection of attention and of the experts.
    """
    trained = trained_arrays(work)
    gradients = sum(map(_bytes, trained))
    copies = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in trained]
    matrices = [x for x in copies if x.ndim >= 2] if work.training == "muon" else []
    others = [x for x in copies if x.ndim < 2] if work.training == "muon" else copies
    state = sum(map(_bytes, matrices)) + _state_bytes(others)
    if work.training == "lora":
        return {"adapters": gradients, "gradients": gradients, "adamw state": state}
    name = f"{work.training} state"
    return {"float32 weights": sum(map(_bytes, copies)), "gradients": gradients, name: state}


def _state_bytes(parameters: list) -> int:
    state = jax.eval_shape(optax.adamw(1e-4).init, parameters)
    return sum(map(_bytes, jax.tree.leaves(state)))


def activation_bytes(work: Workload) -> dict[str, int]:
    """Returns what a step holds beside its arguments → bytes on one device at the fullest moment.

    In training the input of every layer is kept, unless the host has it, and the layer computed
    again in the backward pass.
    Logits are those of one token per sequence: a training step makes its own chunk by chunk.
    """
    config = work.config
    tokens = work.local_batch * work.local_tokens
    dtype = jnp.dtype(work.numerics.activation_dtype)
    streams = tokens * config.hc_mult * config.hidden_size * dtype.itemsize
    if work.regime == "train" and "streams" not in work.offload:
        streams *= config.num_hidden_layers + config.num_nextn_predict_layers
    vocab = config.vocab_size // work.weight_parts("vocab")
    largest = max(trace.peak_bytes for trace in trace_layers(work))
    return {
        "streams": streams,
        "largest layer": largest,
        "logits": work.local_batch * vocab * 4,
    }


def trained_arrays(work: Workload) -> list[jax.ShapeDtypeStruct]:
    """Returns the arrays that get gradients, as one device holds them: those of a run's defaults.

    Indexers are frozen then; adapters stand where `LoraConfig` says.
    """
    weights = take_inventory(work.config, work.storage).weights
    if work.training != "lora":
        trained = [w for w in weights if w.trained and ".indexer." not in w.path]
        return [x for weight in trained for x in local_arrays(weight, work)]
    targets = [f".{target}." for target in LoraConfig().targets]
    arrays = []
    for weight in weights:
        if weight.is_matrix and any(target in f".{weight.path}." for target in targets):
            values = local_arrays(weight, work)[0]
            if isinstance(weight.value, ScaledArray) and weight.value.is_fp4:
                values = jax.ShapeDtypeStruct(
                    (*values.shape[:-1], 2 * values.shape[-1]), values.dtype
                )
            *lead, out, width = values.shape
            for shape in ((*lead, out, work.lora_rank), (*lead, work.lora_rank, width)):
                arrays.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    return arrays


def _bytes(array) -> int:
    return math.prod(array.shape) * array.dtype.itemsize
