"""Reads a checkpoint folder into a model, one parameter after the other, in its stored format.

Mistakes in names, shapes, dtypes and files are found from the headers, before a model exists. Then
several threads read one array after the other, and each array is put on its device. On a mesh a
host reads what its own devices hold, share by share, and no byte twice
(`weight_sharding.host_boxes`). Beside accelerators host memory therefore peaks at one share, or at
those shares of one host that differ only in their columns. On a CPU JAX takes over the memory
itself: the peak is the model.

Packed FP4, FP8 and their scales stay as they are. A parameter that the model keeps in float32 is
widened where the file has bfloat16, and so is one whose tensors are of both dtypes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from v4jax import log
from v4jax.checkpoint.finite import check_finite
from v4jax.checkpoint.hf_folder import Folder, count_shards, open_folder
from v4jax.checkpoint.hf_sources import GatheredArray, ParameterSource, check_present, plan_sources
from v4jax.checkpoint.safetensors_file import DTYPES, Tensor, box_shape, read_into, read_tensor
from v4jax.config import Numerics, choose_numerics
from v4jax.config.overrides import override
from v4jax.errors import CheckpointError
from v4jax.files import PathLike
from v4jax.kernels import Target
from v4jax.model import Transformer, abstract_transformer
from v4jax.model.weights import variables
from v4jax.parallel import Layout, annotate_shardings, check_mesh
from v4jax.parallel.weight_sharding import Box, host_boxes, read_sharded

READ_THREADS = 8
ALIGNMENT_BYTES = 64  # JAX takes over a host array on the CPU only if it is aligned so


def read_model(
    folder: PathLike,
    numerics: str | Numerics | None = None,
    *,
    put: Callable[[str, np.ndarray], jax.Array] | None = None,
    layout: Layout | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Transformer:
    """Returns the model that a checkpoint folder holds, in the formats it is stored in.

    Args:
      folder: config.json and safetensors files, in the released layout or that of transformers.
      numerics: how the model rounds; None: as `config.choose_numerics` says.
      put: places one array of the named parameter; by default on the default device.
      layout: where the model lies on a mesh, in place of `put`; every device gets its share.
      overrides: values in place of those of `config.json`; see `config.overrides`.

    Raises:
      CheckpointError: a tensor or file is missing, unknown, truncated, mis-shaped, of a wrong
        dtype, duplicated, or holds an infinity or NaN; the message names tensor and file.
      ConfigError: config.json is broken.
    """
    opened = open_folder(folder)
    opened = dataclasses.replace(opened, config=override(opened.config, overrides))
    model, sources = _plan_model(opened, numerics)
    if layout is not None:
        check_mesh(layout.mesh, model.config, layout.weight_layout)
        for path, variable in variables(model).items():
            variable.set_value(sources[path].abstract)
        model = annotate_shardings(model, layout)
        model.layout = layout
    held = variables(model)
    reader = _Reader(sources, held, put or _put_here, layout)
    shards = count_shards(len(opened.files))
    announcement = f"reading {shards}, {log.format_bytes(reader.total)}"
    with log.phase("weights", announcement) as phase, reader:
        for path, source in sources.items():
            held[path].set_value(source.join([reader.place(path, x) for x in source.arrays]))
        phase.note(f"read {shards}", log.format_bytes(reader.total))
    model.folder, model.target = opened.path, Target.here()
    return model


def read_abstract(folder: PathLike, numerics: str | Numerics = "released") -> Transformer:
    """Returns the model of a folder with shapes in place of arrays, in the formats of its files.

    Raises:
      CheckpointError, ConfigError: as `read_model`, for all that headers can tell.
    """
    model, sources = _plan_model(open_folder(folder), numerics)
    for path, variable in variables(model).items():
        variable.set_value(sources[path].abstract)
    return model


def _plan_model(folder: Folder, numerics) -> tuple[Transformer, dict[str, ParameterSource]]:
    check_present(folder)
    numerics = choose_numerics(numerics, folder.config, says=numerics is None)
    model = abstract_transformer(folder.config, numerics, storage="released")
    held = variables(model).items()
    return model, plan_sources(folder, {path: v.get_value().shape for path, v in held})


def _put_here(path: str, array: np.ndarray) -> jax.Array:
    return jax.device_put(array, may_alias=True)


class _Reader:
    """Reads arrays in boxes, the tensors of a box several at a time."""

    def __init__(
        self, sources: Mapping[str, ParameterSource], variables, put, layout: Layout | None
    ):
        self.put, self.layout = put, layout
        self.variables = variables
        self.pool = ThreadPoolExecutor(READ_THREADS)
        arrays = [(path, array) for path, source in sources.items() for array in source.arrays]
        self.total = sum(
            _box_bytes(array, box) for path, array in arrays for box in self._boxes(path, array)
        )
        self.progress = log.Progress("weights", self.total, unit="bytes")

    def __enter__(self) -> "_Reader":
        self.pool.__enter__()
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)
        self.pool.__exit__(*error)

    def place(self, path: str, array: GatheredArray) -> jax.Array:
        """Returns an array of a parameter on the devices, once its copy there has ended."""
        if self.layout is None:
            # Blocked on, so that a device copy has ended before the next host array is made.
            (whole,) = self._boxes(path, array)
            return jax.block_until_ready(self.put(path, self._read(array, whole)))
        read = functools.partial(self._read, array)
        return read_sharded(read, array.shape, self.variables[path], self.layout)

    def _boxes(self, path: str, array: GatheredArray) -> list[Box]:
        if self.layout is None:
            return [tuple(slice(0, size) for size in array.shape)]
        return host_boxes(array.shape, self.variables[path], self.layout)

    def _read(self, array: GatheredArray, box: Box) -> np.ndarray:
        """Returns array[box] in host memory; other dtypes are converted."""
        lead = len(array.indices[0])
        out = empty_aligned(box_shape(array.shape, box), array.dtype)
        inside = box[lead:]
        start = tuple(part.start for part in inside)

        def fill(tensor: Tensor, index: tuple[int, ...]) -> int:
            target = out[*(i - part.start for i, part in zip(index, box, strict=False)), ...]
            if np.dtype(DTYPES[tensor.dtype]) == out.dtype and array.experts is None:
                read_into(tensor, target, inside)
                check_finite(tensor, target, start, scales=array.scales)
            else:
                values = read_tensor(tensor, inside)
                check_finite(tensor, values, start, scales=array.scales)
                if array.experts is not None:
                    _check_table(tensor, values, array.experts, inside[0].start)
                target[...] = values
            return target.size * np.dtype(DTYPES[tensor.dtype]).itemsize

        found = [
            (tensor, index)
            for tensor, index in zip(array.tensors, array.indices, strict=True)
            if all(part.start <= i < part.stop for i, part in zip(index, box, strict=False))
        ]
        # In the order of the files, so that a slow disk is read forwards.
        found.sort(key=lambda pair: (pair[0].file, pair[0].offset))
        for nbytes in self.pool.map(lambda pair: fill(*pair), found):
            self.progress.advance(nbytes)
        return out


def _box_bytes(array: GatheredArray, box: Box) -> int:
    share = math.prod(box_shape(array.shape, box)) / max(math.prod(array.shape), 1)
    return round(array.nbytes * share)


def _check_table(tensor: Tensor, values: np.ndarray, experts: int, first_row: int) -> None:
    bad = np.argwhere((values < 0) | (values >= experts))
    if len(bad):
        row, column = bad[0]
        raise CheckpointError(
            f"tensor {tensor.name} in {tensor.file} must hold expert ids below {experts}, got "
            f"{values[row, column]} at [{first_row + row}, {column}]"
        )


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialized array whose memory JAX can take over without a copy on the CPU."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(nbytes + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + nbytes].view(dtype).reshape(shape)
