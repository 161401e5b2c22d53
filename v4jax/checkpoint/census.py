"""Counts a model's parameters: path, shape, format, bytes, logical axes, from shapes alone.

`census(abstract_transformer(config, numerics))` allocates nothing, so it works for Flash and Pro on
any machine. Totals are those of spec A.4: weights only, neither scales nor routing tables.
"""

import collections
import dataclasses
import math

import numpy as np
from flax import nnx

from v4jax.checkpoint import names
from v4jax.checkpoint.names import Stored
from v4jax.model import Transformer
from v4jax.quant import ScaledArray


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter of the model.

    shape: logical; packed FP4 counts single codes. fmt: "fp4", "fp8", or a dtype.
    parameters: 0 for routing tables, which are no weights. stored_elements: of all arrays, scales
    and tables included, packed FP4 counted as bytes. memory_bytes: as loaded. tensors: in a
    checkpoint, scales included.
    """

    path: str
    shape: tuple[int, ...]
    fmt: str
    axes: tuple[str, ...]
    parameters: int
    stored_elements: int
    memory_bytes: int
    tensors: int

    @property
    def is_mtp(self) -> bool:
        """Whether the parameter belongs to an MTP block."""
        return self.path.startswith("mtp.")


def model_variables(model: Transformer) -> dict[str, nnx.Variable]:
    """Returns every stored variable of the model by its path: `stack.prefix.0.moe_norm.weight`."""
    return {
        ".".join(map(str, path)): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }


def census(model: Transformer) -> list[Entry]:
    """Returns one entry per parameter, in the order of the checkpoint."""
    variables = model_variables(model)
    groups = names.by_parameter(names.places(model.config))
    assert groups.keys() == variables.keys(), sorted(groups.keys() ^ variables.keys())[:10]
    return [_entry(path, variables[path], found) for path, found in groups.items()]


def _entry(path: str, variable: nnx.Variable, found: list[names.Place]) -> Entry:
    value = variable.get_value()
    arrays = (value.values, value.scales) if isinstance(value, ScaledArray) else (value,)
    is_table = found[0].stored is Stored.TABLE
    return Entry(
        path=path,
        shape=tuple(value.shape),
        fmt=format_of(value),
        axes=tuple(variable.get_metadata().get("axes") or ()),
        parameters=0 if is_table else math.prod(value.shape),
        stored_elements=sum(math.prod(array.shape) for array in arrays),
        memory_bytes=sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays),
        tensors=len(found) * len(arrays),
    )


def format_of(value) -> str:
    """Returns "fp4", "fp8" or the dtype of a parameter's value."""
    if isinstance(value, ScaledArray):
        return "fp4" if value.is_fp4 else "fp8"
    return str(np.dtype(value.dtype))


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over a census; `file_bytes` counts a released checkpoint, whose tables are int64."""

    parameters: int
    parameters_without_mtp: int
    stored_elements: int
    memory_bytes: int
    file_bytes: int
    tensors: int
    memory_bytes_by_format: dict[str, int]


def total(entries: list[Entry]) -> Totals:
    """Returns the sums of a census."""
    by_format = collections.Counter()
    for entry in entries:
        by_format[entry.fmt] += entry.memory_bytes
    tables = sum(entry.memory_bytes for entry in entries if entry.fmt == "int32")
    memory_bytes = sum(entry.memory_bytes for entry in entries)
    return Totals(
        parameters=sum(entry.parameters for entry in entries),
        parameters_without_mtp=sum(e.parameters for e in entries if not e.is_mtp),
        stored_elements=sum(entry.stored_elements for entry in entries),
        memory_bytes=memory_bytes,
        file_bytes=memory_bytes + tables,
        tensors=sum(entry.tensors for entry in entries),
        memory_bytes_by_format=dict(by_format),
    )
