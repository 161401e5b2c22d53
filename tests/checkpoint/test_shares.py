"""Reading onto a mesh: a host reads what its devices hold, no byte twice, and all values agree."""

import collections
import contextlib
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

import v4jax
from v4jax.checkpoint import hf_reader, read_abstract, read_model, safetensors_file
from v4jax.checkpoint.hf_folder import open_folder
from v4jax.checkpoint.hf_sources import plan_sources
from v4jax.model.weights import variables
from v4jax.parallel import Layout, annotate_shardings, make_mesh
from v4jax.parallel.weight_sharding import plan_boxes, spec_of

from . import folders

# Every axis of FP4 (1×32) and FP8 (128×128) weights can be halved in whole blocks.
CONFIG = dict(
    folders.UNIFORM,
    compress_ratios=[4, 4, 0],
    num_hidden_layers=2,
    vocab_size=96,
    hidden_size=256,
    head_dim=128,
    o_lora_rank=128,
    moe_intermediate_size=256,
)
MESHES = {
    "experts": (dict(expert=4, context=2), "serve"),
    "columns of down projections": (dict(data=2, expert=2, tensor=2), "serve"),
    "weights split for storage": (dict(data=2, expert=2, tensor=2), "train"),
}


@pytest.fixture(scope="module", params=["released", "base"])
def folder(request, tmp_path_factory):
    """A checkpoint with FP4 experts and e8m0 scales, or FP8 experts and float32 scales."""
    tensors = folders.tensors_of(CONFIG, request.param)
    return folders.write(tmp_path_factory.mktemp("in"), tensors, CONFIG)


@contextlib.contextmanager
def counted(monkeypatch):
    """Gives a list that gets (file, first byte, last byte + 1) of every read."""
    reads, read_bytes = [], safetensors_file.read_bytes

    def count(file, offset, out):
        reads.append((file.name, offset, offset + len(out)))
        read_bytes(file, offset, out)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "read_bytes", count)
        yield reads


def size_of(reads) -> int:
    """Returns the bytes of reads, which must not overlap."""
    by_file = collections.defaultdict(list)
    for name, *span in reads:
        by_file[name].append(span)
    for spans in by_file.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    return sum(last - first for _, first, last in reads)


@pytest.fixture(scope="module")
def whole(folder):
    """Returns {path: arrays in host memory} of the model on one device."""
    return host_arrays(read_model(folder))


def host_arrays(model) -> dict[str, list[np.ndarray]]:
    """Returns {path: the arrays of the parameter}."""
    held = variables(model).items()
    return {path: [np.asarray(x) for x in jax.tree.leaves(v.get_value())] for path, v in held}


@pytest.mark.parametrize("mesh, weights", MESHES.values(), ids=MESHES.keys())
def test_one_host_reads_every_byte_once(folder, whole, monkeypatch, mesh, weights):
    with counted(monkeypatch) as reads:
        made = v4jax.load(folder, mesh=make_mesh(**mesh), weight_layout=weights)
    tensors = open_folder(folder).tensors.values()
    assert size_of(reads) == sum(tensor.nbytes for tensor in tensors)
    for path, arrays in host_arrays(made).items():
        assert all(map(folders.same_bytes, arrays, whole[path])), path


@pytest.mark.parametrize("mesh, weights", MESHES.values(), ids=MESHES.keys())
def test_two_hosts(folder, whole, monkeypatch, mesh, weights):
    """Of two hosts with four devices each reads the elements of its shares, half of the experts."""
    monkeypatch.setattr(safetensors_file, "PAGE_BYTES", 1)  # columns exactly, however few
    layout = Layout(make_mesh(**mesh), weights)
    placed = variables(annotate_shardings(read_abstract(folder), layout))
    shapes = {path: variable.get_value().shape for path, variable in placed.items()}
    sources = plan_sources(open_folder(folder), shapes)
    largest = max(array.nbytes for arrays in whole.values() for array in arrays)
    for host in (jax.devices()[:4], jax.devices()[4:]):
        with hf_reader._Reader(sources, placed, None, layout) as reader:
            for path, source in sources.items():
                sharding = NamedSharding(layout.mesh, spec_of(placed[path]))
                for array, expected in zip(source.arrays, whole[path], strict=True):
                    indices = sharding.devices_indices_map(array.shape)
                    indices, needed = {d: indices[d] for d in host}, np.zeros(array.shape, bool)
                    for index in indices.values():
                        needed[index] = True
                    share = needed.mean()
                    with counted(monkeypatch) as reads:
                        for box, _ in plan_boxes(indices, array.shape):
                            values = reader._read(array, box)
                            assert folders.same_bytes(values, expected[box]), (path, box)
                            assert values.nbytes <= largest // 2
                            needed[box] = False
                    assert not needed.any()
                    assert size_of(reads) == array.nbytes * share, path
                    assert share == 0.5 or ".experts." not in path


COLUMNS = {
    "whole rows": (slice(1, 5), slice(0, 3000), [(3000, 12000)]),
    "pieces of a page and more": (slice(2, 4), slice(500, 1700), [(6500, 1200), (9500, 1200)]),
    "less than a page": (slice(2, 5), slice(7, 10), [(6000, 6000), (12000, 3000)]),
    "one row": (slice(2, 3), slice(7, 10), [(6007, 3)]),
}


@pytest.mark.parametrize("rows, columns, spans", COLUMNS.values(), ids=COLUMNS.keys())
def test_what_is_read_of_a_matrix(tmp_path, monkeypatch, rows, columns, spans):
    """Elements of four bytes: (first, count) of each read. Two rows of 12,000 bytes are a block."""
    monkeypatch.setattr(safetensors_file, "BLOCK_BYTES", 24_000)
    values = np.arange(6 * 3000, dtype=np.float32).reshape(6, 3000)
    header, (tensor,) = safetensors_file.encode_header({"w": ("F32", values.shape)})
    (tmp_path / "x").write_bytes(header + safetensors_file.as_bytes(tensor, values))
    (tensor,) = safetensors_file.read_header(tmp_path / "x")
    with counted(monkeypatch) as reads:
        found = safetensors_file.read_tensor(tensor, (rows, columns))
    assert np.array_equal(found, values[rows, columns])
    begin = tensor.offset
    assert [((a - begin) // 4, (b - a) // 4) for _, a, b in reads] == spans
