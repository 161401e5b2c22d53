"""Selection on TPU: values in interpret mode; what the TPU compiler accepts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from v4jax import log
from v4jax.kernels import dispatch, indexer
from v4jax.kernels.indexer import pallas_tpu, reference, sieve_tpu
from v4jax.kernels.table import NEVER, EntryTable
from v4jax.planning import ahead_of_time
from v4jax.quant import EntryFormat

RATIO, HEADS, CHANNELS = 4, 2, 128
TOKENS, COUNT = 130, 21  # two tiles of 128 queries, the last nearly empty
CAPACITY = 150  # three blocks of 64 entries, the last not full
LAST = CAPACITY * RATIO
BLOCKS = pallas_tpu.Blocks(entries=64, chunk=4, growth=16, dense=2)


@functools.partial(jax.jit, static_argnames=("kind", "pallas", "blocks", "count"))
def select(
    queries, weights, stored, start, end, kind, pallas, blocks=BLOCKS, count=COUNT, begin=None
):
    table = EntryTable(stored, jnp.int32(1), EntryFormat(kind, CHANNELS, 64, "bfloat16"))
    if pallas:
        chosen = pallas_tpu.select(
            *(queries, weights, table, start, end),
            ratio=RATIO,
            count=count,
            begin=begin,
            blocks=blocks,
            interpret=True,
        )
    else:
        sizes = dict(ratio=RATIO, count=count, begin=begin)
        chosen = reference.select(queries, weights, table, start, end, **sizes)
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
    if scores == "each worse than all before":
        queries[:], weights[:], keys[:] = 0, -1, 0
        queries[..., 0] = 1
        keys[..., 0] = np.arange(CAPACITY) // 8 * 8
    if scores in ("best in one stream", "each better, in one stream"):
        queries[:], weights[:], keys[:] = 0, 1, 0
        queries[..., 0] = 1
        keys[:, :, 3::8, 0] = 2
        if scores == "each better, in one stream":
            keys[:, :, 3::8, 0] = np.arange(3, CAPACITY, 8)
    queries, weights, keys = (jnp.asarray(x, jnp.bfloat16) for x in (queries, weights, keys))
    return queries, weights, EntryFormat(kind, CHANNELS, 64, "bfloat16").encode(keys)


SCORES = (
    "reals",
    "with many ties",
    "all zero",
    "all negative",
    "each better than all before",
    "best in one stream",
    "each worse than all before",
    "each better, in one stream",
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


@pytest.mark.parametrize("scores", ["reals", "with many ties"])
def test_several_documents(scores):
    """The tile of each row's first 128 tokens has one document, that of the others another.

    In the first row both begin with their tile; in the second the first began 128 tokens before,
    and blocks of entries lie before it.
    """
    queries, weights, stored = draw(scores, "bfloat16")
    start = np.array([0, LAST - TOKENS - 86], np.int32)
    assert start[1] % 128 == 0
    begin = np.repeat(start[:, None], TOKENS, axis=1)
    begin[:, 128:] += 128
    begin[1, :128] -= 128
    begin[0, 100:128] = NEVER
    arguments = (queries, weights, stored, start, start + TOKENS, "bfloat16")
    got, expected = (np.asarray(select(*arguments, pallas=p, begin=begin)) for p in (True, False))
    real = begin != NEVER
    np.testing.assert_array_equal(got[real], expected[real])


def test_blocks_do_not_matter():
    queries, weights, stored = draw("with many ties", "bfloat16")
    start = np.array([LAST - TOKENS, 190], np.int32)
    arguments = (queries, weights, stored, start, start + TOKENS, "bfloat16")
    blocks = pallas_tpu.Blocks(entries=128, heads=1, chunk=16, growth=48, dense=0)
    got = select(*arguments, pallas=True, blocks=blocks)
    np.testing.assert_array_equal(got, select(*arguments, pallas=True))


def test_keys_have_the_order_of_scores():
    scores = np.array([-np.inf, -3e38, -2, -1, -1e-30, -0.0, 0, 1e-30, 1, 2, 3e38, np.inf], "f4")
    keys = np.asarray(sieve_tpu.order_keys(jnp.asarray(scores))).astype(np.int64)
    np.testing.assert_array_equal(
        np.sign(np.diff(keys)), np.sign(np.diff(np.unique(scores, return_inverse=True)[1]))
    )
    np.testing.assert_array_equal(sieve_tpu.order_values(jnp.asarray(keys, jnp.int32)), scores)
    strange = jnp.array([0x7FC00000, 0xFFC00000, 0xFFFFFFFF], jnp.uint32)
    keys = sieve_tpu.order_keys(jax.lax.bitcast_convert_type(strange, jnp.float32))
    assert (np.asarray(keys) > sieve_tpu.NOTHING).all()


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


# Two heads' sums of 128 products of bfloat16, of size 30 at most, in another order.
SCORE_TOLERANCE = 1e-4


@functools.partial(jax.jit, static_argnames=("kind", "blocks"))
def select_with_scores(queries, weights, stored, start, end, kind, blocks):
    """Returns ids, their scores, the same scores by the reference, and ids without scores."""
    table = EntryTable(stored, jnp.int32(1), EntryFormat(kind, CHANNELS, 64, "bfloat16"))
    arguments, sizes = (queries, weights, table, start, end), dict(ratio=RATIO, count=COUNT)
    options = sizes | dict(blocks=blocks, interpret=True)
    ids, scores = pallas_tpu.select_with_scores(*arguments, **options)
    expected = jnp.where(
        ids < 0, -jnp.inf, reference.score_taken(queries, weights, table, jnp.maximum(ids, 0))
    )
    return ids, scores, expected, pallas_tpu.select(*arguments, **options)


@pytest.mark.parametrize("tokens", [2, TOKENS])
@pytest.mark.parametrize("kind", ["bfloat16", "fp4"])
@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
def test_scores_of_the_selected(start, kind, tokens):
    """Scores stand beside their ids, also where all visible entries are selected, or none."""
    start, end = (np.array(x, np.int32) for x in start)
    end = np.minimum(end, start + tokens)
    queries, weights, stored = draw("reals", kind)
    queries, weights, blocks = queries[:, :tokens], weights[:, :tokens], BLOCKS
    if tokens == 2:
        blocks = FEW
        stored = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, 1900), (0, 0)]), stored)
    arguments = queries, weights, stored, start, end, kind, blocks
    ids, scores, expected, plain = map(np.asarray, select_with_scores(*arguments))
    for b in range(2):
        real = min(end[b] - start[b], tokens)
        np.testing.assert_array_equal(np.sort(ids[b, :real]), np.sort(plain[b, :real]))
        np.testing.assert_allclose(scores[b, :real], expected[b, :real], atol=SCORE_TOLERANCE)


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


@pytest.mark.parametrize("device", ["TPU v5", "TPU v6 lite", "TPU7x"])
def test_every_code_of_keys(device, monkeypatch):
    """16 codes, scales 2^−110 … 2^110, decoded by integers or in bfloat16: twice their values."""
    monkeypatch.setattr(dispatch, "device_kind", lambda: device)
    codes = np.arange(CHANNELS * 256).reshape(CHANNELS, 256) * 7919 // 13 % 16
    scales = (17 + np.arange(4 * 256).reshape(4, 256) * 31 % 221).astype(np.uint8)
    packed = (codes[0::2] | codes[1::2] << 4).astype(np.uint8)

    def body(packed, scales, out):
        out[...] = pallas_tpu.decode_fp4({"packed": packed, "scales": scales})

    shape = jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)
    found = pl.pallas_call(body, out_shape=shape, interpret=True)(packed, scales)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([magnitudes, -magnitudes])[codes]
    values *= 2.0 ** (scales.astype(np.int32) - 127).repeat(32, axis=0)
    expected = 2 * values[pallas_tpu.decoded_order(CHANNELS)]
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


def test_layers_are_not_mixed():
    queries, weights, stored = draw("reals", "bfloat16")
    start = np.array([300, 200], np.int32)
    expected = select(queries, weights, stored, start, start + TOKENS, kind="bfloat16", pallas=True)
    stored = {"values": stored["values"].at[0].set(jnp.nan).at[2].set(jnp.nan)}
    got = select(queries, weights, stored, start, start + TOKENS, kind="bfloat16", pallas=True)
    np.testing.assert_array_equal(got, expected)


REFUSED = {
    "float32 keys": (dict(kind="float32"), "must be fp4 or bfloat16, got float32"),
    "fp8 keys": (dict(kind="fp8"), "must be fp4 or bfloat16, got fp8"),
    "float32 queries": (dict(dtype=jnp.float32), "must be bfloat16, got float32"),
    "narrow heads": (dict(channels=64), "multiple of 128 lanes, got 64"),
    "little room": (dict(entries=300), "there is room for 300"),
    "many selected": (dict(count=1500), "1500 selected entries need"),
    "many heads": (dict(heads=512), "bytes of VMEM"),
    "many entries": (dict(entries=2**23), "do not fit in 20 bits"),
    "many programs": (dict(batch=20_000, tokens=8), "160000 programs"),
}


@pytest.mark.parametrize("change, reason", REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_the_reason(change, reason, monkeypatch):
    said = []
    monkeypatch.setattr(log, "once", said.append)
    sizes = dict(kind="bfloat16", dtype=jnp.bfloat16, channels=CHANNELS, entries=4096, count=512)
    sizes = sizes | dict(heads=64, batch=1, tokens=256) | change
    stored_as = EntryFormat(sizes["kind"], sizes["channels"], 64, "bfloat16")
    stored = jax.eval_shape(lambda: stored_as.zeros(1, sizes["batch"], sizes["entries"]))
    shape = tuple(sizes[name] for name in ("batch", "tokens", "heads", "channels"))

    def choose(queries, stored):
        table = EntryTable(stored, jnp.int32(0), stored_as)
        assert indexer._choose(queries, table, sizes["count"]) == "reference"

    with dispatch.compiling_for("tpu"):
        jax.eval_shape(choose, jax.ShapeDtypeStruct(shape, sizes["dtype"]), stored)
    assert said[0].startswith("kernels: indexer=reference on tpu; not pallas_tpu: ")
    assert reason in said[0]


# Flash and Pro: 64 index heads of 128 channels; a million tokens of context.
SHAPES = {
    "Flash, prefill": dict(batch=1, tokens=2048, count=512, kind="fp4"),
    "Flash, packed rows": dict(batch=1, tokens=2048, count=512, kind="bfloat16", packed=True),
    "Flash, decode": dict(batch=64, tokens=1, count=512, kind="fp4"),
    "Pro, prefill": dict(batch=1, tokens=2048, count=1024, kind="fp4"),
    "Pro, decode with drafts": dict(batch=16, tokens=2, count=1024, kind="fp4"),
    "Pro, decode on devices": dict(batch=16, tokens=1, count=1024, kind="fp4", devices=32),
    "Pro, a short chunk on devices": dict(batch=1, tokens=512, count=1024, kind="fp4", devices=32),
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("chip", ahead_of_time.TOPOLOGIES)
def test_compiles(chip, shape):
    batch, tokens, devices = shape["batch"], shape["tokens"], shape.get("devices", 1)
    entries = 1_048_576 // RATIO // devices
    stored_as = EntryFormat(shape["kind"], CHANNELS, 64, "bfloat16")

    def run(queries, weights, stored, layer, start, end, begin):
        table = EntryTable(stored, layer, stored_as)
        options = dict(ratio=RATIO, count=shape["count"])
        if devices > 1:
            return indexer.select_with_scores(queries, weights, table, start, end, **options)
        return indexer.select(queries, weights, table, start, end, **options, begin=begin)

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
        spec((batch, tokens), jnp.int32) if shape.get("packed") else None,
    )
    assert "indexer_select" in compiled.as_text()
