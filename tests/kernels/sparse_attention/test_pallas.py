"""Sparse attention on TPU: interpreted against the reference, and what the compiler accepts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import sparse_attention
from v4jax.kernels.sparse_attention import decode_tpu, pallas_tpu, prefill_tpu, reference
from v4jax.kernels.table import EntryTable
from v4jax.planning import ahead_of_time
from v4jax.quant import EntryFormat

WINDOW, RATIO, HEADS, CHANNELS, COUNT = 16, 4, 16, 256, 128
# Weights rounded to bfloat16 relative to another maximum, and the result itself.
BFLOAT16 = 2**-6


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "REWRITTEN_ROWS", 1)
    monkeypatch.setattr(decode_tpu, "DEPTH", 4)
    monkeypatch.setattr(prefill_tpu, "TILE_GROUPS", 2)
    monkeypatch.setattr(prefill_tpu, "BLOCK", 128)
    monkeypatch.setattr(prefill_tpu, "UNROLLED_ROWS", 2)


@functools.partial(jax.jit, static_argnames=("kind", "pallas"))
def attend(queries, recent, sink, start, stored, selected, *, kind, pallas):
    table = EntryTable(stored, jnp.int32(1), EntryFormat(kind, CHANNELS, 64, "bfloat16"))
    module = pallas_tpu if pallas else reference
    return module.attend_with_mass(
        queries, recent, sink, start, window=WINDOW, entries=table, selected=selected
    )[0]


def draw(kind, tokens, capacity, start):
    """Returns the arguments of `attend`; every query selects of what it may see."""
    random = np.random.RandomState(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.bfloat16)

    queries, recent = normal(2, tokens, HEADS, CHANNELS), normal(2, WINDOW + tokens, CHANNELS)
    sink = jnp.asarray(random.standard_normal(HEADS), jnp.float32)
    stored = EntryFormat(kind, CHANNELS, 64, "bfloat16").encode(normal(3, 2, capacity, CHANNELS))
    selected = np.full((2, tokens, COUNT), -1, np.int32)
    for b, t in np.ndindex(2, tokens):
        ids = random.permutation(min((start[b] + t + 1) // RATIO, capacity))[:COUNT]
        selected[b, t][random.permutation(COUNT)[: len(ids)]] = ids
    return queries, recent, sink, np.array(start, np.int32), stored, selected


# name: tokens, entries of the table, start of two sequences. The table is gathered row by row
# inside the kernel where it has fewer entries than the queries select.
CASES = {
    "from the beginning": (19, 160, [0, 1]),
    "more entries than places": (19, 160, [600, 300]),
    "one by one, one token": (1, 256, [0, 639]),
    "one by one, three tokens": (3, 384, [7, 1200]),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
@pytest.mark.parametrize("name", CASES)
def test_values(name, kind):
    tokens, capacity, start = CASES[name]
    assert pallas_tpu.gathers_one_by_one(tokens, COUNT, capacity) == name.startswith("one by one")
    arguments = draw(kind, tokens, capacity, start)
    got, expected = (attend(*arguments, kind=kind, pallas=pallas) for pallas in (True, False))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, expected)), 0, BFLOAT16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sink", [-np.inf, 1e4])
def test_extreme_sinks(sink):
    queries, recent, _, *rest = draw("bfloat16", 19, 160, [0, 300])
    arguments = (queries, recent, jnp.full(HEADS, sink, jnp.float32), *rest)
    got, expected = (attend(*arguments, kind="bfloat16", pallas=pallas) for pallas in (True, False))
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, expected)), 0, BFLOAT16)


@pytest.mark.usefixtures("small_tiles")
def test_gradients():
    queries, recent, sink, start, stored, selected = draw("bfloat16", 19, 160, [0, 300])
    weight = np.random.RandomState(1).standard_normal(queries.shape)

    def loss(queries, recent, sink, stored, pallas):
        attended = attend(
            queries, recent, sink, start, stored, selected, kind="bfloat16", pallas=pallas
        )
        return (attended.astype(jnp.float32) * weight).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    got, expected = (gradient(queries, recent, sink, stored, pallas) for pallas in (True, False))
    for value, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        value, wanted = np.asarray(value, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(value, wanted, 0, BFLOAT16 * np.abs(wanted).max())


def test_why_not():
    """What falls back to the reference, and why."""
    queries, recent, _, _, stored, selected = draw("bfloat16", 3, 160, [0, 300])
    table = EntryTable(stored, jnp.int32(1), EntryFormat("bfloat16", CHANNELS, 64, "bfloat16"))
    assert pallas_tpu.supported(queries, recent, WINDOW, table, selected) is None
    wide = (x.astype(jnp.float32) for x in (queries, recent))
    for reason, arguments in {
        "must be bfloat16": (*wide, WINDOW, table, selected),
        "channels must divide by 256": (queries[..., :128], recent, WINDOW, table, selected),
        "must divide by 128": (queries, recent, WINDOW, table, selected[..., :21]),
    }.items():
        assert reason in pallas_tpu.supported(*arguments)


# Flash: 64 heads, 512 entries a query; Pro: 128 and 1,024. An entry per 4 tokens of a million.
SHAPES = {
    "Flash, prefill": dict(batch=1, tokens=2048, heads=64, count=512),
    "Pro, prefill": dict(batch=1, tokens=2048, heads=128, count=1024),
    "Flash, decode": dict(batch=16, tokens=1, heads=64, count=512),
    "Pro, decode": dict(batch=8, tokens=1, heads=128, count=1024),
    "Flash, training": dict(batch=1, tokens=4096, heads=64, count=512, entries=1024),
}


MODEST_BYTES = 64 * 2**20  # ids, unions and padded queries


@pytest.mark.tpu_compiler
@pytest.mark.skipif(
    ahead_of_time.why_unavailable() is not None, reason=str(ahead_of_time.why_unavailable())
)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", ahead_of_time.TOPOLOGIES)
def test_compiles(chip, name):
    shape = SHAPES[name]
    batch, tokens, heads, count = (shape[key] for key in ("batch", "tokens", "heads", "count"))
    window, channels, backward = 128, 512, name.endswith("training")
    entries = shape.get("entries", 1_048_576 // RATIO)
    stored_as = EntryFormat("bfloat16" if backward else "fp8", channels, 64, "bfloat16")

    def run(queries, recent, sink, stored, layer, start, selected):
        table = EntryTable(stored, layer, stored_as)
        return sparse_attention.attend(
            queries, recent, sink, start, window=window, entries=table, selected=selected
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
        jax.eval_shape(lambda: stored_as.zeros(1, batch, entries)),
        spec((), jnp.int32),
        spec((batch,), jnp.int32),
        spec((batch, tokens, count), jnp.int32),
    )
    assert "sparse_attention" in compiled.as_text()
    if not backward:
        # Entries in use as rows, for a prefill, and never a copy of the table or its stack.
        rows = batch * entries * 2 * channels if tokens > 1 else 0
        assert compiled.memory_analysis().temp_size_in_bytes <= rows + MODEST_BYTES
