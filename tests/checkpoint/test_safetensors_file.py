"""The container: agreement with the safetensors package, and every broken header."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from v4jax.checkpoint import safetensors_file as st
from v4jax.errors import CheckpointError

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "odd": np.arange(3, dtype=np.uint8),
    "half": np.arange(5).astype(ml_dtypes.bfloat16),
    "eight": np.arange(7).astype(ml_dtypes.float8_e4m3fn),
    "table": np.arange(4, dtype=np.int64).reshape(2, 2),
    "nothing": np.zeros((0, 4), np.float32),
    "scalar": np.array(3.0, np.float32),
}
NAMES = {
    "float32": "F32",
    "uint8": "U8",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int64": "I64",
}


def test_reads_what_the_package_writes(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(ARRAYS, str(path), metadata={"format": "pt"})
    found = {tensor.name: tensor for tensor in st.read_header(path)}
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        values = st.read_tensor(found[name])
        assert values.dtype == array.dtype and values.tobytes() == array.tobytes()


def test_the_package_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    contents = {name: (NAMES[str(array.dtype)], array.shape) for name, array in ARRAYS.items()}
    header, tensors = st.encode_header(contents)
    path.write_bytes(b"".join([header, *(st.as_bytes(t, ARRAYS[t.name]) for t in tensors)]))
    for tensor in st.read_header(path):
        assert tensor.offset % ARRAYS[tensor.name].dtype.itemsize == 0
    with safetensors.safe_open(str(path), "np") as file:
        assert set(file.keys()) == ARRAYS.keys() and file.metadata() == {"format": "pt"}
        for name in ("a", "odd", "table", "nothing", "scalar"):
            assert np.array_equal(file.get_tensor(name), ARRAYS[name])
    found = {tensor.name: st.read_tensor(tensor) for tensor in st.read_header(path)}
    assert all(found[name].tobytes() == array.tobytes() for name, array in ARRAYS.items())


def header(text, data=b"\0" * 8) -> bytes:
    """Returns a file with this header."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    """Returns the header of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# {what is wrong: (the file, what the message must say)}
BROKEN = {
    "empty": (b"", r"truncated or no safetensors file: 0 bytes"),
    "short": (b"\1\2\3", r"truncated or no safetensors file: 3 bytes"),
    "header beyond the end": ((99).to_bytes(8, "little") + b"{}", r"cannot hold a header of 99"),
    "absurd header": (b"\xff" * 16, r"truncated or no safetensors file"),
    "no JSON": (header(b"{not json"), r"broken header"),
    "nested without end": (header(b"[" * 100_000), r"broken header"),
    "no UTF-8": (header(b'{"\xff": 1}'), r"broken header"),
    "no object": (header([1]), r"broken header"),
    "twice": (header(b'{"a": 1, "a": 2}'), r"broken header: 'a' appears twice"),
    "no entry": (header({"a": 3}), r"header entry of tensor a is malformed"),
    "missing field": (header({"a": {"dtype": "F32", "shape": [2]}}), r"tensor a is malformed"),
    "negative size": (header({"a": entry(shape=(-2,))}), r"tensor a is malformed"),
    "fractional size": (header({"a": entry(shape=(2.0,))}), r"tensor a is malformed"),
    "three offsets": (header({"a": entry(offsets=(0, 4, 8))}), r"tensor a is malformed"),
    "a number for the shape": (
        header({"a": {**entry(), "shape": 2}}),
        r"the header entry of tensor a is malformed: \{'data_offsets': \[0, 8\], 'dtype': 'F32'",
    ),
    "text for the offsets": (header({"a": {**entry(), "data_offsets": "08"}}), r"a is malformed"),
    "a list for the dtype": (header({"a": {**entry(), "dtype": ["F32"]}}), r"a is malformed"),
    "a million axes": (header({"a": entry(shape=[10**9] * 1_000_000)}), r"a is malformed.{,200}$"),
    "two lines in a name": (
        header({"a\nb": entry()}),
        r"the name of a tensor must be printable and of at most 500 characters, got 'a\\nb'",
    ),
    "long name": (header({"a" * 10_000: entry()}), r"the name of a tensor must .{,200}$"),
    "unknown dtype": (header({"a": entry("F4")}), r"tensor a has the unknown dtype 'F4'"),
    "size and shape": (
        header({"a": entry(shape=(3,))}),
        r"tensor a .* needs 12 bytes.* gives it 8",
    ),
    "backwards": (header({"a": entry(offsets=(8, 0))}), r"tensor a .* gives it -8"),
    "overlap": (header({"a": entry(), "b": entry()}), r"tensor b overlaps another or leaves a gap"),
    "gap": (header({"a": entry(offsets=(4, 12))}, b"\0" * 12), r"overlaps another or leaves a gap"),
    "truncated": (header({"a": entry()}, b"\0" * 7), r"is truncated: its header describes"),
    "too long": (header({"a": entry()}, b"\0" * 9), r"is too long: its header describes"),
}


@pytest.mark.parametrize("data, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_files(tmp_path, data, message):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        st.read_header(path)
    assert str(path) in str(caught.value)


def test_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in (
        (tmp_path / "pipe", "it is no regular file"),
        ("/dev/zero", "it is no regular file"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path, "it is no regular file"),
    ):
        with pytest.raises(CheckpointError, match=f"{path} cannot be read: {message}"):
            st.read_header(path)


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"none cannot be read: No such file"):
        st.read_header(tmp_path / "none")


def test_file_that_shrinks_after_its_header_was_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header({"a": entry()}))
    (tensor,) = st.read_header(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tensor a cannot be read from .*ends early"):
        st.read_tensor(tensor)
