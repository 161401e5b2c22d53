"""Reads released or transformers checkpoints, parameter by parameter, each in its stored format.

Everything that can be wrong with names, shapes, dtypes and files is found from the headers, before
a model exists. Then each parameter gets one host array, its tensors are read into slices of it by
several threads, and it is put on the device before the next one starts. Host memory therefore peaks
at one parameter beyond the model on an accelerator; on the CPU, JAX takes over the array itself.
(Going file by file instead would hold every scanned parameter half filled until the last file.)

Packed FP4, FP8 and their scales stay as they are. What the model keeps in float32 is widened from
bfloat16 where a file has that; a parameter whose tensors are bfloat16 and float32 becomes float32.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from v4jax import log
from v4jax.checkpoint import names
from v4jax.checkpoint.census import model_variables
from v4jax.checkpoint.hf_folder import Folder, open_folder
from v4jax.checkpoint.names import Place, Stored
from v4jax.checkpoint.safetensors_file import DTYPES, Tensor, read_into, read_tensor
from v4jax.config import ModelConfig, Numerics, get_numerics
from v4jax.config.json_keys import did_you_mean
from v4jax.errors import CheckpointError
from v4jax.model import Transformer, abstract_transformer
from v4jax.quant.scaled_array import FP4_BLOCK, ScaledArray
from v4jax.shapes import ceil_div

READ_THREADS = 8
ALIGNMENT_BYTES = 64  # JAX takes over a host array on the CPU only if it is aligned so

# What a tensor may be: {released format: {dtype in the file: how its parameter is kept}}.
_PLAIN = {"BF16": "plain", "F32": "plain"}
_ACCEPTED = {
    Stored.BFLOAT16: _PLAIN,
    Stored.FLOAT32: _PLAIN,
    Stored.FP8: {"F8_E4M3": "fp8"} | _PLAIN,
    Stored.EXPERT: {"I8": "fp4", "U8": "fp4", "F8_E4M3": "fp8"} | _PLAIN,
    Stored.TABLE: {"I64": "table", "I32": "table"},
}
_SCALE_DTYPES = ("F8_E8M0", "U8", "F32")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one parameter's value comes from; checked, nothing read yet.

    kept: "plain", "table", "fp8" or "fp4". scales: one per tensor for the last two, else empty.
    """

    places: list[Place]
    tensors: list[Tensor]
    scales: list[Tensor]
    kept: str
    shape: tuple[int, ...]  # of the parameter, logical

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes along which the tensors are gathered."""
        return self.shape[: len(self.places[0].index)]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in (*self.tensors, *self.scales))


def read_model(
    folder: str | pathlib.Path,
    numerics: str | Numerics = "released",
    *,
    put: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Transformer:
    """Returns the model that a checkpoint folder holds, in the formats it is stored in.

    Args:
      folder: config.json and safetensors files, in the released layout or that of transformers.
      numerics: how the model rounds.
      put: places one array of the named parameter on devices; by default on the default device.

    Raises:
      CheckpointError: a tensor or file is missing, unknown, truncated, mis-shaped, of a wrong
        dtype, or duplicated; the message names tensor and file.
      ConfigError: config.json is broken.
    """
    opened = open_folder(folder)
    model = abstract_transformer(opened.config, get_numerics(numerics), storage="released")
    variables = model_variables(model)
    shapes = {path: variable.get_value().shape for path, variable in variables.items()}
    sources = plan_sources(opened, shapes)
    put = put or (lambda path, array: jax.device_put(array, may_alias=True))
    total = sum(source.nbytes for source in sources.values())
    shards = f"{len(opened.files)} shards" if len(opened.files) > 1 else "1 shard"
    with log.phase("weights", f"reading {shards}, {log.format_bytes(total)}") as phase:
        for path, value in read_parameters(opened, sources):
            # Blocked on, so that a device copy has ended before the next host array is made.
            value = jax.block_until_ready(jax.tree.map(lambda x, path=path: put(path, x), value))
            variables[path].set_value(value)
        phase.note(f"read {shards}", log.format_bytes(total))
    model.folder = opened.path
    return model


def plan_sources(folder: Folder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """Returns where every parameter comes from; every tensor of the folder is used exactly once.

    Args:
      shapes: {parameter path: logical shape} of the model.

    Raises:
      CheckpointError: as `read_model`, for everything that headers can tell.
    """
    groups = names.by_parameter(names.places(folder.config))
    assert groups.keys() == shapes.keys(), sorted(groups.keys() ^ shapes.keys())[:10]
    sources = {path: _plan(folder, found, shapes[path]) for path, found in groups.items()}
    used = {tensor.name for s in sources.values() for tensor in (*s.tensors, *s.scales)}
    _check_none_left(folder, [t for t in folder.tensors.values() if t.name not in used])
    return sources


def read_parameters(
    folder: Folder, sources: Mapping[str, Source]
) -> Iterator[tuple[str, np.ndarray | ScaledArray]]:
    """Yields (path, value in host memory) of one parameter after the other."""
    total = sum(source.nbytes for source in sources.values())
    with (
        ThreadPoolExecutor(READ_THREADS) as pool,
        log.Progress("weights", total, unit="bytes") as progress,
    ):
        gather = _Gather(pool, progress)
        for path, source in sources.items():
            yield path, gather.value(source, folder.config)


def _plan(folder: Folder, found: list[Place], shape: tuple[int, ...]) -> Source:
    tensors = [_find(folder, place.tensor) for place in found]
    kinds = {}
    for place, tensor in zip(found, tensors, strict=True):
        accepted = _ACCEPTED[place.stored]
        if tensor.dtype not in accepted:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} must have dtype {' or '.join(accepted)}, "
                f"got {tensor.dtype}"
            )
        kinds.setdefault(accepted[tensor.dtype], tensor)
    if len(kinds) > 1:
        (a, first), (b, second) = list(kinds.items())[:2]
        raise CheckpointError(
            f"tensor {first.name} in {first.file} is {a} and {second.name} in {second.file} is "
            f"{b}: they share one parameter and must be stored alike"
        )
    kept = next(iter(kinds))
    below = shape[len(found[0].index) :]
    _check_shapes(tensors, (*below[:-1], below[-1] // 2) if kept == "fp4" else below)
    scales = []
    if kept in ("fp8", "fp4"):
        rows, columns = FP4_BLOCK if kept == "fp4" else folder.config.weight_block_size
        scales = [_find(folder, names.scale_name(place.tensor)) for place in found]
        _check_shapes(scales, (ceil_div(below[0], rows), ceil_div(below[1], columns)))
        _check_scale_dtypes(scales)
    return Source(found, tensors, scales, kept, shape)


def _find(folder: Folder, name: str) -> Tensor:
    if name in folder.tensors:
        return folder.tensors[name]
    hint = ""
    if name.startswith("mtp.") and not any(other.startswith("mtp.") for other in folder.tensors):
        hint = "; a model without MTP has num_nextn_predict_layers = 0 in config.json"
    raise CheckpointError(f"tensor {name} is missing: no file of {folder.path} holds it{hint}")


def _check_shapes(tensors: list[Tensor], shape: tuple[int, ...]) -> None:
    for tensor in tensors:
        if tensor.shape != shape:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} must have shape {list(shape)}, got "
                f"{list(tensor.shape)}"
            )


def _check_scale_dtypes(scales: list[Tensor]) -> None:
    for tensor in scales:
        if tensor.dtype not in _SCALE_DTYPES:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} must have dtype "
                f"{' or '.join(_SCALE_DTYPES)}, got {tensor.dtype}"
            )
        if DTYPES[tensor.dtype] is not DTYPES[scales[0].dtype]:
            raise CheckpointError(
                f"tensor {tensor.name} in {tensor.file} is {tensor.dtype} and {scales[0].name} is "
                f"{scales[0].dtype}: scales that share one parameter must be stored alike"
            )


def _check_none_left(folder: Folder, left: list[Tensor]) -> None:
    if not left:
        return
    tensor = left[0]
    more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
    if tensor.name.endswith((".scale", "_scale_inv")):
        why = "scales, but their weight is not quantized or not part of this model"
    else:
        prefix = tensor.name.rsplit(".", 2)[0]
        near = [place.tensor for place in names.places(folder.config) if prefix in place.tensor]
        why = "no tensor of this model" + did_you_mean(tensor.name, near)
    raise CheckpointError(f"tensor {tensor.name} in {tensor.file} is unknown{more}: {why}")


class _Gather:
    """Reads the tensors of one parameter into slices of one array, several at a time."""

    def __init__(self, pool: ThreadPoolExecutor, progress: log.Progress):
        self.pool, self.progress = pool, progress
        self.done, self.start = 0, time.perf_counter()

    def value(self, source: Source, config: ModelConfig) -> np.ndarray | ScaledArray:
        """Returns the parameter's value in host memory."""
        first = source.tensors[0]
        if source.kept == "table":
            table = functools.partial(_read_table, experts=config.n_routed_experts)
            return self._array(source, source.tensors, np.int32, table)
        if source.kept == "plain":
            widened = source.places[0].stored is Stored.FLOAT32
            widened = widened or any(tensor.dtype == "F32" for tensor in source.tensors)
            return self._array(source, source.tensors, np.float32 if widened else DTYPES["BF16"])
        values = self._array(source, source.tensors, DTYPES[first.dtype])
        scales = self._array(source, source.scales, DTYPES[source.scales[0].dtype])
        block = FP4_BLOCK if source.kept == "fp4" else config.weight_block_size
        return ScaledArray(values, scales, block)

    def _array(self, source: Source, tensors: list[Tensor], dtype, read=read_tensor) -> np.ndarray:
        """Returns every tensor at its index in one array; other dtypes are converted."""
        out = empty_aligned((*source.lead, *tensors[0].shape), np.dtype(dtype))

        def fill(tensor: Tensor, index: tuple[int, ...]) -> int:
            if np.dtype(DTYPES[tensor.dtype]) == out.dtype and read is read_tensor:
                read_into(tensor, out[index])
            else:
                out[index] = read(tensor)
            return tensor.nbytes

        indices = [place.index for place in source.places]
        # In the order of the files, so that a slow disk is read forwards.
        order = sorted(
            zip(tensors, indices, strict=True), key=lambda pair: (pair[0].file, pair[0].offset)
        )
        for nbytes in self.pool.map(lambda pair: fill(*pair), order):
            self.done += nbytes
            rate = self.done / max(time.perf_counter() - self.start, 1e-6)
            left = (self.progress.total - self.done) / max(rate, 1.0)
            self.progress.update(self.done, rate=rate, seconds_left=left)
        return out


def _read_table(tensor: Tensor, experts: int) -> np.ndarray:
    """Returns a table of experts, which must hold expert ids only."""
    values = read_tensor(tensor)
    bad = np.argwhere((values < 0) | (values >= experts))
    if len(bad):
        row, column = bad[0]
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.file} must hold expert ids below {experts}, got "
            f"{values[row, column]} at [{row}, {column}]"
        )
    return values


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array whose memory JAX can take over without a copy on the CPU."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + nbytes].view(dtype).reshape(shape)
