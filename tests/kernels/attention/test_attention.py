"""Attention: every implementation against `reference.py`, in values and gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import Target, attention
from v4jax.kernels.attention import (
    dense_backward_tpu,
    dense_tpu,
    entries_tpu,
    portable,
    reference,
    sparse_decode_tpu,
    sparse_prefill_tpu,
    sparse_tpu,
)
from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.table import EntryTable
from v4jax.quant import EntryFormat

from ..compare import BFLOAT16, CPU, FLOAT32, GARBAGE, GPU, TPU, check, encode

WINDOW, RATIO, COUNT = 16, 4, 128
# Weights are rounded relative to another maximum, then the result is.
ERROR = {"float32": FLOAT32, "bfloat16": 2 * BFLOAT16}


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Several tiles and blocks, the last ones not full."""
    sizes = {
        portable: {"QUERY_TILE": 16, "ENTRY_BLOCK": 16, "LARGEST_BLOCK": 32, "GPU_BLOCK": 160}
        | {"GPU_TOGETHER": 6, "GPU_SPARSE_TILE": 8, "GATHERED_ELEMENTS": 1 << 18},
        dense_tpu: {"TILE_ROWS": 256, "GROUP_ROWS": 128},
        dense_backward_tpu: {"TILE_ROWS": 128, "GROUP_ROWS": 128},
        entries_tpu: {"BLOCK": 32, "ALIGNMENT": 32},
        sparse_tpu: {"REWRITTEN_ROWS": 1},
        sparse_decode_tpu: {"DEPTH": 4},
        sparse_prefill_tpu: {"TILE_GROUPS": 2, "BLOCK": 128, "UNROLLED_ROWS": 2},
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, constants in sizes.items():
            for name, value in constants.items():
                patch.setattr(module, name, value)
        yield


class Way(NamedTuple):
    """An implementation, and how its arguments are stored."""

    target: Target
    dtype: str
    kind: str


WAYS = {
    "cpu": Way(CPU, "float32", "float32"),
    "gpu": Way(GPU, "float32", "float32"),
    "tpu float32": Way(TPU, "float32", "float32"),
    "tpu": Way(TPU, "bfloat16", "bfloat16"),
    "tpu fp8": Way(TPU, "bfloat16", "fp8"),
}


@functools.partial(jax.jit, static_argnames=("way", "ratio", "is_reference"))
def attend(arrays, places, cotangents, *, way, ratio, is_reference=False):
    """Returns results and, given cotangents, the gradients of `arrays`.

    Args:
      arrays: queries, recent, sink, stored entries of three layers, of which the second is read.
      places: start, end, begin, selected; dense attention has no selected.
      ratio: tokens per entry; 0 for no entries.
    """
    module = reference if is_reference else attention
    start, end, begin, selected = places

    def run(queries, recent, sink, stored):
        stored_as = EntryFormat(way.kind, queries.shape[-1], 64, way.dtype)
        options = {"window": recent.shape[1] - queries.shape[1], "begin": begin}
        options |= {"entries": EntryTable(stored, jnp.int32(1), stored_as) if ratio else None}
        options |= {"target": way.target}
        if selected is not None:
            options |= {"selected": selected}
            return module.attend_sparse(queries, recent, sink, start, **options)
        return module.attend_dense(queries, recent, sink, start, end, ratio=ratio, **options)

    if cotangents is None:
        return run(*arrays), None
    results, pull = jax.vjp(run, *arrays)
    return results, pull(cotangents)


def draw(way, tokens, capacity, heads, channels, start, end):
    """Returns queries, recent, sink and stored entries; what nobody may see is garbage."""
    random = np.random.RandomState(0)

    def normal(*shape):
        return random.standard_normal(shape)

    queries, recent = normal(2, tokens, heads, channels), normal(2, WINDOW + tokens, channels)
    entries = normal(3, 2, capacity, channels)
    for b in range(2):
        recent[b, : max(WINDOW - start[b], 0)] = GARBAGE
        entries[:, b, max(end[b], 1) // RATIO :] = GARBAGE
    queries, recent, entries = (jnp.asarray(x, way.dtype) for x in (queries, recent, entries))
    stored = encode(EntryFormat(way.kind, channels, 64, way.dtype), entries)
    return queries, recent, jnp.asarray(normal(heads), jnp.float32), stored


def compare(name, arrays, places, *, ratio=RATIO, real=None, gradients=True):
    """Holds an implementation against the reference; rows that are not `real` mean nothing."""
    way, shape = WAYS[name], arrays[0].shape
    real = np.ones(shape[:2], bool) if real is None else real
    cotangents = None
    if gradients:
        random = np.random.RandomState(1)
        cotangents = (
            jnp.asarray(random.standard_normal(shape) * real[..., None, None], way.dtype),
            jnp.asarray(random.standard_normal(shape[:3]) * real[..., None], jnp.float32),
        )
    options = {"way": way, "ratio": ratio}
    found, gradient = attend(arrays, places, cotangents, **options)
    expected, wanted = attend(arrays, places, cotangents, **options, is_reference=True)
    found, expected = ([np.asarray(x)[real] for x in results] for results in (found, expected))
    # Of a query that sees nothing the log-sum-exp is as good as −∞, and the result means nothing.
    seen = expected[1] > MASKED / 2
    assert (found[1][~seen] <= MASKED / 2).all()
    found, expected = ([x[seen] for x in results] for results in (found, expected))
    check(found, expected, ERROR[way.dtype])
    if gradients:
        check(gradient, wanted, ERROR[way.dtype])
    return found


# Start and end of two sequences: the last token of 40 entries is at position 159.
PREFILLS = {
    "from the beginning": ([0, 0], [50, 50]),
    "all residues, all blocks": ([61, 110], [111, 160]),
    "padding, and a sequence without tokens": ([30, 128], [35, 128]),
}
FEW = {
    "the first token": ([0, 157], [1, 160]),
    "the first entry": ([3, 1], [4, 4]),
    "an entry is completed": ([30, 125], [32, 128]),
}


def place(start, end, tokens):
    start, end = (np.array(x, np.int32) for x in (start, end))
    return (start, end, None, None), np.arange(tokens) < (end - start)[:, None]


@pytest.mark.parametrize("name", ["cpu", "tpu float32", "tpu fp8"])
@pytest.mark.parametrize("case", PREFILLS)
def test_dense_prefill(case, name):
    places, real = place(*PREFILLS[case], 50)
    arrays = draw(WAYS[name], 50, 40, 8, 128, *places[:2])
    compare(name, arrays, places, real=real, gradients=False)


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu float32", "tpu fp8"])
@pytest.mark.parametrize("case", FEW)
def test_dense_with_few_tokens(case, name):
    places, real = place(*FEW[case], 3)
    arrays = draw(WAYS[name], 3, 40, 8, 128, *places[:2])
    compare(name, arrays, places, real=real, gradients=False)


@pytest.mark.parametrize("name", ["cpu", "tpu float32"])
def test_dense_window_layer(name):
    places, _ = place([0, 9], [50, 59], 50)
    arrays = draw(WAYS[name], 50, 40, 8, 128, *places[:2])
    compare(name, arrays, places, ratio=0)


@pytest.mark.parametrize("name", ["cpu", "tpu float32"])
@pytest.mark.parametrize("tokens", [3, 50])
def test_dense_share(tokens, name):
    """A device's share of the entries: without window and sink; early queries see none of it."""
    places, _ = place([0, 110], [tokens, 110 + tokens], tokens)
    queries, recent, sink, stored = draw(WAYS[name], tokens, 40, 8, 128, *places[:2])
    arrays = queries, recent[:, WINDOW:], jnp.full_like(sink, MASKED), stored
    compare(name, arrays, places, gradients=False)
    if tokens == 50:  # merging gives no cotangent to what sees nothing
        sees_some = (places[0][:, None] + np.arange(tokens) + 1) // RATIO > 0
        compare(name, arrays, places, real=sees_some)


@pytest.mark.parametrize("name", ["cpu", "tpu float32"])
@pytest.mark.parametrize("sink", [-np.inf, 1e4])
def test_dense_extreme_sinks(sink, name):
    places, _ = place([0, 110], [50, 160], 50)
    queries, recent, _, stored = draw(WAYS[name], 50, 40, 8, 128, *places[:2])
    arrays = queries, recent, jnp.full(8, sink, jnp.float32), stored
    attended, _ = compare(name, arrays, places, gradients=False)
    assert (sink < 0) or not attended.any(), "a sink far above all scores takes all weight"


# Tokens of documents in two rows of 272: begin, end. A unit of 128 may be padding, wholly or at
# its end; the second row goes on with a document of 128 tokens before it.
DOCUMENTS = ((0, 0, 100), (0, 128, 256), (0, 256, 272), (1, -128, 90), (1, 256, 270))


def pack(start, tokens):
    begin = np.full((2, tokens), -1, np.int32)
    for row, first, last in DOCUMENTS:
        begin[row, max(first, 0) : min(last, tokens)] = start[row] + first
    return begin


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu float32", "tpu"])
def test_dense_documents(name):
    """Values and gradients of packed rows: documents begin inside blocks and end inside tiles."""
    (start, end, *_), _ = place([0, 128], [272, 400], 272)
    arrays = draw(WAYS[name], 272, 100, 8, 128, start, end)
    begin = pack(start, 272)
    compare(name, arrays, (start, end, begin, None), real=begin >= 0)


# Sparse attention. With 19 tokens the table's rows are rewritten and gathered together, with 3 each
# query gathers its own; tables have 160 and 384 entries.
SPARSE = {19: 160, 3: 384}


def draw_sparse(name, tokens, start, packed=False):
    """Returns arrays and places; every query selects of what it may see, −1 anywhere between."""
    random, way, capacity = np.random.RandomState(2), WAYS[name], SPARSE.get(tokens, 160)
    start = np.array(start, np.int32)
    arrays = draw(way, tokens, capacity, 16, 256, start, start + tokens)
    begin = pack(start, tokens) if packed else None
    selected = np.full((2, tokens, COUNT), -1, np.int32)
    for b, t in np.ndindex(2, tokens):
        first = max(begin[b, t], 0) // RATIO if packed else 0
        last = max(min((start[b] + t + 1) // RATIO, capacity), first)
        ids = random.permutation(np.arange(first, last))[:COUNT]
        selected[b, t][random.permutation(COUNT)[: len(ids)]] = ids
    return arrays, [start, None, begin, selected]


# Every residue of the first token, fewer and more entries than places.
STARTS = [[0, 1], [2, 3], [40, 600], [300, 1200]]


@pytest.mark.parametrize("name", ["cpu", "tpu", "tpu fp8"])
@pytest.mark.parametrize("tokens", SPARSE)
def test_sparse(tokens, name):
    for start in STARTS:
        compare(name, *draw_sparse(name, tokens, start), gradients=False)


@pytest.mark.parametrize("name", ["cpu", "gpu", "tpu"])
def test_sparse_documents(name):
    """Values and gradients of packed rows."""
    arrays, places = draw_sparse(name, 144, [0, 128], packed=True)
    compare(name, arrays, places, real=places[2] >= 0)


@pytest.mark.parametrize("name", ["cpu", "tpu", "tpu fp8"])
@pytest.mark.parametrize("tokens", SPARSE)
def test_sparse_absent_ids(tokens, name):
    """Whole queries select nothing; what nobody selects may hold anything finite."""
    (*arrays, stored), places = draw_sparse(name, tokens, [600, 900])
    selected = places[3]
    selected[np.random.RandomState(3).random(selected.shape) < 0.5] = -1
    selected[0, 1] = selected[1, 0] = selected[:, :, [0, -1]] = -1
    wanted = np.zeros((2, SPARSE[tokens]), bool)
    for b in range(2):
        wanted[b, selected[b][selected[b] >= 0]] = True
    assert not wanted.all(), "some entries are selected by nobody"
    garbage = jnp.asarray(GARBAGE if name != "tpu fp8" else 400, stored["values"].dtype)
    values = jnp.where(wanted[None, :, :, None], stored["values"], garbage)
    compare(name, (*arrays, stored | {"values": values}), places, gradients=False)


@pytest.mark.parametrize("name", ["cpu", "tpu", "tpu fp8"])
@pytest.mark.parametrize("tokens", SPARSE)
def test_sparse_share(tokens, name):
    """Without window and sink; entries stand in front, and behind the last nothing is fetched.

    For an absent id entry 0 would be fetched: here it is no number, and is selected by nobody.
    """
    (queries, recent, sink, stored), places = draw_sparse(name, tokens, [600, 1200])
    selected, random = places[3], np.random.RandomState(4)
    selected[:] = -1
    counts = (0, 1, 3, 4, 5, COUNT - 1, COUNT)
    for i, query in enumerate(np.ndindex(2, tokens)):
        chosen = counts[i % len(counts)]
        selected[query][:chosen] = random.permutation(149)[:chosen] + 1
    arrays = queries, recent[:, WINDOW:], jnp.full_like(sink, MASKED)
    if name == "tpu fp8" and tokens == 3:
        broken = stored | {"values": stored["values"].at[:, :, 0].set(jnp.nan)}
        way = {"way": WAYS[name], "ratio": RATIO}
        (found, _), _ = attend((*arrays, broken), places, None, **way)
        assert np.isfinite(found.astype(np.float32)).all()
    compare(name, (*arrays, stored), places, gradients=False)


@pytest.mark.parametrize("sink", [-np.inf, 1e4])
@pytest.mark.parametrize("tokens", SPARSE)
def test_sparse_extreme_sinks(tokens, sink):
    (queries, recent, _, stored), places = draw_sparse("tpu", tokens, [0, 300])
    arrays = queries, recent, jnp.full(16, sink, jnp.float32), stored
    compare("tpu", arrays, places, gradients=False)


def test_consecutive_entries_are_one_copy(monkeypatch):
    """Where every visible entry is selected, no row is fetched alone.

    Fetching rows alone is broken for this test: it brings the first row, whichever was asked for.
    """

    def start_first_row(copies, row):
        source = copies.words_ref.at[copies.sequence, 0]
        target = copies.target_ref.at[row]
        sparse_prefill_tpu.pltpu.make_async_copy(source, target, copies.semaphore).start()

    monkeypatch.setattr(sparse_prefill_tpu._Copies, "_start_row", start_first_row)
    options = {"way": WAYS["tpu"], "ratio": RATIO}
    broken = jax.jit(lambda *x: attend.__wrapped__(*x, None, **options)[0][0])

    def error(start):
        arrays, places = draw_sparse("tpu", 19, start)
        (expected, _), _ = attend(arrays, places, None, **options, is_reference=True)
        difference = broken(arrays, places).astype(jnp.float32) - expected.astype(jnp.float32)
        return np.abs(difference).max()

    # 128 places for at most 128 entries: all of them; later, 128 of 148 or more.
    assert error([7, 493]) <= ERROR["bfloat16"]
    assert error([600, 600]) > 10 * ERROR["bfloat16"], "ids with gaps are fetched row by row"


def test_refused():
    """What the kernels leave to plain jnp, and why."""
    random = {"queries": (1, 4, 16, 256), "recent": (1, 20, 256)}
    base = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in random.items()}
    stored_as = EntryFormat("bfloat16", 256, 64, "bfloat16")

    def reason(kernel, window=16, entries=160, count=COUNT, begin=None, **changed):
        arrays, found = base | changed, []
        selected = jnp.zeros((1, arrays["queries"].shape[1], count), jnp.int32)

        def ask(stored):
            places = None, None, None, begin, selected, stored, jnp.int32(0)
            call = Call(window, RATIO, stored_as, TPU)
            found.append(kernel.supported(call, Inputs(*arrays.values(), *places)))

        values = jax.ShapeDtypeStruct((1, 1, entries, 256), jnp.bfloat16)
        jax.eval_shape(ask, {"values": values})
        return found[0]

    wide = {name: x.astype(jnp.float32) for name, x in base.items()}
    assert reason(dense_tpu) is None and reason(sparse_tpu) is None
    queries = base["queries"]
    for kernel, words, changed in (
        (dense_tpu, "channels must divide by 128", {"queries": queries[..., :64]}),
        (dense_tpu, "heads must be a power of two", {"queries": queries[:, :, :6]}),
        (dense_tpu, "window must divide by 16", {"window": 9}),
        (dense_tpu, "must both be bfloat16 or float32", {"queries": wide["queries"]}),
        (dense_tpu, "do not fit into VMEM", {"entries": 2**17}),
        (dense_tpu, "entries decode to bfloat16, queries are float32", wide),
        (sparse_tpu, "must be bfloat16", wide),
        (sparse_tpu, "channels must divide by 256", {"queries": queries[..., :128]}),
        (sparse_tpu, "selected entries must divide by 128", {"count": 21}),
        (sparse_tpu, "heads must be at least 16", {"queries": queries[:, :, :8]}),
        (sparse_tpu, "share 31 bits", {"entries": 2**24}),
        (
            sparse_tpu,
            "documents need more than 16 queries",
            {"entries": 2**16, "begin": jnp.zeros((1, 4), jnp.int32)},
        ),
    ):
        assert words in reason(kernel, **changed), words
