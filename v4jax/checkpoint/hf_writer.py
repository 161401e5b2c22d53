"""Writes a model as a checkpoint folder: as released, as plain bfloat16, or for transformers.

    released      the released names and formats; what was read quantized is written back byte for
                  byte, and what is plain in memory is quantized (spec D.6)
    bfloat16      the released names, everything dequantized (exact, spec D.3)
    transformers  the names that transformers' save_pretrained writes; float32 stays float32

Files are written one after the other, and so are the tensors of a file: host memory holds one
tensor beside the model. A parameter stays on its devices, and a tensor is a slice of it. Several
hosts gather a tensor when its turn comes. The target is complete or absent, on a disk and in a
bucket (`new_folder.py`).
"""

import dataclasses
import json
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from v4jax import log
from v4jax.checkpoint import names
from v4jax.checkpoint.hf_folder import CONFIG_NAME, INDEX_NAME, count_shards
from v4jax.checkpoint.names import Place, Stored
from v4jax.checkpoint.new_folder import check_new, new_folder
from v4jax.checkpoint.safetensors_file import Tensor
from v4jax.config import ModelConfig
from v4jax.config.to_hf import model_config_to_hf
from v4jax.errors import CheckpointError
from v4jax.files import PathLike, to_path
from v4jax.model import Transformer
from v4jax.model.weights import variables
from v4jax.parallel.global_arrays import take
from v4jax.quant import Recipe, ScaledArray, quantize_weight

Format = Literal["released", "bfloat16", "transformers"]
FORMATS = ("released", "bfloat16", "transformers")
SHARD_BYTES = 5 * 2**30
CARRIED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

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
    folder: PathLike,
    format: Format = "released",
    *,
    shard_bytes: int = SHARD_BYTES,
    carry_from: PathLike | None = None,
) -> None:
    """Writes config.json, generation_config.json, the safetensors shards and their index.

    Every process of a job calls this. On a disk process 0 writes; in a bucket each process writes
    some of the files.

    Args:
      folder: does not exist yet, or is empty; also in gs:// or s3://.
      shard_bytes: largest size of one file, unless a single tensor is larger.
      carry_from: folder whose tokenizer files are copied along; by default where the model came
        from.

    Raises:
      CheckpointError: the folder holds something already or cannot be written, and nothing is left;
        or the model has adapters.
      ConfigError: the transformers layout cannot express the configuration.
      UnsupportedError: the library for the folder's bucket is not installed.
    """
    if format not in FORMATS:
        raise CheckpointError(f"format must be one of {list(FORMATS)}, got {format!r}")
    if any(isinstance(v.get_value(), Recipe) for v in variables(model).values()):
        raise CheckpointError(
            "the model is in training: its weights have adapters or are rounded on the way; "
            "merge adapters (training.lora.merge), or write them alone (write_adapters)"
        )
    check_new(folder)
    pieces = plan_pieces(model, format)
    _warn_of_rounding(model, pieces)
    files = name_files(plan_shards(list(pieces.values()), shard_bytes))
    index, config = build_index(files), _config(model.config, format, pieces)
    carried = _read_carried(carry_from or model.folder)
    with log.phase("save", f"writing {folder} as {format}") as phase, new_folder(folder) as target:
        _write_tensors(model, format, pieces, files, target)
        target.write_text(INDEX_NAME, _to_json(index))
        target.write_text("generation_config.json", _to_json(_generation_config(model.config)))
        for name, data in carried.items():
            target.write_bytes(name, data)
        target.write_text(CONFIG_NAME, _to_json(config))  # last: what makes it a checkpoint
        total = log.format_bytes(index["metadata"]["total_size"])
        phase.note(f"wrote {count_shards(len(files))}", total)


def _warn_of_rounding(model: Transformer, pieces: dict[Place, list[Piece]]) -> None:
    """Says that plain weights are about to be quantized: the file will not hold the same model."""
    held = variables(model)
    quantized = (place for place, group in pieces.items() if len(group) > 1)
    rounded = sum(
        not isinstance(held[place.parameter].get_value(), ScaledArray) for place in quantized
    )
    if rounded:
        log.warning(
            f"save: {rounded:,} matrices are plain in memory and get rounded to FP8 or FP4 (exact "
            "where they came from such); the formats bfloat16 and transformers do not round so"
        )


def plan_pieces(model: Transformer, format: Format) -> dict[Place, list[Piece]]:
    """Returns the tensors that every place becomes: one, or weight and scales."""
    held = variables(model)
    values = {path: variable.get_value() for path, variable in held.items()}
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
    return Tensor(piece.name, piece.dtype, piece.shape, to_path(""), 0).nbytes


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
    return quantize_weight(weight, names.format_of(place.stored, config))


_dequantize = jax.jit(lambda weight: weight.dequantize(jnp.bfloat16))


class _Reader:
    """Gives the arrays of tensors, by their names in the files; each process asks for all."""

    def __init__(self, model: Transformer, format: Format, pieces: dict[Place, list[Piece]]):
        self._model, self._format = model, format
        self._variables = variables(model)
        self._places = {
            piece.name: (place, number)
            for place, group in pieces.items()
            for number, piece in enumerate(group)
        }
        self._held: tuple[Place | None, list[np.ndarray]] = None, []

    def read(self, name: str, needed: bool) -> np.ndarray | None:
        """Returns the array of a tensor, None where it is not needed."""
        place, number = self._places[name]
        if self._held[0] is not place:  # scales mostly follow their weight
            value = self._variables[place.parameter].get_value()
            value = jax.tree.map(lambda leaf: take(leaf, place.index, needed), value)
            self._held = place, self._encode(place, value) if needed else []
        return self._held[1][number] if needed else None

    def _encode(self, place: Place, value) -> list[np.ndarray]:
        """Returns the arrays of `_describe`'s pieces; `value` is a tensor in host memory."""
        if self._format == "released" and place.stored in (Stored.FP8, Stored.EXPERT):
            if not isinstance(value, ScaledArray):
                value = _quantized(value, place, self._model.config)
            return [np.asarray(value.values), np.asarray(value.scales)]
        dtype = _plain_dtype(place, value, self._format)
        if isinstance(value, ScaledArray):
            value = np.asarray(_dequantize(value))
        return [value.astype(np.int64 if dtype == "int32" else jnp.dtype(dtype), copy=False)]


def name_files(shards: list[list[Piece]]) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Returns what every file holds, by its name: {tensor: (dtype, shape)}."""
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": {
            piece.name: (piece.dtype, piece.shape) for piece in shard
        }
        for number, shard in enumerate(shards, start=1)
    }


def build_index(files: dict[str, dict[str, tuple[str, tuple[int, ...]]]]) -> dict:
    """Returns the content of the index: which tensor is in which file."""
    weight_map = {tensor: name for name, contents in files.items() for tensor in contents}
    total = sum(_nbytes(Piece(tensor, *files[name][tensor])) for tensor, name in weight_map.items())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_tensors(model, format, pieces, files, target) -> None:
    reader = _Reader(model, format, pieces)
    sizes = {piece.name: _nbytes(piece) for group in pieces.values() for piece in group}
    with log.Progress("save", sum(sizes.values()), unit="bytes") as progress:

        def read(name: str, needed: bool) -> np.ndarray | None:
            array = reader.read(name, needed)
            progress.advance(sizes[name], note=name)
            return array

        for name, contents in files.items():
            target.write_tensors(name, contents, read)


def _read_carried(folder: PathLike | None) -> dict[str, bytes]:
    """Returns the tokenizer files of a folder, on process 0, which writes them."""
    if folder is None or jax.process_index():
        return {}
    try:
        paths = [to_path(folder) / name for name in CARRIED_FILES]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read: {error.strerror or error}"
        ) from error


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
    ends = list(config.end_token_ids) if config.more_eos_token_ids else config.eos_token_id
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": ends}
    return tokens | {"do_sample": True, "temperature": 1.0, "top_p": 1.0}


def _to_json(content: dict) -> str:
    return json.dumps(content, indent=2) + "\n"
