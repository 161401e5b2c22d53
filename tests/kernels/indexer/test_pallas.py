"""Selection on TPU: values in interpret mode; what the TPU compiler accepts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import indexer
from v4jax.kernels.indexer import pallas_tpu, reference
from v4jax.kernels.table import EntryTable
from v4jax.planning import ahead_of_time
from v4jax.quant import EntryFormat

RATIO, HEADS, CHANNELS = 4, 2, 128
TOKENS, COUNT = 130, 21  # two tiles of 128 queries, the last nearly empty
CAPACITY = 150  # three blocks of 64 entries, the last not full
LAST = CAPACITY * RATIO
BLOCKS = pallas_tpu.Blocks(entries=64, chunk=4, growth=16, dense=2)


@functools.partial(jax.jit, static_argnames=("kind", "pallas"))
def select(queries, weights, stored, start, end, kind, pallas):
    table = EntryTable(stored, jnp.int32(1), EntryFormat(kind, CHANNELS, 64, "bfloat16"))
    if pallas:
        chosen = pallas_tpu.select(
            *(queries, weights, table, start, end),
            ratio=RATIO,
            count=COUNT,
            blocks=BLOCKS,
            interpret=True,
        )
    else:
        chosen = reference.select(queries, weights, table, start, end, ratio=RATIO, count=COUNT)
    return jnp.sort(chosen, axis=-1)


def draw(scores: str, kind: str):
    """Returns queries, head weights and stored keys; all but "reals" have exact float32 scores."""
    random = np.random.RandomState(list(SCORES).index(scores))
    queries = random.standard_normal((2, TOKENS, HEADS, CHANNELS))
    weights = random.standard_normal((2, TOKENS, HEADS))
    keys = random.standard_normal((3, 2, CAPACITY, CHANNELS))
    if scores != "reals":
        queries = np.round(queries) * (random.uniform(size=queries.shape) < 0.03)
        weights, keys = np.round(weights), np.round(keys)
    if scores == "all zero":  # −0 too: some weights are negative
        queries, keys = np.abs(queries), -np.abs(keys)
    if scores == "all negative":
        queries, weights, keys = np.abs(queries), -1 - np.abs(weights), 1 + np.abs(keys)
    if scores == "each better than all before":
        queries[:], weights[:], keys[:] = 0, 1, 0
        queries[..., 0] = 1
        keys[..., 0] = np.arange(CAPACITY) // 8 * 8  # in bfloat16 exact; eight tie each
    if scores == "best in one stream":
        queries[:], weights[:], keys[:] = 0, 1, 0
        queries[..., 0] = 1
        keys[:, :, 3::8, 0] = 2
    queries, weights, keys = (jnp.asarray(x, jnp.bfloat16) for x in (queries, weights, keys))
    return queries, weights, EntryFormat(kind, CHANNELS, 64, "bfloat16").encode(keys)


SCORES = (
    "reals",
    "with many ties",
    "all zero",
    "all negative",
    "each better than all before",
    "best in one stream",
)
STARTS = {
    "from the beginning": ([0, 7], [TOKENS, 7 + TOKENS]),
    "as many entries as places": ([80, 85], [80 + TOKENS, 90]),
    "all entries": ([LAST - TOKENS, LAST - TOKENS + 1], [LAST, LAST]),
    "no tokens": ([400, 0], [400, 1]),
}


@pytest.mark.parametrize("kind", ["bfloat16", "fp4"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("scores", SCORES)
def test_selection(scores, start, kind):
    if kind == "fp4" and scores not in ("reals", "all zero"):
        pytest.skip("keys are rotated: the scores are not what the name says")
    start, end = (np.array(x, np.int32) for x in start)
    queries, weights, stored = draw(scores, kind)
    got = np.asarray(select(queries, weights, stored, start, end, kind=kind, pallas=True))
    expected = np.asarray(select(queries, weights, stored, start, end, kind=kind, pallas=False))
    for b in range(2):
        real = min(end[b] - start[b], TOKENS)
        np.testing.assert_array_equal(got[b, :real], expected[b, :real])


FEW = pallas_tpu.Blocks(entries=1024, growth=4, dense=2)


@functools.partial(jax.jit, static_argnames=("kind", "count"))
def select_few(queries, weights, stored, start, end, kind, count):
    table = EntryTable(stored, jnp.int32(0), EntryFormat(kind, CHANNELS, 64, "bfloat16"))
    arguments, sizes = (queries, weights, table, start, end), dict(ratio=RATIO, count=count)
    got = pallas_tpu.select(*arguments, **sizes, blocks=FEW, interpret=True)
    return jnp.sort(got, -1), jnp.sort(reference.select(*arguments, **sizes), -1)


@pytest.mark.parametrize("start", [[2599 * 4, 300], [2047, 8190], [0, 2048 * 4 - 1]])
@pytest.mark.parametrize("scores", ["reals", "with many ties", "each better than all before"])
@pytest.mark.parametrize("kind, count", [("bfloat16", 70), ("fp4", 1100)])
def test_few_queries(kind, count, scores, start):
    """Decode: a token and a draft, 2,600 entries in three blocks of 1,024."""
    random = np.random.RandomState(0)
    queries = random.standard_normal((2, 2, HEADS, CHANNELS))
    weights = random.standard_normal((2, 2, HEADS))
    keys = random.standard_normal((1, 2, 2600, CHANNELS))
    if scores == "with many ties":
        queries = np.round(queries) * (random.uniform(size=queries.shape) < 0.03)
        weights, keys = np.round(weights), np.round(keys)
    if scores == "each better than all before":
        queries[:], weights[:], keys[:] = 0, 1, 0
        queries[..., 0] = 1
        keys[..., 0] = np.arange(2600) // 16
    queries, weights, keys = (jnp.asarray(x, jnp.bfloat16) for x in (queries, weights, keys))
    stored = EntryFormat(kind, CHANNELS, 64, "bfloat16").encode(keys)
    start = np.array(start, np.int32)
    got, expected = select_few(queries, weights, stored, start, start + 2, kind=kind, count=count)
    np.testing.assert_array_equal(got, expected)


def test_not_a_number_selects_no_garbage():
    queries, weights, stored = draw("reals", "bfloat16")
    stored = {"values": stored["values"].at[:, :, 7].set(jnp.nan)}
    start = np.array([LAST - TOKENS, 60], np.int32)
    chosen = np.asarray(
        select(queries, weights, stored, start, start + TOKENS, kind="bfloat16", pallas=True)
    )
    visible = (start[:, None] + np.arange(TOKENS) + 1) // RATIO
    assert ((chosen >= -1) & (chosen < visible[..., None])).all()
    for row, seen in zip(chosen.reshape(-1, COUNT), visible.reshape(-1), strict=True):
        ids = row[row >= 0]
        assert len(np.unique(ids)) == len(ids) == min(seen, COUNT)


def test_layers_are_not_mixed():
    queries, weights, stored = draw("reals", "bfloat16")
    start = np.array([300, 200], np.int32)
    expected = select(queries, weights, stored, start, start + TOKENS, kind="bfloat16", pallas=True)
    stored = {"values": stored["values"].at[0].set(jnp.nan).at[2].set(jnp.nan)}
    got = select(queries, weights, stored, start, start + TOKENS, kind="bfloat16", pallas=True)
    np.testing.assert_array_equal(got, expected)


# Flash and Pro: 64 index heads of 128 channels; a million tokens of context.
SHAPES = {
    "Flash, prefill": dict(batch=1, tokens=2048, count=512, kind="fp4"),
    "Flash, prefill, bfloat16 keys": dict(batch=1, tokens=2048, count=512, kind="bfloat16"),
    "Flash, decode": dict(batch=64, tokens=1, count=512, kind="fp4"),
    "Pro, prefill": dict(batch=1, tokens=2048, count=1024, kind="fp4"),
    "Pro, decode with drafts": dict(batch=16, tokens=2, count=1024, kind="fp4"),
}


@pytest.mark.tpu_compiler
@pytest.mark.skipif(
    ahead_of_time.why_unavailable() is not None, reason=str(ahead_of_time.why_unavailable())
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("chip", ahead_of_time.TOPOLOGIES)
def test_compiles(chip, shape):
    batch, tokens, entries = shape["batch"], shape["tokens"], 1_048_576 // RATIO
    stored_as = EntryFormat(shape["kind"], CHANNELS, 64, "bfloat16")

    def run(queries, weights, stored, layer, start, end):
        table = EntryTable(stored, layer, stored_as)
        return indexer.select(
            queries, weights, table, start, end, ratio=RATIO, count=shape["count"]
        )

    spec = jax.ShapeDtypeStruct
    compiled = ahead_of_time.compile_for(
        ahead_of_time.TOPOLOGIES[chip],
        run,
        spec((batch, tokens, 64, CHANNELS), jnp.bfloat16),
        spec((batch, tokens, 64), jnp.bfloat16),
        jax.eval_shape(lambda: stored_as.zeros(2, batch, entries)),
        spec((), jnp.int32),
        spec((batch,), jnp.int32),
        spec((batch,), jnp.int32),
    )
    assert "indexer_select" in compiled.as_text()
