"""Selection: every implementation against `reference.py`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from v4jax.kernels import indexer
from v4jax.kernels.indexer import keys as order
from v4jax.kernels.indexer import pallas_tpu, portable, reference, scores_gpu
from v4jax.kernels.table import EntryTable
from v4jax.kernels.tpu import chip_of
from v4jax.quant import EntryFormat

from ..compare import CPU, FLOAT32, GPU, TPU, V6, V7, check, encode

RATIO, HEADS, CHANNELS, COUNT = 4, 2, 128, 21
CAPACITY = 150  # several blocks, the last not full; few queries have room for more
LAST = CAPACITY * RATIO
MANY, FEW = 130, 2  # tokens: two tiles of 128 queries, the second nearly empty; a query each
ROOM = {MANY: CAPACITY, FEW: 2050}
WAYS = {"cpu": CPU, "gpu": GPU, "tpu": TPU}


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """The kernels' blocks differ by how keys are stored: two sets of sizes are tested."""
    sizes = {"QUERY_TILE": 32, "GPU_TILE": 128, "ENTRY_BLOCK": 32, "GPU_BLOCK": 64}
    sizes |= {"LARGEST_BLOCK": 512, "SPAN": 4, "SMALL": 64, "HEADS": 1, "GPU_HEADS": 1}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(portable, name, value)
        patch.setattr(portable, "choose_group", lambda capacity, _: 1 if capacity <= 64 else 4)
        few = pallas_tpu.Blocks(entries=1024, growth=4, dense=2)
        many = {
            "bfloat16": pallas_tpu.Blocks(entries=64, chunk=4, growth=16, dense=2),
            "fp4": pallas_tpu.Blocks(entries=128, heads=1, chunk=16, growth=48, dense=0),
        }

        def choose_blocks(tokens, keys):
            return (
                few
                if tokens <= pallas_tpu.FEW_TOKENS
                else many.get(keys.format.kind, pallas_tpu.MANY)
            )

        patch.setattr(pallas_tpu, "choose_blocks", choose_blocks)
        yield


@functools.partial(jax.jit, static_argnames=("kind", "scored", "target"))
def select(queries, weights, stored, start, end, begin=None, *, kind, scored, target=None):
    """Returns ids in order and their scores, or None; without a target by the reference."""
    table = EntryTable(stored, jnp.int32(1), EntryFormat(kind, CHANNELS, 64, "bfloat16"))
    module, arguments = reference if target is None else indexer, (queries, weights, table)
    options = {"ratio": RATIO, "count": COUNT, "target": target}
    if not scored:
        found = module.select(*arguments, start, end, **options, begin=begin)
        return jnp.sort(found, axis=-1), None
    ids, scores = module.select_with_scores(*arguments, start, end, **options)
    return jax.lax.sort((ids, scores), num_keys=1)


SCORES = (
    "reals",
    "with many ties",
    "all zero",
    "all negative",
    "each better than all before",
    "each worse than all before",
    "best in one stream",
    "each better, in one stream",
)


def draw(scores: str, kind: str, tokens: int, start, end):
    """Returns queries, head weights and stored keys; all but "reals" have exact float32 scores.

    Keys that no real query sees, and those of other layers, are no numbers where these exist.
    """
    capacity = ROOM[tokens]
    random = np.random.RandomState(SCORES.index(scores))
    queries = random.standard_normal((2, tokens, HEADS, CHANNELS))
    weights = random.standard_normal((2, tokens, HEADS))
    keys = random.standard_normal((2, capacity, CHANNELS))
    if scores != "reals":
        queries = np.round(queries) * (random.uniform(size=queries.shape) < 0.03)
        weights, keys = np.round(weights), np.round(keys)
    if scores == "all zero":  # −0 too: some weights are negative
        queries, keys = np.abs(queries), -np.abs(keys)
    if scores == "all negative":
        queries, weights, keys = np.abs(queries), -1 - np.abs(weights), 1 + np.abs(keys)
    if scores.startswith(("each", "best")):
        queries[:], weights[:], keys[:] = 0, -1 if "worse" in scores else 1, 0
        queries[..., 0] = 1
        # In bfloat16 exact; eight tie each.
        keys[..., 0] = np.arange(capacity) // 8 * 8
        if "stream" in scores:
            best = 2 if scores.startswith("best") else np.arange(3, capacity, 8)
            keys[..., 0] = 0
            keys[:, 3::8, 0] = best
    if kind == "bfloat16":
        keys[np.arange(capacity) >= end[:, None] // RATIO] = np.nan
    keys = np.stack([keys * np.nan, keys, keys * np.nan])
    queries, weights, keys = (jnp.asarray(x, jnp.bfloat16) for x in (queries, weights, keys))
    return queries, weights, encode(EntryFormat(kind, CHANNELS, 64, "bfloat16"), keys)


def compare(name, arrays, start, end, begin=None, *, kind, scored):
    real = np.arange(arrays[0].shape[1]) < (end - start)[:, None]
    if begin is not None:
        real &= begin >= 0
    arguments = *arrays, start, end, begin
    found, expected = (
        [
            np.asarray(x)[real]
            for x in select(*arguments, kind=kind, scored=scored, target=target)
            if x is not None
        ]
        for target in (WAYS[name], None)
    )
    np.testing.assert_array_equal(found[0], expected[0])
    if scored:  # sums of some hundred products of size 1
        found, expected = (np.maximum(x[1], -1e30) for x in (found, expected))
        np.testing.assert_allclose(found, expected, 1e-5, 1e-4)


# Start of two sequences, and how many tokens at the end are padding.
STARTS = {
    "from the beginning": ([0, 7], 0),
    "as many entries as places": ([80, 85], [0, 125]),
    "all entries": ([LAST - MANY, LAST - MANY - 3], 0),
    "no tokens": ([400, 0], [MANY, MANY - 1]),
}


def place(start, padding, tokens):
    start = np.array(start, np.int32)
    return start, (start + np.maximum(tokens - np.array(padding), 0)).astype(np.int32)


@pytest.mark.parametrize("kind", ["bfloat16", "fp4"])
@pytest.mark.parametrize("name", WAYS)
def test_starts(name, kind):
    for case in STARTS.values():
        places = place(*case, MANY)
        compare(name, draw("reals", kind, MANY, *places), *places, kind=kind, scored=True)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("scores", SCORES)
def test_orders_of_scores(scores, name):
    for case in ("as many entries as places", "all entries"):
        places = place(*STARTS[case], MANY)
        arrays = draw(scores, "bfloat16", MANY, *places)
        compare(name, arrays, *places, kind="bfloat16", scored=True)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("kind, scored", [("bfloat16", False), ("fp4", True)])
def test_few_tokens(kind, scored, name):
    """Fewer entries than places, as many, a few more, all; residues of the first token."""
    for start in ([0, 83], [86, 81], [300, 90], [4 * ROOM[FEW] - 2, 4099]):
        places = place(start, 0, FEW)
        for scores in ("reals", "with many ties", "each better than all before"):
            arrays = draw(scores if kind == "bfloat16" else "reals", kind, FEW, *places)
            compare(name, arrays, *places, kind=kind, scored=scored)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("scores", ["reals", "with many ties"])
def test_several_documents(scores, name):
    """The tile of each row's first 128 tokens has one document, that of the others another.

    In the first row both begin with their tile; in the second the first began 128 tokens before,
    and blocks of entries lie before it.
    """
    start = np.array([0, LAST - MANY - 86], np.int32)
    assert start[1] % 128 == 0
    begin = np.repeat(start[:, None], MANY, axis=1)
    begin[:, 128:] += 128
    begin[1, :128] -= 128
    begin[0, 100:128] = -1
    arrays = draw(scores, "bfloat16", MANY, start, start + MANY)
    places = start, start + MANY, begin
    compare(name, arrays, *places, kind="bfloat16", scored=False)


@pytest.mark.parametrize("name", WAYS)
def test_not_a_number_selects_no_garbage(name):
    start, end = place([LAST - MANY, 60], 0, MANY)
    queries, weights, stored = draw("reals", "bfloat16", MANY, start, end)
    values = np.array(stored["values"])
    values[:, :, 7] = np.nan
    arguments = queries, weights, {"values": values}, start, end
    ids, _ = select(*arguments, kind="bfloat16", scored=True, target=WAYS[name])
    visible = (start[:, None] + np.arange(MANY) + 1) // RATIO
    ids = np.asarray(ids)
    assert ((ids >= -1) & (ids < visible[..., None])).all()
    if name == "tpu":
        for row, seen in zip(ids.reshape(-1, COUNT), visible.reshape(-1), strict=True):
            row = row[row >= 0]
            assert len(np.unique(row)) == len(row) == min(seen, COUNT)


@pytest.mark.parametrize("capacity", [3, COUNT, COUNT + 1])
def test_capacity_near_the_count(capacity):
    """Of as many entries as places, or fewer, all visible ones are selected."""
    random = np.random.RandomState(0)
    shapes = (2, 10, HEADS, CHANNELS), (2, 10, HEADS), (2, 2, capacity, CHANNELS)
    queries, weights, values = (jnp.asarray(random.standard_normal(x), "bfloat16") for x in shapes)
    start = np.array([max(capacity * RATIO - 10, 0), 0], np.int32)
    arrays = queries, weights, {"values": values}
    compare("cpu", arrays, start, start + 10, kind="bfloat16", scored=False)


@pytest.mark.parametrize("target", [CPU, GPU])
def test_scores_have_gradients(target):
    """Those of the indexer's loss: of all entries, and of every query's own."""
    random = np.random.RandomState(0)
    shapes = (2, 17, HEADS, 32), (2, 17, HEADS), (2, 24, 32), (2, 17, 24)
    *arrays, cotangent = (jnp.asarray(random.standard_normal(x), jnp.float32) for x in shapes)
    ids = jnp.broadcast_to(jnp.arange(24), cotangent.shape)
    stored_as = EntryFormat("float32", 32, 16, "float32")

    def of_all(module, queries, weights, keys):
        return module.score(queries, weights, keys, target=target)

    def of_selected(queries, weights, keys):
        table = EntryTable({"values": keys[None]}, jnp.int32(0), stored_as)
        return indexer.score_selected(queries, weights, table, ids, target=target)

    def differentiate(run):
        results, pull = jax.vjp(run, *arrays)
        return results, pull(cotangent)

    expected = jax.jit(differentiate, static_argnums=0)(functools.partial(of_all, reference))
    for run in (functools.partial(of_all, indexer), of_selected):
        check(jax.jit(differentiate, static_argnums=0)(run), expected, FLOAT32)


def test_keys_have_the_order_of_scores():
    scores = np.array([-np.inf, -3e38, -2, -1, -1e-30, -0.0, 0, 1e-30, 1, 2, 3e38, np.inf], "f4")
    keys = np.asarray(order.order_keys(jnp.asarray(scores))).astype(np.int64)
    np.testing.assert_array_equal(
        np.sign(np.diff(keys)), np.sign(np.diff(np.unique(scores, return_inverse=True)[1]))
    )
    np.testing.assert_array_equal(order.order_values(jnp.asarray(keys, jnp.int32)), scores)
    strange = jnp.array([0x7FC00000, 0xFFC00000, 0xFFFFFFFF], jnp.uint32)
    keys = order.order_keys(jax.lax.bitcast_convert_type(strange, jnp.float32))
    assert (np.asarray(keys) > order.NOTHING).all()


@pytest.mark.parametrize("target", [TPU, V6, V7], ids=lambda target: target.device_kind)
def test_every_code_of_keys(target):
    """16 codes, scales 2^−110 … 2^110, decoded by integers or in bfloat16: twice their values."""
    codes = np.arange(CHANNELS * 256).reshape(CHANNELS, 256) * 7919 // 13 % 16
    scales = (17 + np.arange(4 * 256).reshape(4, 256) * 31 % 221).astype(np.uint8)
    packed = (codes[0::2] | codes[1::2] << 4).astype(np.uint8)

    def body(packed, scales, out):
        out[...] = pallas_tpu.decode_fp4(chip_of(target), {"packed": packed, "scales": scales})

    shape = jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)
    found = pl.pallas_call(body, out_shape=shape, interpret=True)(packed, scales)
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([magnitudes, -magnitudes])[codes]
    values *= 2.0 ** (scales.astype(np.int32) - 127).repeat(32, axis=0)
    expected = 2 * values[pallas_tpu.decoded_order(CHANNELS)]
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


REFUSED = {
    "float32 keys": (dict(kind="float32"), "must be fp4 or bfloat16, got float32"),
    "fp8 keys": (dict(kind="fp8"), "must be fp4 or bfloat16, got fp8"),
    "float32 queries": (dict(dtype=jnp.float32), "must be bfloat16, got float32"),
    "narrow heads": (dict(channels=64), "multiple of 128 lanes, got 64"),
    "little room": (dict(entries=1000, tokens=2), "there is room for 1000"),
    "many selected": (dict(count=1700), "1700 selected entries need"),
    "many heads": (dict(heads=1024), "bytes of VMEM"),
    "many entries": (dict(entries=2**23), "do not fit in 20 bits"),
    "many programs": (dict(batch=20_000, tokens=8), "160000 programs"),
}


@pytest.mark.parametrize("change, reason", REFUSED.values(), ids=REFUSED.keys())
def test_refused(change, reason):
    sizes = dict(kind="bfloat16", dtype=jnp.bfloat16, channels=CHANNELS, entries=4096, count=512)
    sizes = sizes | dict(heads=64, batch=1, tokens=256) | change
    stored_as = EntryFormat(sizes["kind"], sizes["channels"], 64, "bfloat16")
    stored = jax.eval_shape(lambda: stored_as.zeros(1, sizes["batch"], sizes["entries"]))
    shape = tuple(sizes[name] for name in ("batch", "tokens", "heads", "channels"))
    found = []

    def ask(queries, stored):
        table = EntryTable(stored, jnp.int32(0), stored_as)
        found.append(pallas_tpu.supported(queries, table, sizes["count"]))

    jax.eval_shape(ask, jax.ShapeDtypeStruct(shape, sizes["dtype"]), stored)
    assert reason in found[0]


def test_scores_refused_by_the_gpu():
    few, many = (jnp.zeros((1, tokens, 4, 32), jnp.bfloat16) for tokens in (15, 16))
    assert "at least 16, got 15" in scores_gpu.supported(few, many[:, 0])
    wide = jnp.zeros((1, 9, 32))
    assert "bfloat16, got bfloat16 and float32" in scores_gpu.supported(many, wide)
    assert "power of two from 16 on, got 24" in scores_gpu.supported(many[..., :24], many[:, 0])
