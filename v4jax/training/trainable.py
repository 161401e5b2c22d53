"""What a run trains: which weights, and how they enter the model.

    frozen, weights, biases = split_trained(model, config)   # weights: arrays by name
    model = join_model(frozen, state)                        # every step (`step.py`)
    model = finish(frozen, state)                            # in the end (`export.py`)

Where a weight is missing in `frozen` stands what makes a weight of the trained arrays: nothing
(None), a `LowRank` without its adapters, or a `Master` without its values (`quant.recipes`). So the
frozen model alone says how the trained weights enter.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.checkpoint.names import stored_formats
from v4jax.config import TrainConfig
from v4jax.errors import ConfigError
from v4jax.model import Transformer
from v4jax.model.weights import read_weights, variables, write_weights
from v4jax.parallel.weights import place, spec_of, split_parts, weight_spec
from v4jax.quant import LowRank, Master, ScaledArray
from v4jax.training.lora import add_adapters

DOWN, UP = ".lora_down", ".lora_up"
STORED = ("fp4", "fp8", "bfloat16")  # formats that a float32 weight is rounded to


def split_trained(model: Transformer, config: TrainConfig) -> tuple[Transformer, dict, dict]:
    """Returns what `split_model` does, for the weights that a run trains; shapes give shapes.

    With `config.lora` the model gets adapters, unless it has some already: then those are trained.

    Raises:
      ConfigError: what is to be trained is not there, or frozen, or the mesh splits a weight
        inside the tiles it is rounded in.
    """
    names = choose_trained(model, config)
    if config.lora:
        if not choose_adapted(model):
            _check_lora(config)
            model = add_adapters(model, config.lora, config.seed, among=names)
        return split_model(model, choose_adapted(model))
    if not config.quantization_aware:
        return split_model(model, names)
    formats = {k: v for k, v in stored_formats(model.config).items() if v in STORED}
    model = round_weights(model, {k: v for k, v in formats.items() if k not in names})
    return split_model(model, names, {name: formats[name] for name in names if name in formats})


def round_weights(model: Transformer, formats: Mapping[str, str]) -> Transformer:
    """Returns the model with weights in stored formats; what is stored so already is untouched."""
    held, rounded = variables(model), {}
    for name, fmt in formats.items():
        value = held[name].get_value()
        if isinstance(value, ScaledArray) or str(value.dtype) == fmt:
            continue
        master = Master(value, fmt, "float32", rounds_inputs=False)
        abstract = isinstance(value, jax.ShapeDtypeStruct)
        rounded[name] = jax.eval_shape(Master.store, master) if abstract else store(master)
    model = write_weights(model, rounded)
    if model.layout is None or not rounded:
        return model
    model = place(model, model.layout)  # anew, as no tile may be split
    if abstract:
        return model
    held, mesh = variables(model), model.layout.mesh
    shardings = {name: NamedSharding(mesh, spec_of(held[name])) for name in rounded}
    return write_weights(
        model, {name: jax.device_put(value, shardings[name]) for name, value in rounded.items()}
    )


store = jax.jit(Master.store)


def choose_trained(model: Transformer, config: TrainConfig) -> list[str]:
    """Returns the names of the weights that a loss of the run reaches, a frozen indexer's left out.

    What no loss reaches would only decay: the second and later MTP blocks, and the first without
    the MTP loss.
    """
    loss = config.loss
    drafts = bool(loss.mtp_weight or loss.late_mtp_weight)

    def trains(name: str) -> bool:
        if ".indexer." in name and config.indexer == "frozen":
            return False
        return not name.startswith("mtp.") or (drafts and name.startswith("mtp.0."))

    return [name for name in read_weights(model) if trains(name)]


def choose_adapted(model: Transformer) -> list[str]:
    """Returns the names of the weights that have adapters."""
    return [name for name, value in read_weights(model).items() if isinstance(value, LowRank)]


def _check_lora(config: TrainConfig) -> None:
    if config.indexer == "distill" and not any("indexer" in t for t in config.lora.targets):
        raise ConfigError(
            "train.indexer = 'distill' trains nothing with train.lora unless lora.targets names "
            "the indexer: add 'attention.indexer.query_up', or set train.indexer = 'frozen'"
        )


def split_model(
    model: Transformer, trained: Iterable[str], formats: Mapping[str, str] | None = None
) -> tuple[Transformer, dict, dict]:
    """Returns the model without what is trained, the trained arrays, and the routers' biases.

    Of a weight with adapters these are trained, as "….lora_down" and "….lora_up". Biases move where
    their router is trained.

    Args:
      formats: of trained weights that are rounded to a stored format on the way.
    """
    held, weights, holes = variables(model), {}, {}
    for name in trained:
        value = held[name].get_value()
        if isinstance(value, LowRank):
            weights |= {name + DOWN: value.down, name + UP: value.up}
            holes[name] = dataclasses.replace(value, down=None, up=None)
        else:
            weights[name], holes[name] = value, None
    for name, fmt in (formats or {}).items():
        holes[name] = _make_master(model, held[name], name, fmt)
    biases = {
        name: value
        for name, value in read_weights(model, buffers=True).items()
        if name.endswith("router.bias") and name.removesuffix("bias") + "weight" in weights
    }
    return write_weights(model, holes | dict.fromkeys(biases)), weights, biases


def _make_master(model: Transformer, variable, name: str, fmt: str) -> Master:
    """Returns the place of a weight that is rounded; its values are elsewhere.

    Raises:
      ConfigError: the mesh splits the weight inside the tiles it is rounded in.
    """
    numerics, shape = model.numerics, variable.get_value().shape
    hole = Master(None, fmt, numerics.activation_dtype, numerics.quantize_activations)
    if model.layout is not None:
        # What is split for storage only is rounded after it is gathered.
        abstract = dataclasses.replace(hole, values=jax.ShapeDtypeStruct(shape, "float32"))
        weight_spec(name, abstract, variable.get_metadata()["axes"], model.layout)
    return hole


def join_weights(frozen: Transformer, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of trained weights as the computation uses them, for `write_weights`.

    Matrices are in the dtype of the activations; what is released as float32 stays so, and so do
    adapters and masters until they are expanded.
    """
    held, dtype, values = variables(frozen), frozen.numerics.activation_dtype, {}
    for name, array in weights.items():
        owner, _, part = name.rpartition(".")
        if "." + part in (DOWN, UP):
            place = values.get(owner, held[owner].get_value())
            values[owner] = dataclasses.replace(place, **{part.removeprefix("lora_"): array})
        elif isinstance(place := held[name].get_value(), Master):
            values[name] = dataclasses.replace(place, values=array)
        else:
            values[name] = array if released_float32(name) else array.astype(dtype)
    return values


def released_float32(name: str) -> bool:
    """Whether the released checkpoints keep the weight of this name in float32."""
    last = name.rsplit(".", 1)[-1]
    return last in ("fn", "base", "scale", "sink", "position_bias")


def trained_specs(frozen: Transformer) -> dict[str, P]:
    """Returns how the mesh splits every weight, by its name; and the adapters, by theirs."""
    specs = {}
    for name, variable in variables(frozen).items():
        value, specs[name] = variable.get_value(), spec_of(variable)
        if isinstance(value, LowRank):
            parts = split_parts(dataclasses.replace(value, down=0, up=0), specs[name])
            specs |= {name + DOWN: parts.down, name + UP: parts.up}
    return specs


def as_float32(value) -> jax.Array:
    """Returns a new float32 array of a weight, however it is stored."""
    if isinstance(value, ScaledArray):
        return value.dequantize()
    return jnp.array(value, jnp.float32, copy=True)
