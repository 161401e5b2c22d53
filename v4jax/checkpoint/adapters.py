"""Adapters as PEFT stores them: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.layers.3.attn.wq_b.lora_A.weight           down [rank, in], float32
    base_model.model.layers.3.attn.wq_b.lora_B.weight           up [out, rank]
    base_model.model.layers.3.ffn.experts.17.w1.lora_A.weight   every expert is a module

Modules are named as in the released checkpoints, or as in transformers' model, where PEFT attaches
the adapters. (transformers keeps routed experts as two arrays, not as modules, and has no MTP: PEFT
reports those adapters as unexpected and attaches the others. Its grouped output projection takes
groups of channels: merge PEFT's adapters of `o_a_proj` before use.)

Source: PEFT's guide to its checkpoint format; module names: spec D.2, D.5.
"""

import dataclasses
import json
import math
import re
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding

from v4jax import log
from v4jax.checkpoint import names
from v4jax.checkpoint.finite import check_finite
from v4jax.checkpoint.names import Place
from v4jax.checkpoint.new_folder import check_new, new_folder
from v4jax.checkpoint.safetensors_file import Tensor, read_header, read_tensor
from v4jax.config.json_keys import brief, did_you_mean, read_json
from v4jax.errors import CheckpointError
from v4jax.files import Path, PathLike, to_path
from v4jax.model import Transformer
from v4jax.model.weights import read_weights, variables, write_weights
from v4jax.parallel.global_arrays import take
from v4jax.parallel.weight_sharding import spec_of, split_parts
from v4jax.quant import LowRank

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DTYPES = ("F32", "BF16", "F16")
_FACTORS = {"down": ".lora_A.weight", "up": ".lora_B.weight"}

# What PEFT can express and we do not compute: the fields' values must be these, or absent.
_REQUIRED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
}
# Of newer versions, or of some layers only: required likewise, and not written.
_REQUIRED_TOO: dict[str, Any] = {
    "layers_to_transform": None,
    "layers_pattern": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "use_bdlora": None,
}
# Some ways to start change the base as well, which the file of the adapters does not hold.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")

# What says how adapters were found or trained, and nothing about what they compute.
_IGNORED = """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    inference_mode init_lora_weights loftq_config lora_alpha lora_dropout lora_ga_config
    megatron_config megatron_core peft_version qalora_group_size r revision runtime_config
    target_modules task_type velora_config
"""
_MOST_RANK, _MOST_ALPHA = 1 << 16, 1 << 20


def write_adapters(
    model: Transformer,
    folder: PathLike,
    modules: Literal["released", "transformers"] = "released",
) -> None:
    """Writes the adapters of a model, and nothing of its base. Every process of a job calls this.

    Args:
      folder: does not exist yet, or is empty; also in gs:// or s3://.
      modules: whose names the modules have.

    Raises:
      CheckpointError: the model has no adapters, or they differ in rank or scale; the folder holds
        something already or cannot be written, and nothing is left.
    """
    adapted = {n: v for n, v in read_weights(model).items() if isinstance(v, LowRank)}
    if not adapted:
        raise CheckpointError("the model has no adapters to write; add_adapters makes them")
    if modules not in ("released", "transformers"):
        raise CheckpointError(f"modules must be 'released' or 'transformers', got {modules!r}")
    scales = {(value.down.shape[-2], value.scale) for value in adapted.values()}
    if len(scales) > 1:
        raise CheckpointError(f"adapters must share one rank and one scale, got {sorted(scales)}")
    check_new(folder)
    ((rank, scale),) = scales
    groups, contents, sources = names.by_parameter(names.places(model.config)), {}, {}
    for name, value in adapted.items():
        for place in groups[name]:
            for factor, suffix in _FACTORS.items():
                tensor = _PREFIX + _module(place, modules) + suffix
                shape = getattr(value, factor).shape[len(place.index) :]
                contents[tensor], sources[tensor] = ("F32", shape), (name, factor, place.index)
    config = _config(model, rank, scale, [_module(p, modules) for n in adapted for p in groups[n]])
    with log.phase("adapters", f"writing {folder}") as phase, new_folder(folder) as target:

        def read(tensor: str, needed: bool) -> np.ndarray | None:
            name, factor, index = sources[tensor]
            array = take(getattr(adapted[name], factor), index, needed)
            return array.astype(np.float32, copy=False) if needed else None

        target.write_tensors(WEIGHTS_NAME, contents, read)
        target.write_text(CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        size = sum(4 * math.prod(shape) for _, shape in contents.values())
        phase.note(f"{len(contents) // 2:,} modules of rank {rank}", log.format_bytes(size))


def check_adapters(folder: PathLike) -> None:
    """Raises on what the files of adapters tell by themselves, before there is a model.

    Raises:
      CheckpointError: as `read_adapters`.
    """
    folder = to_path(folder)
    _read_config(folder)
    _read_tensors(folder)


def read_adapters(model: Transformer, folder: PathLike) -> Transformer:
    """Returns the model with the adapters of a folder; module names of either kind are understood.

    Raises:
      CheckpointError: a file is missing or broken, uses what is not computed here, or does not fit
        the model; the message names field or tensor.
    """
    folder = to_path(folder)
    scale, rank = _read_config(folder)
    found = _read_tensors(folder)
    groups, weights = names.by_parameter(names.places(model.config)), read_weights(model)
    adapted, held = {}, variables(model)
    for name, places in groups.items():
        modules = [_module(place, "released") for place in places]
        if not any((module, factor) in found for module in modules for factor in _FACTORS):
            continue
        if isinstance(weights[name], LowRank):
            raise CheckpointError(f"{name} has adapters already; merge them before reading others")
        factors = {}
        for factor in _FACTORS:
            tensors = [
                (place, _take(found, folder, module, factor))
                for place, module in zip(places, modules, strict=True)
            ]
            factors[factor] = _stack(tensors, weights[name].shape, factor, rank)
        value = LowRank(
            weights[name],
            **factors,
            scale=scale,
            dtype=model.numerics.activation_dtype,
            rounds_inputs=model.numerics.quantize_activations,
        )
        adapted[name] = _put(model, value, held[name])
    if found:
        (module, _), tensor = next(iter(found.items()))
        known = {_module(place, "released") for places in groups.values() for place in places}
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.file} fits no module of this model"
            f"{did_you_mean(module, sorted(known))}"
        )
    return write_weights(model, adapted)


def _read_tensors(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Returns {(module, factor): tensor} of the file of adapters."""
    found: dict[tuple[str, str], Tensor] = {}
    for tensor in read_header(folder / WEIGHTS_NAME):
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} must have dtype {' or '.join(_DTYPES)}, "
                f"got {tensor.dtype}"
            )
        part = _parse_name(tensor)
        if part in found:
            raise CheckpointError(
                f"tensors {found[part].name} and {tensor.name} in {tensor.file} are the same"
            )
        found[part] = tensor
    if not found:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} holds no adapters: it has no tensor")
    return found


def _put(model: Transformer, value: LowRank, variable) -> LowRank:
    """Returns the value with its adapters on the devices, split like their weight."""
    if model.layout is None:
        return dataclasses.replace(
            value, down=jax.numpy.asarray(value.down), up=jax.numpy.asarray(value.up)
        )
    parts = split_parts(value, spec_of(variable))

    def put(array, spec):
        sharding = NamedSharding(model.layout.mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return dataclasses.replace(value, down=put(value.down, parts.down), up=put(value.up, parts.up))


def _take(found, folder, module: str, factor: str) -> Tensor:
    if (module, factor) not in found:
        raise CheckpointError(
            f"{folder / WEIGHTS_NAME} has no {module}{_FACTORS[factor]}, but adapters beside it: "
            "all layers and experts of a weight must have adapters, and each of them two factors"
        )
    return found.pop((module, factor))


def _stack(tensors: list[tuple[Place, Tensor]], shape, factor: str, rank: int) -> np.ndarray:
    """Returns the factor [..., rank, in] or [..., out, rank] of a parameter of this shape."""
    *_, rows, columns = shape
    lead = shape[: len(tensors[0][0].index)]
    expected = (rank, columns) if factor == "down" else (rows, rank)
    out = np.empty((*lead, *expected), np.float32)
    for place, tensor in tensors:
        if tensor.shape != expected:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} must have shape {list(expected)}, got "
                f"{list(tensor.shape)}"
            )
        values = read_tensor(tensor)
        check_finite(tensor, values)
        out[place.index] = values
    return out


def _module(place: Place, modules: str) -> str:
    """Returns the name of the module that holds a tensor."""
    module = place.tensor.removesuffix(".weight")
    if modules == "released":
        return module
    if module == "head":
        return "lm_head"
    if not module.startswith("layers."):
        return module  # of MTP, which transformers does not have
    _, number, below = module.split(".", 2)
    return f"model.layers.{number}.{_translate(below, 0, 1)}"


def _translate(below: str, origin: int, target: int) -> str:
    """Returns the other name of a module below a layer; an unknown one as it is."""
    for pair in names.MODULES:
        if below == pair[origin]:
            return pair[target]
    for pair in names.EXPERT_MODULES:
        stems = ("ffn.experts.", "mlp.experts.")
        match = re.fullmatch(re.escape(stems[origin]) + r"(\d+)\." + pair[origin], below)
        if match:
            return f"{stems[target]}{match[1]}.{pair[target]}"
    return below


def _parse_name(tensor: Tensor) -> tuple[str, str]:
    """Returns the released name of a tensor's module, and which factor it is."""
    for factor, suffix in _FACTORS.items():
        if tensor.name.startswith(_PREFIX) and tensor.name.endswith(suffix):
            module = tensor.name.removeprefix(_PREFIX).removesuffix(suffix)
            if module == "lm_head":
                return "head", factor
            match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
            if match:
                module = f"layers.{match[1]}.{_translate(match[2], 1, 0)}"
            return module, factor
    raise CheckpointError(
        f"tensor {tensor.name} in {tensor.file} is no LoRA factor: names must be "
        f"{_PREFIX}MODULE followed by {' or '.join(_FACTORS.values())}"
    )


def _config(model: Transformer, rank: int, scale: float, modules: list[str]) -> dict:
    # Patterns, as there may be tens of thousands of modules: numbers of layers and experts vary.
    def pattern(module: str) -> str:
        words = module.split(".")
        return r"\.".join(r"\d+" if word.isdigit() else re.escape(word) for word in words)

    return {
        **_REQUIRED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.folder) if model.folder else None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": "|".join(sorted({pattern(module) for module in modules})),
    }


def _read_config(folder: Path) -> tuple[float, int]:
    """Returns scale and rank."""
    path = folder / CONFIG_NAME
    try:
        config = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {brief(config)}")
    required = _REQUIRED | _REQUIRED_TOO
    for field, value in required.items():
        if config.get(field, value) != value and (config[field] or value):
            raise CheckpointError(
                f"{path}: {field} must be {value!r}, got {brief(config[field])}: adapters of this "
                "kind are not computed here"
            )
    if config.get("init_lora_weights") not in _STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights must be one of {list(_STARTS)}, got "
            f"{brief(config['init_lora_weights'])}: adapters that began so go with another base; "
            "convert them with PEFT (path_initial_model_for_weight_conversion)"
        )
    for field in sorted(config.keys() - required.keys() - set(_IGNORED.split())):
        if config[field]:
            raise CheckpointError(
                f"{path}: {brief(field)} (= {brief(config[field])}) is unknown and could change "
                f"what the adapters compute{did_you_mean(field, required)}; remove it if it does "
                "not"
            )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _MOST_RANK:
        raise CheckpointError(
            f"{path}: r must be an integer between 1 and {_MOST_RANK}, got {brief(rank)}"
        )
    if type(alpha) not in (int, float) or not 0 < alpha <= _MOST_ALPHA:
        raise CheckpointError(
            f"{path}: lora_alpha must be a number above 0 and at most {_MOST_ALPHA}, got "
            f"{brief(alpha)}"
        )
    return alpha / rank, rank
