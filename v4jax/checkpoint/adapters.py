"""Adapters as PEFT stores them: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.3.self_attn.q_b_proj.lora_A.weight      down [rank, in], float32
    base_model.model.model.layers.3.self_attn.q_b_proj.lora_B.weight      up [out, rank]
    base_model.model.model.layers.3.mlp.experts.base_layer.lora_A.weight  of all experts

PEFT attaches all of them to transformers' model. Adapters of MTP blocks and draft modules, which
that model does not have, are in a file of their own, adapter_mtp.safetensors, which PEFT does not
read. `adapter_layout.py` has the names and the shapes, those with the released names as well.

Source: PEFT's guide to its checkpoint format.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import get_args

import jax
import numpy as np
from jax.sharding import NamedSharding

from v4jax import log
from v4jax.checkpoint import names
from v4jax.checkpoint.adapter_config import CONFIG_NAME, AdapterConfig, make_config, read_config
from v4jax.checkpoint.adapter_layout import (
    EXTRA,
    PREFIX,
    SUFFIXES,
    Factor,
    Naming,
    Site,
    can_adapt,
    find_sites,
    is_halved,
    list_modules,
    pack,
    packed_shape,
    parse_module,
    unpack,
)
from v4jax.checkpoint.finite import check_finite
from v4jax.checkpoint.names import Place
from v4jax.checkpoint.new_folder import check_new, new_folder
from v4jax.checkpoint.safetensors_file import Tensor, read_header, read_tensor
from v4jax.config.json_keys import did_you_mean
from v4jax.errors import CheckpointError
from v4jax.files import Path, PathLike, to_path
from v4jax.model import Transformer
from v4jax.model.weights import read_weights, variables, write_weights
from v4jax.parallel.global_arrays import take
from v4jax.parallel.weight_sharding import spec_of, split_parts
from v4jax.quant import LowRank

WEIGHTS_NAME, EXTRA_NAME = "adapter_model.safetensors", "adapter_mtp.safetensors"
_DTYPES = ("F32", "BF16", "F16")


def write_adapters(model: Transformer, folder: PathLike, naming: Naming = "peft") -> None:
    """Writes the adapters of a model, and nothing of its base. Every process of a job calls this.

    Args:
      folder: does not exist yet, or is empty; also in gs:// or s3://.
      naming: "peft", what PEFT attaches to transformers' model, or "released".

    Raises:
      CheckpointError: the model has no adapters, or none that PEFT could attach; the folder holds
        something already or cannot be written, and nothing is left.
    """
    if naming not in get_args(Naming):
        raise CheckpointError(f"naming must be {' or '.join(get_args(Naming))}, got {naming!r}")
    adapted = {n: v for n, v in read_weights(model).items() if isinstance(v, LowRank)}
    if not adapted:
        raise CheckpointError("the model has no adapters to write; add_adapters makes them")
    check_new(folder)
    groups, experts = names.by_parameter(names.places(model.config)), model.config.n_routed_experts
    modules = {}
    for module in list_modules({name: groups[name] for name in adapted}, naming):
        value = adapted[module.weight]
        rank = value.down.shape[-2] * max(1, module.slots)
        modules[module] = rank, value.scale * rank
    extra = [module for module in modules if naming == "peft" and module.name.startswith(EXTRA)]
    if len(extra) == len(modules):
        raise CheckpointError(
            "all adapters are of MTP blocks or a draft module, which transformers' model does not "
            "have: PEFT can attach none; write them with the naming 'released'"
        )
    config = make_config(modules, naming, str(model.folder) if model.folder else None)
    sources, files = {}, {WEIGHTS_NAME: {}, EXTRA_NAME: {}}
    for module in modules:
        value = adapted[module.weight]
        for factor, suffix in SUFFIXES.items():
            size = value.shape[-1 if factor == "down" else -2]
            shape = packed_shape(factor, module.slots, experts, value.down.shape[-2], size)
            tensor = PREFIX + module.name + suffix
            files[EXTRA_NAME if module in extra else WEIGHTS_NAME][tensor] = "F32", shape
            sources[tensor] = module, factor

    def read(tensor: str, needed: bool) -> np.ndarray | None:
        module, factor = sources[tensor]
        array = take(getattr(adapted[module.weight], factor), module.index, needed)
        return pack(array.astype(np.float32, copy=False), factor, module.slots) if needed else None

    with log.phase("adapters", f"writing {folder}") as phase, new_folder(folder) as target:
        for name, contents in files.items():
            if contents:
                target.write_tensors(name, contents, read)
        target.write_text(CONFIG_NAME, json.dumps(config, indent=2) + "\n")
        tensors = [shape for contents in files.values() for _, shape in contents.values()]
        bytes_written = sum(4 * math.prod(shape) for shape in tensors)
        phase.note(f"{len(modules):,} modules", log.format_bytes(bytes_written))
    if extra:
        log.info(
            f"adapters: those of MTP blocks ({len(extra):,}) are in {EXTRA_NAME}: PEFT attaches "
            "the others to transformers' model, which has no such blocks"
        )


def choose_naming(model: Transformer) -> Naming:
    """Returns "peft", or "released" where PEFT could attach none of a model's adapters."""
    adapted = [name for name, v in read_weights(model).items() if isinstance(v, LowRank)]
    groups = names.by_parameter(names.places(model.config))
    tensors = (place.tensor for name in adapted for place in groups[name])
    return "released" if all(tensor.startswith(EXTRA) for tensor in tensors) else "peft"


def check_adapters(folder: PathLike) -> None:
    """Raises on what the files of adapters tell by themselves, before there is a model.

    Raises:
      CheckpointError: as `read_adapters`.
    """
    folder = to_path(folder)
    _read_tensors(folder, read_config(folder))


def read_adapters(model: Transformer, folder: PathLike) -> Transformer:
    """Returns the model with the adapters of a folder, in either naming.

    The model's weights may be shapes: the adapters are arrays all the same.

    Raises:
      CheckpointError: a file is missing or broken, uses what is not computed here, or does not fit
        the model; the message names field or tensor.
    """
    folder = to_path(folder)
    config = read_config(folder)
    reader = _Reader(_read_tensors(folder, config), config, model.config.n_routed_experts)
    groups, weights = names.by_parameter(names.places(model.config)), read_weights(model)
    adapted, held = {}, variables(model)
    for name, places in groups.items():
        if not can_adapt(places[0]) or len(weights[name].shape) != len(places[0].index) + 2:
            continue
        sites = [reader.find(place) for place in places]
        if not any(sites):
            continue
        if isinstance(weights[name], LowRank):
            raise CheckpointError(f"{name} has adapters already; merge them before reading others")
        down, up, scale = reader.stack(name, places, sites, weights[name].shape)
        value = LowRank(
            weights[name],
            down,
            up,
            scale=scale,
            dtype=model.numerics.activation_dtype,
            rounds_inputs=model.numerics.quantize_activations,
        )
        adapted[name] = _put(model, value, held[name])
    for (module, _), (tensor, _) in reader.found.items():
        if module not in reader.used:
            known = [site.module for p in groups.values() for x in p for site in find_sites(x)]
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} fits no module of this model"
                f"{did_you_mean(module, sorted({*known}))}"
            )
    return write_weights(model, adapted)


# {(Site.module, factor): (tensor, name of its target)}.
_Found = Mapping[tuple[str, Factor], tuple[Tensor, str]]


def _read_tensors(folder: Path, config: AdapterConfig) -> _Found:
    """Returns the tensors of the files of adapters."""
    tensors = read_header(folder / WEIGHTS_NAME)
    if (folder / EXTRA_NAME).exists():
        tensors += read_header(folder / EXTRA_NAME)
    if not tensors:
        raise CheckpointError(f"{folder / WEIGHTS_NAME} holds no adapters: it has no tensor")
    split = {tensor: _split_name(tensor) for tensor in tensors}
    siblings = {module for module, _ in split.values()}
    found: dict[tuple[str, Factor], tuple[Tensor, str]] = {}
    for tensor, (name, factor) in split.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} must have dtype {' or '.join(_DTYPES)}, "
                f"got {tensor.dtype}"
            )
        parsed = parse_module(name, siblings, config.parameters)
        if parsed is None:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} is of gate_up_proj or of down_proj: "
                f"target_parameters in {CONFIG_NAME} must name one of the two"
            )
        module, target = parsed
        if (module, factor) in found:
            twin, _ = found[module, factor]
            raise CheckpointError(
                f"tensors {twin.name} and {tensor.name} in {tensor.file} are the same"
            )
        found[module, factor] = tensor, target
    return found


def _split_name(tensor: Tensor) -> tuple[str, Factor]:
    """Returns the module of a tensor, and which factor it is."""
    for factor, suffix in SUFFIXES.items():
        if tensor.name.startswith(PREFIX) and tensor.name.endswith(suffix):
            return tensor.name.removeprefix(PREFIX).removesuffix(suffix), factor
    if tensor.name.endswith(".base_layer.weight"):
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.file} is of the base: save the adapters with PEFT's "
            "save_pretrained(…, save_embedding_layers=False)"
        )
    raise CheckpointError(
        f"tensor {tensor.name} in {tensor.file} is no LoRA factor: names must be "
        f"{PREFIX}MODULE followed by {' or '.join(SUFFIXES.values())}"
    )


class _Reader:
    """Reads the factors of single matrices out of the tensors of a file."""

    def __init__(self, found: _Found, config: AdapterConfig, experts: int):
        self.found, self.config, self.experts = found, config, experts
        self.used: set[str] = set()
        self._last: tuple[Tensor, np.ndarray] | None = None  # a stack serves all its experts
        self._halved: dict[str, bool] = {}

    def find(self, place: Place) -> Site | None:
        """Returns where the factors of a tensor of the release are; None: nowhere."""
        for site in find_sites(place):
            if any((site.module, factor) in self.found for factor in SUFFIXES):
                self.used.add(site.module)
                return site
        return None

    def stack(
        self, name: str, places: list[Place], sites: list[Site | None], shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Returns down [..., rank, in], up [..., out, rank] and scale of a weight of this shape.

        Lower ranks than the largest get zeros, which change nothing.
        """
        *_, rows, columns = shape
        lead = shape[: len(places[0].index)]
        values: dict[Factor, list[np.ndarray]] = {}
        for factor in SUFFIXES:
            size = columns if factor == "down" else rows
            values[factor] = [
                self._read(place, site, factor, size)
                for place, site in zip(places, sites, strict=True)
            ]
        scales = {self._settings(site)[1] for site in sites}
        if len(scales) > 1:
            raise CheckpointError(
                f"the adapters of {name} must share one alpha / rank in all layers, as its layers "
                f"are one array here; got {sorted(scales)}"
            )
        rank = max(len(array) for array in values["down"])
        down = np.zeros((*lead, rank, columns), np.float32)
        up = np.zeros((*lead, rows, rank), np.float32)
        for place, a, b in zip(places, values["down"], values["up"], strict=True):
            down[place.index][: len(a)] = a
            up[place.index][:, : len(a)] = b
        return down, up, scales.pop()

    def _read(self, place: Place, site: Site | None, factor: Factor, size: int) -> np.ndarray:
        """Returns a factor of one matrix; `size` as in `packed_shape`."""
        if site is None or (site.module, factor) not in self.found:
            module = place.tensor.removesuffix(".weight") if site is None else site.module
            raise CheckpointError(
                f"the adapters have no {module}{SUFFIXES[factor]}, but others beside it: all "
                "layers and experts of a weight must have adapters, and each of them two factors"
            )
        tensor, _ = self.found[site.module, factor]
        rank, _ = self._settings(site)
        slots = 0 if site.expert is None else 1
        expected = packed_shape(factor, slots, self.experts, rank, size)
        if factor == "up":
            expected = expected[0] * site.slots, expected[1]
        if tensor.shape != expected:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} must have shape {list(expected)}, got "
                f"{list(tensor.shape)}"
            )
        halved = site.slots > 1 and self._is_halved(site, rank)
        return unpack(self._read_whole(tensor), factor, site, rank, halved)

    def _settings(self, site: Site) -> tuple[int, float]:
        keys = ((site.module, factor) for factor in SUFFIXES)
        target = next(self.found[key][1] for key in keys if key in self.found)
        return self.config.settings(target)

    def _is_halved(self, site: Site, rank: int) -> bool:
        if site.module not in self._halved:
            tensor, _ = self.found.get((site.module, "up"), (None, ""))
            fits = tensor is not None and len(tensor.shape) == 2 and all(tensor.shape)
            fits = fits and not (tensor.shape[0] % 2 or tensor.shape[1] % 2)
            self._halved[site.module] = fits and is_halved(self._read_whole(tensor), rank)
        return self._halved[site.module]

    def _read_whole(self, tensor: Tensor) -> np.ndarray:
        if self._last is None or self._last[0] is not tensor:
            values = read_tensor(tensor)
            check_finite(tensor, values)
            self._last = tensor, values.astype(np.float32, copy=False)
        return self._last[1]


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
