"""Reads released or transformers checkpoints, parameter by parameter, each in its stored format.

Everything that can be wrong with names, shapes, dtypes and files is found from the headers, before
a model exists. Then each parameter gets one host array, its tensors are read into slices of it by
several threads, and it is put on the device before the next one starts. Beside an accelerator, host
memory therefore peaks at one parameter; on the CPU, JAX takes over the array itself, so that it
peaks at the model. (Going file by file would hold every scanned parameter until the last file.)

Packed FP4, FP8 and their scales stay as they are. What the model keeps in float32 is widened from
bfloat16 where a file has that; a parameter whose tensors are bfloat16 and float32 becomes float32.
"""

import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from v4jax import log
from v4jax.checkpoint.census import model_variables
from v4jax.checkpoint.hf_folder import Folder, count_shards, open_folder
from v4jax.checkpoint.hf_sources import Source, plan_sources
from v4jax.checkpoint.safetensors_file import DTYPES, Tensor, read_into, read_tensor
from v4jax.config import ModelConfig, Numerics, get_numerics
from v4jax.errors import CheckpointError
from v4jax.model import Transformer, abstract_transformer
from v4jax.parallel import Layout, check_mesh, place
from v4jax.parallel.weights import put_shares
from v4jax.quant import ScaledArray

READ_THREADS = 8
ALIGNMENT_BYTES = 64  # JAX takes over a host array on the CPU only if it is aligned so


def read_model(
    folder: str | pathlib.Path,
    numerics: str | Numerics = "released",
    *,
    put: Callable[[str, np.ndarray], jax.Array] | None = None,
    layout: Layout | None = None,
) -> Transformer:
    """Returns the model that a checkpoint folder holds, in the formats it is stored in.

    Args:
      folder: config.json and safetensors files, in the released layout or that of transformers.
      numerics: how the model rounds.
      put: places one array of the named parameter on devices; by default on the default device,
        or by `layout`.
      layout: where the model lies on a mesh; every device gets its share of each array.

    Raises:
      CheckpointError: a tensor or file is missing, unknown, truncated, mis-shaped, of a wrong
        dtype, or duplicated; the message names tensor and file.
      ConfigError: config.json is broken.
    """
    opened = open_folder(folder)
    model, sources = _plan_model(opened, numerics)
    if layout is not None:
        check_mesh(layout.mesh, model.config, layout.regime)
        for path, variable in model_variables(model).items():
            variable.set_value(sources[path].abstract)
        model = place(model, layout)
        model.layout = layout
    variables = model_variables(model)
    if put is None and layout is None:
        put = lambda path, array: jax.device_put(array, may_alias=True)  # noqa: E731
    elif put is None:
        put = lambda path, array: put_shares(array, variables[path], layout)  # noqa: E731
    total = sum(source.nbytes for source in sources.values())
    shards = count_shards(len(opened.files))
    with log.phase("weights", f"reading {shards}, {log.format_bytes(total)}") as phase:
        for path, value in read_parameters(opened, sources):
            # Blocked on, so that a device copy has ended before the next host array is made.
            value = jax.block_until_ready(jax.tree.map(lambda x, path=path: put(path, x), value))
            variables[path].set_value(value)
        phase.note(f"read {shards}", log.format_bytes(total))
    model.folder = opened.path
    return model


def read_abstract(folder: str | pathlib.Path, numerics: str | Numerics = "released") -> Transformer:
    """Returns the model of a folder with shapes in place of arrays, in the formats of its files.

    Raises:
      CheckpointError, ConfigError: as `read_model`, for all that headers can tell.
    """
    model, sources = _plan_model(open_folder(folder), numerics)
    for path, variable in model_variables(model).items():
        variable.set_value(sources[path].abstract)
    return model


def _plan_model(folder: Folder, numerics) -> tuple[Transformer, dict[str, Source]]:
    model = abstract_transformer(folder.config, get_numerics(numerics), storage="released")
    variables = model_variables(model).items()
    return model, plan_sources(folder, {path: v.get_value().shape for path, v in variables})


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


class _Gather:
    """Reads the tensors of one parameter into slices of one array, several at a time."""

    def __init__(self, pool: ThreadPoolExecutor, progress: log.Progress):
        self.pool, self.progress = pool, progress
        self.done, self.start = 0, time.perf_counter()

    def value(self, source: Source, config: ModelConfig) -> np.ndarray | ScaledArray:
        """Returns the parameter's value in host memory."""
        if source.kept == "table":
            table = functools.partial(_read_table, experts=config.n_routed_experts)
            return self._array(source, source.tensors, source.dtype, table)
        values = self._array(source, source.tensors, source.dtype)
        if not source.scales:
            return values
        scales = self._array(source, source.scales, DTYPES[source.scales[0].dtype])
        return ScaledArray(values, scales, source.block)

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
