"""The safetensors container: headers read and checked, tensors read in place, both encoded.

A file is 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
bytes of the tensors without gaps. The `safetensors` package has no FP8 scales in NumPy and hands
out whole copies; here bytes go from the file into a slice of the array that keeps them, and back.

Every inconsistency is a `CheckpointError` naming file and tensor, found before any tensor is read.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from v4jax.config.json_keys import brief, parse_json
from v4jax.errors import CheckpointError
from v4jax.files import Path, open_bytes

# Packed FP4 (I8) and e8m0 scales are bytes in memory.
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.uint8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_LENGTH_BYTES = 8
PAGE_BYTES = 4096
BLOCK_BYTES = 4 << 20  # of rows read to be cut
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own implementation
_MOST_AXES, _LONGEST_NAME = 8, 500


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: what it is and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # from the start of the file

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def read_header(path: Path) -> list[Tensor]:
    """Returns the tensors of a file in the order of their bytes.

    Raises:
      CheckpointError: the file is unreadable, truncated, or its header contradicts itself.
    """
    try:
        with open_bytes(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated or no safetensors file: {size} bytes cannot hold a "
                    f"header of {length}"
                )
            header = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        entries = parse_json(header)
    except ValueError as error:
        raise CheckpointError(f"{path} has a broken header: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path} has a broken header: it is no JSON object")
    entries.pop("__metadata__", None)
    found = [_parse_entry(path, name, entry) for name, entry in entries.items()]
    found.sort(key=lambda pair: pair[1])
    end = 0
    for tensor, (first, last) in found:
        if first != end:
            raise CheckpointError(f"{path}: tensor {tensor.name} overlaps another or leaves a gap")
        end = last
    start = _LENGTH_BYTES + length
    if start + end != size:
        state = "truncated" if start + end > size else "too long"
        raise CheckpointError(
            f"{path} is {state}: its header describes {start + end} bytes, the file has {size}"
        )
    return [dataclasses.replace(tensor, offset=start + span[0]) for tensor, span in found]


def _parse_entry(path, name, entry) -> tuple[Tensor, tuple[int, int]]:
    check_name(path, name)
    if not _is_entry(entry):
        raise CheckpointError(
            f"{path}: the header entry of tensor {name} is malformed: {brief(entry)}"
        )
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name} has the unknown dtype {brief(entry['dtype'])}"
        )
    tensor = Tensor(name, entry["dtype"], tuple(entry["shape"]), path, 0)
    first, last = entry["data_offsets"]
    if last - first != tensor.nbytes:
        raise CheckpointError(
            f"{path}: tensor {name} of dtype {tensor.dtype} and shape {list(tensor.shape)} needs "
            f"{tensor.nbytes} bytes, its header gives it {last - first}"
        )
    return tensor, (first, last)


def check_name(path: Path, name: str) -> None:
    """Raises unless a tensor's name can be shown in one line of a message.

    Raises:
      CheckpointError: it cannot.
    """
    if not name.isprintable() or len(name) > _LONGEST_NAME:
        raise CheckpointError(
            f"{path}: the name of a tensor must be printable and of at most {_LONGEST_NAME} "
            f"characters, got {brief(name)}"
        )


def _is_entry(entry) -> bool:
    """Whether what a header says of a tensor has a dtype, few axes, and two offsets."""
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    fits = isinstance(entry["dtype"], str) and isinstance(shape, list) and isinstance(offsets, list)
    fits = fits and len(shape) <= _MOST_AXES and len(offsets) == 2
    return fits and all(type(x) is int and x >= 0 for x in (*shape, *offsets))


def read_into(tensor: Tensor, out: np.ndarray, box: tuple[slice, ...] | None = None) -> None:
    """Fills `out`, contiguous, with the bytes of tensor[box]; threads may share it.

    Whole rows are read in one piece. Of a range of columns each row's piece is read by itself where
    it is a page at least; below that a disk reads what lies between as well, so rows are read
    whole, some MiB at a time, and cut.

    Args:
      box: of a vector or matrix, a slice of step 1 per axis; None: all of any tensor.

    Raises:
      CheckpointError: the bytes are not there.
    """
    itemsize = np.dtype(DTYPES[tensor.dtype]).itemsize
    if box is None:
        sizes, box = (1, math.prod(tensor.shape)), (slice(None),) * 2
    else:
        assert len(box) == len(tensor.shape) <= 2, (tensor, box)
        sizes = (1,) * (2 - len(box)) + tensor.shape
        box = (slice(None),) * (2 - len(box)) + box
    rows, columns = (range(*part.indices(size)) for part, size in zip(box, sizes, strict=True))
    row_bytes, piece_bytes = sizes[1] * itemsize, len(columns) * itemsize
    start = tensor.offset + rows.start * row_bytes
    begin = columns.start * itemsize
    assert out.flags.c_contiguous and out.nbytes == len(rows) * piece_bytes, (tensor, box)
    view = out.reshape(-1).view(np.uint8)
    try:
        with open_bytes(tensor.file) as file:
            if piece_bytes == row_bytes:
                read_bytes(file, start, view)
            elif piece_bytes >= PAGE_BYTES or len(rows) == 1:
                for row in range(len(rows)):
                    piece = view[row * piece_bytes :][:piece_bytes]
                    read_bytes(file, start + row * row_bytes + begin, piece)
            else:
                view = view.reshape(len(rows), piece_bytes)
                step = max(1, BLOCK_BYTES // row_bytes)
                for first in range(0, len(rows), step):
                    block = np.empty((min(step, len(rows) - first), row_bytes), np.uint8)
                    read_bytes(file, start + first * row_bytes, block.reshape(-1))
                    view[first : first + step] = block[:, begin : begin + piece_bytes]
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"tensor {tensor.name} cannot be read from {tensor.file}: {reason}"
        ) from error


def read_bytes(file, offset: int, out: np.ndarray) -> None:
    """Fills `out` [bytes] from an open file."""
    view, done = memoryview(out), 0
    file.seek(offset)
    while done < len(out):
        count = file.readinto(view[done:])
        if not count:
            raise OSError("the file ends early")
        done += count


def read_tensor(tensor: Tensor, box: tuple[slice, ...] | None = None) -> np.ndarray:
    """Returns tensor[box], or the whole of it, as a new array."""
    shape = tensor.shape if box is None else box_shape(tensor.shape, box)
    out = np.empty(shape, DTYPES[tensor.dtype])
    read_into(tensor, out, box)
    return out


def box_shape(shape: tuple[int, ...], box: tuple[slice, ...]) -> tuple[int, ...]:
    """Returns the shape of array[box]."""
    return tuple(len(range(*part.indices(size))) for part, size in zip(box, shape, strict=True))


def encode_header(
    contents: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, list[Tensor]]:
    """Returns how a file of `contents` {name: (dtype, shape)} begins, and what follows in order.

    Tensors of wider dtypes come first, so that every tensor is aligned to its dtype.
    """

    def width(name):
        return np.dtype(DTYPES[contents[name][0]]).itemsize

    header, tensors, end = {"__metadata__": {"format": "pt"}}, [], 0
    for name in sorted(contents, key=width, reverse=True):  # stable: otherwise in the given order
        dtype, shape = contents[name]
        tensors.append(Tensor(name, dtype, tuple(shape), Path(), end))
        header[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + tensors[-1].nbytes],
        }
        end += tensors[-1].nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, tensors


def as_bytes(tensor: Tensor, values: np.ndarray) -> memoryview:
    """Returns the bytes of a tensor as a file holds them."""
    values = np.asarray(values, order="C")
    assert values.nbytes == tensor.nbytes and values.shape == tensor.shape, tensor
    return memoryview(values.reshape(-1).view(np.uint8))
