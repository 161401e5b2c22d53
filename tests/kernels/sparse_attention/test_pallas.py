"""Sparse attention on TPU: interpreted against the reference, and what the compiler accepts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import sparse_attention
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.sparse_attention import decode_tpu, pallas_tpu, prefill_tpu, reference
from v4jax.kernels.table import NEVER, EntryTable
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


def attend_with_mass(queries, recent, sink, start, stored, selected, begin=None, *, kind, pallas):
    """The window is what `recent` holds before the tokens."""
    table = EntryTable(stored, jnp.int32(1), EntryFormat(kind, CHANNELS, 64, "bfloat16"))
    window = recent.shape[1] - queries.shape[1]
    module = pallas_tpu if pallas else reference
    if pallas:
        assert pallas_tpu.supported(queries, recent, window, table, selected, begin) is None
    options = {"window": window, "entries": table, "selected": selected, "begin": begin}
    return module.attend_with_mass(queries, recent, sink, start, **options)


compiled = jax.jit(attend_with_mass, static_argnames=("kind", "pallas"))


def attend(*arguments, **options):
    return compiled(*arguments, **options)[0]


def check(*arguments, kind="bfloat16"):
    """Compares results and masses with the reference."""
    got, expected = (compiled(*arguments, kind=kind, pallas=pallas) for pallas in (True, False))
    for value, wanted in zip(got, expected, strict=True):
        value, wanted = (np.asarray(x, np.float32) for x in (value, wanted))
        np.testing.assert_allclose(value, wanted, 0, BFLOAT16)


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
    assert pallas_tpu.gathers_one_by_one(tokens, COUNT, capacity, WINDOW) == name.startswith(
        "one by one"
    )
    check(*draw(kind, tokens, capacity, start), kind=kind)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tokens, capacity", [(19, 160), (3, 384)])
@pytest.mark.parametrize("residue", range(4))
def test_every_residue(residue, tokens, capacity):
    """The first token completes an entry, or lies one, two or three tokens after one that did."""
    check(*draw("bfloat16", tokens, capacity, [residue, 40 + residue]))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("tokens, capacity", [(19, 160), (3, 384)])
def test_absent_ids_anywhere(tokens, capacity):
    """Between present ones and for whole queries; what nobody selected may hold anything finite."""
    queries, recent, sink, start, stored, selected = draw("bfloat16", tokens, capacity, [600, 900])
    selected = np.where(np.random.RandomState(2).random(selected.shape) < 0.5, -1, selected)
    selected[0, 1] = selected[1, 0] = -1
    selected[:, :, [0, -1]] = -1
    wanted = np.zeros((2, capacity), bool)
    for b in range(2):
        wanted[b, selected[b][selected[b] >= 0]] = True
    assert not wanted.all(), "some entries must be selected by nobody"
    values = jnp.where(wanted[None, :, :, None], stored["values"], 1e4)
    check(queries, recent, sink, start, {"values": values}, selected)


@pytest.mark.usefixtures("small_tiles")
def test_places_behind_the_last_are_not_fetched():
    """Of a share of the entries; for an absent id entry 0 would be fetched: here no number."""
    queries, recent, sink, start, stored, selected = draw("fp8", 3, 384, [600, 1200])
    selected[:] = -1
    random = np.random.RandomState(3)
    for query, count in zip(np.ndindex(2, 3), (1, 3, 4, 5, COUNT - 1, COUNT), strict=True):
        selected[query][:count] = random.permutation(149)[:count] + 1
    broken = stored | {"values": stored["values"].at[:, :, 0].set(jnp.nan)}
    arguments = queries, recent[:, WINDOW:], sink, start
    got = attend(*arguments, broken, selected, kind="fp8", pallas=True)
    expected = attend(*arguments, stored, selected, kind="fp8", pallas=False)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, expected)), 0, BFLOAT16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "tokens, capacity, kind", [(19, 160, "bfloat16"), (3, 384, "bfloat16"), (3, 384, "fp8")]
)
def test_entries_only(tokens, capacity, kind):
    """Without window and sink, as shares of split entries are attended to; the mass as well.

    A share of which a query selected nothing has a mass that vanishes beside any other.
    """
    queries, recent, sink, start, stored, selected = draw(kind, tokens, capacity, [40, 900])
    selected[0, 1] = -1
    none, own = jnp.full_like(sink, MASKED), recent[:, WINDOW:]
    arguments = (queries, own, none, start, stored, selected)
    got, expected = (compiled(*arguments, kind=kind, pallas=pallas) for pallas in (True, False))
    some = (selected >= 0).any(-1)
    assert some.any() and not some.all()
    for value, wanted in zip(got, expected, strict=True):
        value, wanted = (np.asarray(x, np.float32) for x in (value, wanted))
        assert np.isfinite(value).all()
        np.testing.assert_allclose(value[some], wanted[some], 0, BFLOAT16)
    for _, log_mass in (got, expected):
        assert (np.asarray(log_mass)[~some] <= MASKED / 2).all()


@pytest.mark.usefixtures("small_tiles")
def test_consecutive_entries_are_one_copy(monkeypatch):
    """Where every visible entry is selected, no row is fetched alone.

    Fetching rows alone is broken for this test: it brings the first row, whichever was asked for.
    """

    def start_first_row(copies, row):
        source = copies.words_ref.at[copies.sequence, 0]
        target = copies.target_ref.at[row]
        prefill_tpu.pltpu.make_async_copy(source, target, copies.semaphore).start()

    monkeypatch.setattr(prefill_tpu._Copies, "_start_row", start_first_row)
    broken = jax.jit(lambda *x: attend_with_mass(*x, kind="bfloat16", pallas=True)[0])

    def error(start):
        arguments = draw("bfloat16", 19, 160, start)
        expected = attend(*arguments, kind="bfloat16", pallas=False)
        return np.abs(np.asarray(broken(*arguments) - expected, np.float32)).max()

    # 128 places for at most 128 entries: all of them; later, 128 of 148 or more.
    assert error([7, 493]) <= BFLOAT16
    assert error([600, 600]) > 10 * BFLOAT16, "the same call fetches rows where ids have gaps"


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


@pytest.mark.usefixtures("small_tiles")
def test_window_ends_at_the_document():
    """Values and gradients of packed rows, in tiles of 16 tokens; padding gets no cotangent."""
    tokens = 144
    start = np.array([0, 128], np.int32)
    queries, recent, sink, start, stored, selected = draw("bfloat16", tokens, 160, start)
    begin = np.repeat(start[:, None], tokens, axis=1)
    begin[:, 128:] += 128
    begin[0, 100:128] = NEVER
    weight = np.random.RandomState(1).standard_normal(queries.shape)
    weight[0, 100:128] = 0

    def compute(queries, recent, stored, pallas):
        arguments = queries, recent, sink, start, stored, selected, begin
        attended = attend(*arguments, kind="bfloat16", pallas=pallas).astype(jnp.float32) * weight
        return attended.sum(), attended

    gradient = jax.grad(compute, argnums=(0, 1, 2), has_aux=True)
    got, expected = (gradient(queries, recent, stored, pallas) for pallas in (True, False))
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
    "Flash, decode of a sixteenth": dict(
        batch=16, tokens=1, heads=64, count=512, entries=16384, window=0
    ),
    "Pro, decode of a thirty-second": dict(
        batch=8, tokens=1, heads=128, count=1024, entries=8192, window=0
    ),
    "Pro, drafts in a short document": dict(batch=8, tokens=3, heads=64, count=1024, entries=8192),
    "Flash, training on packed rows": dict(
        batch=1, tokens=4096, heads=64, count=512, entries=1024, packed=True
    ),
    "Pro, training": dict(batch=1, tokens=4096, heads=128, count=1024, entries=1024),
    # One of sixteen shares of the tokens, and all entries: the backward pass is XLA's everywhere.
    "Flash, share of 131,072 in training": dict(
        batch=1, tokens=8192, heads=64, count=512, entries=32768, chips=["v6e"]
    ),
}


MODEST_BYTES = 64 * 2**20  # ids, unions and padded queries


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "chip, name",
    [
        (chip, name)
        for name in SHAPES
        for chip in SHAPES[name].get("chips", ahead_of_time.TOPOLOGIES)
    ],
)
def test_compiles(chip, name):
    shape = SHAPES[name]
    batch, tokens, heads, count = (shape[key] for key in ("batch", "tokens", "heads", "count"))
    window, channels, backward = shape.get("window", 128), 512, "training" in name
    entries = shape.get("entries", 1_048_576 // RATIO)
    stored_as = EntryFormat("bfloat16" if backward else "fp8", channels, 64, "bfloat16")

    def run(queries, recent, sink, stored, layer, start, selected, begin):
        table = EntryTable(stored, layer, stored_as)
        options = {"window": window, "entries": table, "selected": selected, "begin": begin}
        return sparse_attention.attend(queries, recent, sink, start, **options)

    def gradients(*arguments):
        results, pull = jax.vjp(lambda *x: run(*x, *arguments[4:]), *arguments[:4])
        return pull(results)

    spec = jax.ShapeDtypeStruct
    program = ahead_of_time.compile_for(
        ahead_of_time.TOPOLOGIES[chip],
        gradients if backward else run,
        spec((batch, tokens, heads, channels), jnp.bfloat16),
        spec((batch, window + tokens, channels), jnp.bfloat16),
        spec((heads,), jnp.float32),
        jax.eval_shape(lambda: stored_as.zeros(1, batch, entries)),
        spec((), jnp.int32),
        spec((batch,), jnp.int32),
        spec((batch, tokens, count), jnp.int32),
        spec((batch, tokens), jnp.int32) if shape.get("packed") else None,
    )
    assert "sparse_attention" in program.as_text()
    if not backward:
        # Entries in use as rows, for a prefill, and never a copy of the table or its stack.
        rows = batch * entries * 2 * channels if tokens > 1 else 0
        assert program.memory_analysis().temp_size_in_bytes <= rows + MODEST_BYTES
