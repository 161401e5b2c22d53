"""Opens a checkpoint folder: files, index, layout and configuration, before a tensor is read.

`open_folder` gives every tensor its released name, whichever layout the folder has. It reads no
bytes of tensors, so that a bad folder fails within a second.
"""

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from v4jax import log
from v4jax.checkpoint import names
from v4jax.checkpoint.safetensors_file import Tensor, check_name, read_header
from v4jax.config import LayerKind, ModelConfig
from v4jax.config.folder import CONFIG_NAME, read_folder_config
from v4jax.config.from_hf import STAGES_KEY, describes_draft, model_config_from_hf
from v4jax.config.json_keys import brief, read_json
from v4jax.errors import CheckpointError
from v4jax.files import Path, PathLike, is_there, reading, to_path

INDEX_NAME = "model.safetensors.index.json"
HEADER_THREADS = 8  # a bucket and the hub take their time
_LONGEST_FILE_NAME = 255  # of the common file systems


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a checkpoint folder holds.

    tensors: by released name, as found in the headers.
    """

    path: Path
    layout: Literal["released", "transformers"]
    config: ModelConfig
    tensors: dict[str, Tensor]

    @property
    def files(self) -> list[Path]:
        """The shards, in order."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def open_folder(path: PathLike) -> Folder:
    """Returns what the folder holds, with the configuration made to fit the tensors.

    The tensors say whether there are MTP blocks or a draft module, and how many blocks; the log
    says what was left out. `expert_dtype` comes from them where `config.json` does not say it.

    Raises:
      CheckpointError: a file or the index is missing or broken, or a tensor appears twice.
      ConfigError: `config.json` is broken.
    """
    path = to_path(path)
    with reading(path):
        return _open_folder(path)


def _open_folder(path: Path) -> Folder:
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder")
    if not is_there(path / CONFIG_NAME):
        raise CheckpointError(f"{path} has no {CONFIG_NAME}; it is no checkpoint folder")
    raw, config = read_folder_config(path)
    weight_map = _read_index(path)
    written = _read_headers(path, weight_map)
    layout = "transformers" if any(name.startswith("model.") for name in written) else "released"
    tensors: dict[str, Tensor] = {}
    for whole in written.values():
        for released, tensor in _unstack(whole, config.n_routed_experts):
            if released in tensors:
                other = tensors[released]
                raise CheckpointError(
                    f"tensors {other.name} in {other.file.name} and {tensor.name} in "
                    f"{tensor.file.name} of {path} are the same"
                )
            tensors[released] = tensor
    config = _fit_drafts(path, config, raw, tensors)
    return Folder(path, layout, _fit_experts(config, raw, tensors), tensors)


def _unstack(tensor: Tensor, experts: int) -> Iterator[tuple[str, Tensor]]:
    """Yields a tensor by its released name; one that holds a layer's experts, expert by expert."""
    released = names.from_transformers(tensor.name)
    found = names.split_stacked(released)
    if found is None or len(tensor.shape) != 3 or tensor.shape[0] != experts:
        yield released, tensor
        return
    prefix, parts, ending = found
    rows, columns = tensor.shape[1] // len(parts), tensor.shape[2]
    if tensor.shape[1] % len(parts):
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.file} must have an even number of rows, those of "
            f"{' and '.join(parts)}, got shape {list(tensor.shape)}"
        )
    for index in range(experts * len(parts)):
        expert, part = index // len(parts), parts[index % len(parts)]
        piece = dataclasses.replace(
            tensor, name=f"{tensor.name}[{expert}, {part}]", shape=(rows, columns)
        )
        offset = tensor.offset + index * piece.nbytes
        yield f"{prefix}.{expert}.{part}.{ending}", dataclasses.replace(piece, offset=offset)


def count_shards(count: int) -> str:
    """Returns `46 shards`, or `1 shard`."""
    return "1 shard" if count == 1 else f"{count} shards"


def with_blocks(config: ModelConfig, mtp: int) -> ModelConfig:
    """Returns the configuration of the same model with `mtp` MTP blocks and no draft module."""
    layers = config.num_hidden_layers
    return dataclasses.replace(
        config,
        num_nextn_predict_layers=mtp,
        draft=None,
        compress_ratios=config.compress_ratios[:layers] + (0,) * mtp,
        layer_types=config.layer_types[:layers] + (LayerKind.WINDOW,) * mtp,
    )


def _fit_drafts(path, config: ModelConfig, raw: dict, tensors: dict[str, Tensor]) -> ModelConfig:
    """Returns the configuration with the blocks behind the layers that the tensors make up.

    The log says what `config.json` counts and the folder does not have, and what that costs.

    Raises:
      CheckpointError: the tensors are of no module, of both, or contradict `config.json`.
    """
    numbers = {name.split(".")[1] for name in tensors if name.startswith("mtp.")}
    count, counted = len(numbers), config.num_nextn_predict_layers
    if numbers != {str(i) for i in range(count)}:
        raise CheckpointError(
            f"{path}: blocks mtp.N must be numbered from 0 without a gap, got "
            f"{brief(sorted(numbers))}"
        )
    if not count:
        if counted or describes_draft(raw):
            what = "a draft module" if describes_draft(raw) else "MTP blocks"
            log.once(
                f"{path} has no tensors of {what}: the model runs without, and drafts nothing; "
                "each pass writes one token. The folder that it was made from may have them (mtp.*)"
            )
        return with_blocks(config, 0)
    serial = any(name.startswith(("mtp.0.e_proj.", "mtp.0.h_proj.")) for name in tensors)
    drafts = any(name.startswith("mtp.0.main_proj.") for name in tensors)
    if serial == drafts:
        raise CheckpointError(
            f"{path}: mtp.0 must have main_proj (a DSpark draft module) or e_proj and h_proj (an "
            f"MTP block), got {'both' if serial else 'neither'}"
        )
    if serial:
        if describes_draft(raw):
            raise CheckpointError(
                f"{path}: config.json has dspark_ keys, but mtp.0 is an MTP block (it has e_proj)"
            )
        if count != counted:
            log.once(
                f"{path}: {CONFIG_NAME} counts {counted} MTP blocks, the tensors make up {count}: "
                f"{count} are used"
            )
        return config if count == counted else with_blocks(config, count)
    if config.draft is None and describes_draft(raw):  # nothing in config.json counted the stages
        counted = model_config_from_hf(raw | {STAGES_KEY: count})
        config = dataclasses.replace(
            config,
            draft=counted.draft,
            compress_ratios=counted.compress_ratios,
            layer_types=counted.layer_types,
        )
    if config.draft is None or config.draft.stages != count:
        stages = "no dspark_ keys" if config.draft is None else f"{config.draft.stages} stages"
        raise CheckpointError(
            f"{path}: the tensors make a draft module of {count} stages, but config.json has "
            f"{stages} (entries of compress_ratios behind those of the layers)"
        )
    return config


def _read_index(path: Path) -> dict[str, str]:
    """Returns {tensor: file} as the index says it; empty where there is none."""
    index = path / INDEX_NAME
    if not is_there(index):
        return {}
    try:
        raw = read_json(index)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{index} is broken: {error}") from error
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is broken: it has no weight_map {{tensor: file}}")
    present: dict[str, bool] = {}
    for name, file in weight_map.items():
        check_name(index, name)
        beside = isinstance(file, str) and file.isprintable() and os.path.basename(file) == file
        if not beside or len(file) > _LONGEST_FILE_NAME:
            raise CheckpointError(
                f"{index}: tensor {name} must lie in a file beside it, got {brief(file)}"
            )
        if file not in present:
            present[file] = (path / file).exists()  # asked once: a bucket takes its time
        if not present[file]:
            raise CheckpointError(f"{index}: tensor {name} lies in {file}, which does not exist")
    return weight_map


def _read_headers(path: Path, weight_map: dict[str, str]) -> dict[str, Tensor]:
    """Returns every tensor of the shards by its name in the files, checked against the index."""
    files = [path / file for file in sorted(set(weight_map.values()))]
    files = files or sorted(f for f in path.iterdir() if f.name.endswith(".safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no *.safetensors file")
    found: dict[str, Tensor] = {}
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        headers = list(pool.map(read_header, files))
    for file, tensors in zip(files, headers, strict=True):
        for tensor in tensors:
            if tensor.name in found:
                other = found[tensor.name].file
                raise CheckpointError(
                    f"tensor {tensor.name} is in {other} and again in {file.name}"
                )
            if weight_map and weight_map.get(tensor.name) != file.name:
                said = weight_map.get(tensor.name, "no file")
                raise CheckpointError(
                    f"tensor {tensor.name} is in {file}, but {INDEX_NAME} names {said} for it"
                )
            found[tensor.name] = tensor
    for name, file in weight_map.items():
        if name not in found:
            raise CheckpointError(
                f"tensor {name} is absent from {path / file}, where the index puts it"
            )
    return found


def _fit_experts(config: ModelConfig, raw: dict, tensors: dict[str, Tensor]) -> ModelConfig:
    """Sets `expert_dtype` from the tensors; an explicit one that contradicts them is an error."""
    formats = {"I8": "fp4", "U8": "fp4", "F8_E4M3": "fp8"}
    for name, tensor in tensors.items():
        if ".experts." not in name or not name.endswith(".weight") or tensor.dtype not in formats:
            continue
        found = formats[tensor.dtype]
        quantization = raw.get("quantization_config") or {}
        said = raw.get("expert_dtype") or quantization.get("expert_dtype")
        if said not in (None, found):
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} is {tensor.dtype} ({found}), but "
                f"{CONFIG_NAME} says expert_dtype = {brief(said)}"
            )
        return dataclasses.replace(config, expert_dtype=found)
    return config
