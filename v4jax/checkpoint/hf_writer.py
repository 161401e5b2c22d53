"""Writes a model as a checkpoint folder: as released, plain bfloat16, or for transformers.

    released      the released names and formats; what was read quantized comes back byte for byte,
                  what is plain in memory is quantized (spec D.6)
    bfloat16      the released names, everything dequantized (exact, spec D.3)
    transformers  the names that transformers' save_pretrained writes; float32 stays float32

First every file gets its header and its size, then the parameters are written one after the other
into their places, so that host memory holds one parameter beyond the model. All of it happens in a
hidden folder beside the target, which is renamed at the end: the target is complete or absent.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import uuid
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import log
from v4jax.checkpoint import names
from v4jax.checkpoint.census import model_variables
from v4jax.checkpoint.hf_folder import CONFIG_NAME, INDEX_NAME, count_shards
from v4jax.checkpoint.names import Place, Stored
from v4jax.checkpoint.safetensors_file import Tensor, write_header, write_tensor
from v4jax.config import ModelConfig
from v4jax.config.to_hf import model_config_to_hf
from v4jax.errors import CheckpointError, UnsupportedError
from v4jax.files import to_path
from v4jax.model import Transformer
from v4jax.quant import Recipe, ScaledArray, quantize_weight

Format = Literal["released", "bfloat16", "transformers"]
FORMATS = ("released", "bfloat16", "transformers")
SHARD_BYTES = 5 * 2**30
CARRIED_FILES = ("tokenizer.json", "tokenizer_config.json")

# The dtype names of the file format for what a parameter holds.
_FILE_DTYPES = {
    "float32": "F32",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int32": "I64",  # routing tables
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor to write: its name in the file, dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def write_model(
    model: Transformer,
    folder: str | pathlib.Path,
    format: Format = "released",
    *,
    shard_bytes: int = SHARD_BYTES,
    carry_from: str | pathlib.Path | None = None,
) -> None:
    """Writes config.json, generation_config.json, the safetensors shards and their index.

    Args:
      folder: does not exist yet, or is empty.
      shard_bytes: largest size of one file, unless a single tensor is larger.
      carry_from: folder whose tokenizer files are copied along; by default where the model came
        from.

    Raises:
      CheckpointError: the folder holds something already or cannot be written, and nothing is left;
        or the model has adapters.
      ConfigError: the transformers layout cannot express the configuration.
      UnsupportedError: the model lies over several hosts.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {list(FORMATS)}, got {format!r}")
    if any(isinstance(v.get_value(), Recipe) for v in model_variables(model).values()):
        raise CheckpointError(
            "the model is in training: its weights have adapters or are rounded on the way; "
            "merge adapters (training.lora.merge), or write them alone (write_adapters)"
        )
    _check_here(model)
    check_new(folder)
    pieces = plan_pieces(model, format)
    _warn_of_rounding(model, pieces)
    shards = plan_shards(list(pieces.values()), shard_bytes)
    carry_from = carry_from or model.folder
    with log.phase("save", f"writing {folder} as {format}") as phase, new_folder(folder) as target:
        tensors = write_headers(target, shards)
        total = write_index(target, tensors)
        _write_json(target / CONFIG_NAME, _config(model.config, format, pieces))
        _write_json(target / "generation_config.json", _generation_config(model.config))
        _write_tensors(model, format, pieces, {tensor.name: tensor for tensor in tensors})
        for name in CARRIED_FILES:
            if carry_from is not None and (to_path(carry_from) / name).is_file():
                (target / name).write_bytes((to_path(carry_from) / name).read_bytes())
        phase.note(f"wrote {count_shards(len(shards))}", log.format_bytes(total))


def _check_here(model: Transformer) -> None:
    """Raises where a part of the model lies on other hosts."""
    for path, variable in model_variables(model).items():
        for leaf in jax.tree.leaves(variable.get_value()):
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                raise UnsupportedError(
                    f"{path} lies over several hosts, from which no model can be written yet; its "
                    "training checkpoint can be restored on one host, and the model saved there"
                )


def _warn_of_rounding(model: Transformer, pieces: dict[Place, list[Piece]]) -> None:
    """Says that plain weights are about to be quantized: the file will not hold the same model."""
    variables = model_variables(model)
    quantized = (place for place, group in pieces.items() if len(group) > 1)
    rounded = sum(
        not isinstance(variables[place.parameter].get_value(), ScaledArray) for place in quantized
    )
    if rounded:
        log.warning(
            f"save: {rounded:,} matrices are plain in memory and get rounded to FP8 or FP4 (exact "
            "where they came from such); the formats bfloat16 and transformers do not round so"
        )


def plan_pieces(model: Transformer, format: Format) -> dict[Place, list[Piece]]:
    """Returns the tensors that every place becomes: one, or weight and scales."""
    variables = model_variables(model)
    values = {path: variable.get_value() for path, variable in variables.items()}
    return {
        place: _describe(place, values[place.parameter], format, model.config)
        for place in names.places(model.config)
    }


def plan_shards(pieces: list[list[Piece]], shard_bytes: int) -> list[list[Piece]]:
    """Fills files in order; a weight and its scales stay together."""
    shards, size = [[]], 0
    for group in pieces:
        group_bytes = sum(_nbytes(piece) for piece in group)
        if size and size + group_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += group
        size += group_bytes
    return shards


def _nbytes(piece: Piece) -> int:
    return Tensor(piece.name, piece.dtype, piece.shape, pathlib.Path(), 0).nbytes


def _describe(place: Place, value, format: Format, config: ModelConfig) -> list[Piece]:
    below = len(place.index)
    shape = tuple(value.shape[below:])
    name = names.to_transformers(place.tensor) if format == "transformers" else place.tensor
    if format == "released" and place.stored in (Stored.FP8, Stored.EXPERT):
        if not isinstance(value, ScaledArray):
            value = jax.eval_shape(lambda w: _quantized(w, place, config), _abstract(shape))
            below = 0
        dtype = "I8" if value.is_fp4 else "F8_E4M3"
        scale_dtype = "F8_E8M0" if value.scales.dtype == jnp.uint8 else "F32"
        return [
            Piece(name, dtype, tuple(value.values.shape[below:])),
            Piece(names.scale_name(name), scale_dtype, tuple(value.scales.shape[below:])),
        ]
    return [Piece(name, _FILE_DTYPES[_plain_dtype(place, value, format)], shape)]


def _plain_dtype(place: Place, value, format: Format) -> str:
    """Returns the dtype in which an unquantized tensor is written."""
    if place.stored is Stored.TABLE:
        return "int32"
    if place.stored is Stored.FLOAT32:
        return "float32"
    keeps = format == "transformers" and not isinstance(value, ScaledArray)
    return str(value.dtype) if keeps else "bfloat16"


def _abstract(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _quantized(weight, place: Place, config: ModelConfig) -> ScaledArray:
    return _quantize(weight, names.format_of(place.stored, config))


_quantize = jax.jit(quantize_weight, static_argnums=1)
_dequantize = jax.jit(lambda weight: weight.dequantize(jnp.bfloat16))


def _encode(place: Place, value, format: Format, config: ModelConfig) -> list[np.ndarray]:
    """Returns the arrays of `_describe`'s pieces; `value` is the parameter in host memory."""
    value = value[place.index] if place.index else value
    if format == "released" and place.stored in (Stored.FP8, Stored.EXPERT):
        if not isinstance(value, ScaledArray):
            value = _quantized(value, place, config)
        return [np.asarray(value.values), np.asarray(value.scales)]
    dtype = _plain_dtype(place, value, format)
    if isinstance(value, ScaledArray):
        value = np.asarray(_dequantize(value))
    return [value.astype(np.int64 if dtype == "int32" else jnp.dtype(dtype), copy=False)]


def write_headers(target: pathlib.Path, shards: list[list[Piece]]) -> list[Tensor]:
    """Creates the files of `shards`, with room for every tensor; returns where each goes."""
    tensors = []
    for number, shard in enumerate(shards, start=1):
        path = target / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        contents = {piece.name: (piece.dtype, piece.shape) for piece in shard}
        tensors += write_header(path, contents)
    return tensors


def write_index(target: pathlib.Path, tensors: list[Tensor]) -> int:
    """Writes the index; returns the bytes of all tensors."""
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map = {tensor.name: tensor.file.name for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(target / INDEX_NAME, index)
    return total


def _write_tensors(model, format, pieces, tensors: dict[str, Tensor]) -> None:
    groups = names.by_parameter(list(pieces))
    variables, done = model_variables(model), 0
    total = sum(tensor.nbytes for tensor in tensors.values())
    with log.Progress("save", total, unit="bytes") as progress:
        for path, found in groups.items():
            value = jax.tree.map(np.asarray, variables[path].get_value())
            for place in found:
                arrays = _encode(place, value, format, model.config)
                for piece, array in zip(pieces[place], arrays, strict=True):
                    write_tensor(tensors[piece.name], array)
                    done += array.nbytes
                progress.update(done, note=path)


def _config(config: ModelConfig, format: Format, pieces: dict[Place, list[Piece]]) -> dict:
    plain = {p.dtype for place, group in pieces.items() for p in group if _is_matrix(place)}
    return model_config_to_hf(
        config,
        "transformers" if format == "transformers" else "released",
        quantized=format == "released",
        dtype="float32" if "F32" in plain and format == "transformers" else "bfloat16",
    )


def _is_matrix(place: Place) -> bool:
    return place.stored not in (Stored.FLOAT32, Stored.TABLE)


def _generation_config(config: ModelConfig) -> dict:
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    return tokens | {"do_sample": True, "temperature": 1.0, "top_p": 1.0}


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check_new(folder: str | pathlib.Path) -> None:
    """Raises unless the folder is empty or does not exist.

    Raises:
      CheckpointError: it holds something, or is a file.
    """
    path = pathlib.Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty; remove it or choose another folder")


@contextlib.contextmanager
def new_folder(folder: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a hidden folder that becomes `folder` if the block succeeds, and vanishes if not."""
    folder = pathlib.Path(folder).resolve()
    temporary = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.replace(folder)  # over an empty folder, too
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror or error}; nothing was kept"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
