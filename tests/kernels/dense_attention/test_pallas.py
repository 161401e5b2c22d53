"""Dense attention on TPU: interpreted against the reference, and what the compiler accepts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import dense_attention
from v4jax.kernels.dense_attention import entries_tpu, pallas_tpu, pallas_tpu_backward, reference
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.table import NEVER, EntryTable
from v4jax.planning import ahead_of_time
from v4jax.quant import EntryFormat

WINDOW, RATIO, HEADS, CHANNELS = 16, 4, 8, 128
CAPACITY = 40  # two blocks of 32 entries, the last padded
TOKENS = 50  # two tiles of 32 tokens, the last not full

# Against sums of tens of float32 products; and of weights that were rounded to bfloat16 relative to
# another maximum, then the result itself (2^-8 of values near 1).
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-6}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "TILE_ROWS", 256)
    monkeypatch.setattr(pallas_tpu, "GROUP_ROWS", 128)
    monkeypatch.setattr(pallas_tpu_backward, "TILE_ROWS", 128)
    monkeypatch.setattr(pallas_tpu_backward, "GROUP_ROWS", 128)
    monkeypatch.setattr(entries_tpu, "BLOCK", 32)
    monkeypatch.setattr(entries_tpu, "ALIGNMENT", 32)


@functools.partial(jax.jit, static_argnames=("kind", "dtype", "ratio", "pallas", "window"))
def attend(
    queries,
    recent,
    sink,
    start,
    end,
    stored,
    begin=None,
    *,
    kind,
    dtype,
    ratio,
    pallas,
    window=WINDOW,
):
    table = None
    if ratio:
        table = EntryTable(stored, jnp.int32(1), EntryFormat(kind, CHANNELS, 64, dtype))
    module = pallas_tpu if pallas else reference
    options = {"window": window, "entries": table, "ratio": ratio, "begin": begin}
    return module.attend(queries, recent, sink, start, end, **options)


def draw(dtype, kind, tokens, capacity=CAPACITY):
    """Returns (queries, recent, sink) and the stored entries of three layers, the second to use."""
    random = np.random.RandomState(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    queries, recent = normal(2, tokens, HEADS, CHANNELS), normal(2, WINDOW + tokens, CHANNELS)
    sink = jnp.asarray(random.standard_normal(HEADS), jnp.float32)
    stored = EntryFormat(kind, CHANNELS, 64, dtype).encode(normal(3, 2, capacity, CHANNELS))
    return (queries, recent, sink), stored


FORMATS = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "fp8": ("bfloat16", "fp8"),
}
# name: tokens, (start, end) of two sequences; the last token of 40 entries is at position 159.
CASES = {
    "from the beginning": (TOKENS, [0, 0], [TOKENS, TOKENS]),
    "all residues, all blocks": (TOKENS, [61, 110], [111, 160]),
    "padding, and a sequence without tokens": (TOKENS, [30, 128], [35, 128]),
    "one token": (1, [0, 159], [1, 160]),
    "one token, first entry": (1, [3, 2], [4, 3]),
    "three tokens": (3, [100, 126], [103, 129]),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values(case, name):
    (tokens, start, end), (dtype, kind) = case, FORMATS[name]
    arguments, stored = draw(dtype, kind, tokens)
    start, end = np.array(start, np.int32), np.array(end, np.int32)
    settings = dict(kind=kind, dtype=dtype, ratio=RATIO)
    got = attend(*arguments, start, end, stored, **settings, pallas=True)
    expected = attend(*arguments, start, end, stored, **settings, pallas=False)
    check(got, expected, end - start, dtype)


def check(got, expected, real, dtype):
    real = np.arange(got[0].shape[1]) < real[:, None]
    for value, wanted in zip(got, expected, strict=True):
        value, wanted = (np.asarray(x, np.float32)[real] for x in (value, wanted))
        np.testing.assert_allclose(value, wanted, 0, TOLERANCE[dtype])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sink", [-np.inf, 1e4])
def test_window_only_and_extreme_sinks(sink):
    (queries, recent, _), stored = draw("float32", "float32", TOKENS)
    start, sink = np.array([0, 9], np.int32), jnp.full(HEADS, sink, jnp.float32)
    settings = dict(kind="float32", dtype="float32", ratio=0)
    arguments = (queries, recent, sink, start, start + TOKENS, stored)
    got, expected = (attend(*arguments, **settings, pallas=pallas) for pallas in (True, False))
    check(got[:1], expected[:1], np.full(2, TOKENS), "float32")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("pallas", [True, False], ids=["pallas", "reference"])
@pytest.mark.parametrize("tokens", [1, TOKENS], ids=["decode", "prefill"])
def test_split_entries_merge(tokens, pallas):
    """Window, sink and the first 17 entries in one call, the others in another: merged, the whole.

    The other share sees no window and no sink, and positions count from its first entry. In the
    first sequence some queries, in decode all, see none of it.
    """
    (queries, recent, sink), stored = draw("float32", "float32", tokens)
    start, split = np.array([61, 110 - tokens], np.int32), 17
    run = functools.partial(attend, kind="float32", dtype="float32", ratio=RATIO, pallas=pallas)
    whole = run(queries, recent, sink, start, start + tokens, stored)
    shares = [jax.tree.map(lambda x: x[:, :, :split], stored)]
    shares.append(jax.tree.map(lambda x: x[:, :, split:], stored))
    parts = [run(queries, recent, sink, start, start + tokens, shares[0])]
    rest, nothing = start - split * RATIO, jnp.full(HEADS, MASKED)
    parts.append(
        run(queries, recent[:, WINDOW:], nothing, rest, rest + tokens, shares[1], window=0)
    )
    log_mass = jnp.logaddexp(parts[0][1], parts[1][1])
    merged = sum(attended * jnp.exp(share - log_mass)[..., None] for attended, share in parts)
    check((merged, log_mass), whole, np.full(2, tokens), "float32")
    assert np.abs(np.asarray(parts[0][0] - whole[0])[1]).max() > 0.1


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("ratio", [0, RATIO], ids=["window", "entries"])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_gradients(name, ratio):
    dtype, kind = FORMATS[name]
    arguments, stored = draw(dtype, kind, TOKENS)
    start = np.array([0, 90], np.int32)
    weight = np.random.RandomState(1).standard_normal((2, TOKENS, HEADS, CHANNELS))

    def loss(queries, recent, sink, stored, pallas):
        settings = dict(kind=kind, dtype=dtype, ratio=ratio, pallas=pallas)
        attended, log_mass = attend(
            queries, recent, sink, start, start + TOKENS, stored, **settings
        )
        return (attended.astype(jnp.float32) * weight).sum() + log_mass.sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    got, expected = (gradient(*arguments, stored, pallas) for pallas in (True, False))
    for value, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        value, wanted = np.asarray(value, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(value, wanted, 0, TOLERANCE[dtype] * np.abs(wanted).max())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("ratio", [0, RATIO], ids=["window", "entries"])
def test_several_documents(ratio):
    """Values and gradients of packed rows; what padding gets means nothing, and its cotangent is 0.

    Tiles are of 32 and 16 tokens, blocks of 32 entries: documents begin inside blocks, and end
    inside tiles.
    """
    tokens, start = 400, np.array([0, 128], np.int32)
    arguments, stored = draw("float32", "float32", tokens, capacity=(128 + tokens) // RATIO)
    begin = np.full((2, tokens), NEVER, np.int32)
    # In row 1 a unit of padding, and a document of two units.
    for row, first, last in (
        (0, 0, 100),
        (0, 128, 256),
        (0, 256, 400),
        (1, 128, 378),
        (1, 384, 400),
    ):
        begin[row, first:last] = start[row] + first
    real = (begin != NEVER)[:, :, None]
    weight = np.random.RandomState(1).standard_normal((2, tokens, HEADS, CHANNELS))

    def compute(queries, recent, sink, stored, pallas):
        settings = dict(kind="float32", dtype="float32", ratio=ratio, pallas=pallas)
        results = attend(queries, recent, sink, start, start + tokens, stored, begin, **settings)
        attended, log_mass = (
            jnp.where(real[..., None] if x.ndim == 4 else real, x, 0) for x in results
        )
        return (attended * weight).sum() + log_mass.sum(), (attended, log_mass)

    gradient = jax.grad(compute, argnums=(0, 1, 2, 3), has_aux=True)
    got, expected = (gradient(*arguments, stored, pallas) for pallas in (True, False))
    for value, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        limit = TOLERANCE["float32"] * max(np.abs(wanted).max(), 1)
        np.testing.assert_allclose(value, wanted, 0, limit)


def test_why_not():
    """What falls back to the reference, and why."""
    queries, recent = jnp.zeros((1, 4, 8, 128), jnp.bfloat16), jnp.zeros((1, 20, 128), jnp.bfloat16)
    assert pallas_tpu.supported(queries, recent, 16, None) is None
    for reason, arguments in {
        "channels must divide by 128": (queries[..., :64], recent[..., :64], 16, None),
        "heads must be a power of two": (queries[:, :, :6], recent, 16, None),
        "window must divide by 16": (queries, recent, 9, None),
        "must both be bfloat16 or float32": (queries.astype(jnp.float32), recent, 16, None),
    }.items():
        assert reason in pallas_tpu.supported(*arguments)
    stored_as = EntryFormat("bfloat16", 128, 64, "bfloat16")
    many = EntryTable(
        {"values": jnp.zeros((1, 1, 2**17, 128), jnp.bfloat16)}, jnp.int32(0), stored_as
    )
    assert "do not fit into VMEM" in pallas_tpu.supported(queries, recent, 16, many)


# Flash has 64 heads of 512 channels, Pro 128; HCA has an entry per 128 tokens of a million.
SHAPES = {
    "Flash, prefill": dict(batch=1, tokens=2048, heads=64),
    "Pro, prefill": dict(batch=1, tokens=2048, heads=128),
    "Flash, decode": dict(batch=16, tokens=1, heads=64),
    "Pro, decode": dict(batch=64, tokens=1, heads=128),
    "Flash, window layer": dict(batch=1, tokens=2048, heads=64, entries=0),
    "Flash, training on packed rows": dict(
        batch=1, tokens=4096, heads=64, entries=32, backward=True, packed=True
    ),
    # A share of a sequence of 131,072 tokens, whose queries alone are 16 GiB.
    "Pro, training": dict(batch=1, tokens=4096, heads=128, entries=1024, backward=True),
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("chip", ahead_of_time.TOPOLOGIES)
def test_compiles(chip, shape):
    batch, tokens, heads = shape["batch"], shape["tokens"], shape["heads"]
    window, channels, backward = 128, 512, shape.get("backward", False)
    entries = shape.get("entries", 1_048_576 // 128)
    stored_as = EntryFormat("bfloat16" if backward else "fp8", channels, 64, "bfloat16")

    def run(queries, recent, sink, stored, layer, start, begin):
        table = EntryTable(stored, layer, stored_as) if entries else None
        return dense_attention.attend(
            *(queries, recent, sink, start, start + tokens),
            window=window,
            entries=table,
            ratio=128 if entries else 0,
            begin=begin,
        )

    def gradients(*arguments):
        results, pull = jax.vjp(lambda *x: run(*x, *arguments[4:]), *arguments[:4])
        return pull(results)

    spec = jax.ShapeDtypeStruct
    compiled = ahead_of_time.compile_for(
        ahead_of_time.TOPOLOGIES[chip],
        gradients if backward else run,
        spec((batch, tokens, heads, channels), jnp.bfloat16),
        spec((batch, window + tokens, channels), jnp.bfloat16),
        spec((heads,), jnp.float32),
        jax.eval_shape(lambda: stored_as.zeros(2, batch, max(entries, 1))),
        spec((), jnp.int32),
        spec((batch,), jnp.int32),
        spec((batch, tokens), jnp.int32) if shape.get("packed") else None,
    )
    name = "dense_attention_backward" if backward else "dense_attention"
    assert name in compiled.as_text()
