"""Finds the tensors of each parameter in a folder, and checks their names, dtypes and shapes.

`plan_sources` looks at headers only. What it accepts can be read; no model exists yet.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from v4jax.checkpoint import names
from v4jax.checkpoint.hf_folder import Folder
from v4jax.checkpoint.names import Place, Stored
from v4jax.checkpoint.safetensors_file import DTYPES, Tensor
from v4jax.config.json_keys import did_you_mean
from v4jax.errors import CheckpointError
from v4jax.quant.scaled_array import FP4_BLOCK, ScaledArray
from v4jax.shapes import ceil_div

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
class GatheredArray:
    """An array in memory that gathers tensors of one shape, each at its index in leading axes.

    experts: of a routing table, the ids its values must be below; None: no table.
    scales: whether these are the scales of quantized values.
    """

    tensors: list[Tensor]
    indices: list[tuple[int, ...]]
    shape: tuple[int, ...]
    dtype: np.dtype
    experts: int | None = None
    scales: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclasses.dataclass(frozen=True)
class ParameterSource:
    """Where one parameter's value comes from; checked, nothing read yet.

    kept: "plain", "table", "fp8" or "fp4". scales: one per tensor for the last two, else empty.
    """

    places: list[Place]
    tensors: list[Tensor]
    scales: list[Tensor]
    kept: str
    shape: tuple[int, ...]  # of the parameter, logical
    block: tuple[int, int]  # tile of one scale
    experts: int  # of the model

    @property
    def lead(self) -> tuple[int, ...]:
        """The axes along which the tensors are gathered."""
        return self.shape[: len(self.places[0].index)]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the values in memory."""
        if self.kept == "table":
            return np.dtype(np.int32)
        if self.kept != "plain":
            return np.dtype(DTYPES[self.tensors[0].dtype])
        widened = self.places[0].stored is Stored.FLOAT32
        widened = widened or any(tensor.dtype == "F32" for tensor in self.tensors)
        return np.dtype(np.float32 if widened else DTYPES["BF16"])

    @property
    def arrays(self) -> list[GatheredArray]:
        """The arrays of the parameter's value: the values, then their scales if there are any."""
        indices = [place.index for place in self.places]

        def gather(tensors, dtype, **more) -> GatheredArray:
            shape = (*self.lead, *tensors[0].shape)
            return GatheredArray(tensors, indices, shape, np.dtype(dtype), **more)

        experts = self.experts if self.kept == "table" else None
        values = gather(self.tensors, self.dtype, experts=experts)
        if not self.scales:
            return [values]
        return [values, gather(self.scales, DTYPES[self.scales[0].dtype], scales=True)]

    def join(self, arrays: list) -> Any:
        """Returns the parameter's value made of `arrays`."""
        return ScaledArray(*arrays, self.block) if self.scales else arrays[0]

    @property
    def abstract(self) -> jax.ShapeDtypeStruct | ScaledArray:
        """The parameter's value with shapes in place of arrays."""
        return self.join([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in self.arrays])

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(array.nbytes for array in self.arrays)


def plan_sources(
    folder: Folder, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, ParameterSource]:
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


def check_present(folder: Folder) -> None:
    """Raises unless the folder has every tensor of its configuration's model.

    It ends at the first that is missing, and knows no module: a configuration that claims far more
    layers than there are is answered at once.

    Raises:
      CheckpointError: a tensor is missing.
    """
    for place in names.places(folder.config):
        _find(folder, place.tensor)


def _plan(folder: Folder, found: list[Place], shape: tuple[int, ...]) -> ParameterSource:
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
    scales, block = [], FP4_BLOCK if kept == "fp4" else folder.config.weight_block_size
    if kept in ("fp8", "fp4"):
        rows, columns = block
        scales = [_find(folder, names.scale_name(place.tensor)) for place in found]
        _check_shapes(scales, (ceil_div(below[0], rows), ceil_div(below[1], columns)))
        _check_scale_dtypes(scales)
    return ParameterSource(
        found, tensors, scales, kept, shape, block, folder.config.n_routed_experts
    )


def _find(folder: Folder, name: str) -> Tensor:
    if name in folder.tensors:
        return folder.tensors[name]
    raise CheckpointError(f"tensor {name} is missing: no file of {folder.path} holds it")


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
