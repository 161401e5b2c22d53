"""A model's parameters as a checkpoint stores them: shapes, formats, bytes and tensors of each.

`census(abstract_transformer(config, numerics))` allocates nothing and works for Flash and Pro on
any machine. Its totals are those that the release publishes: they count weights, and leave out
scales and routing tables.
"""

import collections
import dataclasses
import math

import jax

from v4jax.checkpoint import names
from v4jax.costs.inventory import Weight, list_weights
from v4jax.model import Transformer
from v4jax.model.weights import variables


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
    def drafts(self) -> bool:
        """Whether the parameter belongs to an MTP block or a draft module."""
        return self.path.startswith(("mtp.", "drafter."))


def census(model: Transformer) -> list[Entry]:
    """Returns one entry per parameter, in the order of the checkpoint."""
    weights = {weight.path: weight for weight in list_weights(variables(model))}
    groups = names.by_parameter(names.places(model.config))
    assert groups.keys() == weights.keys(), sorted(groups.keys() ^ weights.keys())[:10]
    return [_entry(weights[path], len(found)) for path, found in groups.items()]


def _entry(weight: Weight, places: int) -> Entry:
    arrays = jax.tree.leaves(weight.value)
    return Entry(
        path=weight.path,
        shape=weight.shape,
        fmt=weight.fmt,
        axes=weight.axes,
        parameters=weight.parameters,
        stored_elements=sum(math.prod(array.shape) for array in arrays),
        memory_bytes=weight.bytes,
        tensors=places * len(arrays),
    )


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over a census; `file_bytes` counts a released checkpoint, whose tables are int64."""

    parameters: int
    parameters_without_drafts: int
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
        parameters_without_drafts=sum(e.parameters for e in entries if not e.drafts),
        stored_elements=sum(entry.stored_elements for entry in entries),
        memory_bytes=memory_bytes,
        file_bytes=memory_bytes + tables,
        tensors=sum(entry.tensors for entry in entries),
        memory_bytes_by_format=dict(by_format),
    )
