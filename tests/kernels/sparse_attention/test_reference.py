"""Sparse attention against one naive softmax over the window and the selected entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import sparse_attention
from v4jax.kernels.sparse_attention import reference

from .. import naive

WINDOW, RATIO, HEADS, CHANNELS = 8, 4, 2, 8
TOKENS, CAPACITY, COUNT = 11, 9, 4  # three tiles of 4 queries, the last not full


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERY_TILE", 4)
        yield


@jax.jit
def attend(queries, recent, sink, start, entries, selected, begin=None):
    return sparse_attention.attend(
        queries,
        recent,
        sink,
        start,
        window=WINDOW,
        entries=naive.table(entries),
        selected=selected,
        begin=begin,
    )


def make(start, tokens=TOKENS, seed=0, begin=None):
    """Returns ((queries, recent, sink), entries, selected ids, keys, mask), values float64."""
    random, batch = np.random.RandomState(seed), len(start)
    queries = random.standard_normal((batch, tokens, HEADS, CHANNELS))
    recent = random.standard_normal((batch, WINDOW + tokens, CHANNELS))
    entries = random.standard_normal((batch, CAPACITY, CHANNELS))
    visible = naive.entries_seen(start, tokens, CAPACITY, RATIO, begin)
    selected = np.full((batch, tokens, COUNT), -1)
    chosen = np.zeros_like(visible)
    for place in np.ndindex(batch, tokens):
        ids = random.permutation(np.flatnonzero(visible[place]))[:COUNT]
        # Absent ids stand anywhere among the others.
        selected[place][random.permutation(COUNT)[: len(ids)]] = ids
        chosen[place][ids] = True
    entries[~chosen.any(1)] = naive.GARBAGE
    seen = naive.window_seen(start, tokens, WINDOW, begin)
    recent[~seen.any(1)] = naive.GARBAGE
    sink = random.standard_normal(HEADS)
    keys, seen = np.concatenate([recent, entries], 1), np.concatenate([seen, chosen], 2)
    return (queries, recent, sink), entries, selected.astype(np.int32), keys, seen


# name: start of two sequences; the last token of 9 entries is at position 35.
CASES = {
    "from the beginning": [0, 0],
    "first entry completed by the first token": [3, 3],
    "fewer entries than places": [9, 1],
    "far apart": [0, 25],
}


@pytest.mark.parametrize("start", CASES.values(), ids=CASES.keys())
def test_values(start):
    start = np.array(start)
    arguments, entries, selected, keys, seen = make(start)
    expected, _ = naive.attend(np, arguments[0], keys, seen, arguments[2])
    attended = attend(*arguments, start, entries, selected)
    np.testing.assert_allclose(attended, expected, 0, naive.FLOAT32)


def test_several_documents():
    start = np.array([4, 17])
    begin = np.array([[0, 0, 0, 0, 8, 8, -1, -1, 12, 12, 12], [4] * 3 + [20] * 8])
    arguments, entries, selected, keys, seen = make(start, begin=begin)
    expected, _ = naive.attend(np, arguments[0], keys, seen, arguments[2])
    attended = attend(*arguments, start, entries, selected, begin)
    np.testing.assert_allclose(attended, expected, 0, naive.FLOAT32)


@pytest.mark.parametrize("position", [0, 2, 3, 30])
def test_one_token(position):
    start = np.array([position, 17])
    arguments, entries, selected, keys, seen = make(start, tokens=1)
    expected, _ = naive.attend(np, arguments[0], keys, seen, arguments[2])
    attended = attend(*arguments, start, entries, selected)
    np.testing.assert_allclose(attended, expected, 0, naive.FLOAT32)


def test_absent_ids_read_nothing():
    """Where nothing is selected, the entries that −1 could reach (first and last) do not matter."""
    start = np.array([0, 20])
    arguments, entries, selected, _, _ = make(start)
    none = np.full_like(selected, -1)
    found = attend(*arguments, start, entries, none)
    entries[:, [0, -1]] = naive.GARBAGE
    np.testing.assert_array_equal(found, attend(*arguments, start, entries, none))


def test_order_does_not_matter():
    start = np.array([0, 25])
    arguments, entries, selected, _, _ = make(start)
    found = attend(*arguments, start, entries, selected)
    turned = attend(*arguments, start, entries, selected[..., ::-1])
    np.testing.assert_allclose(found, turned, 0, naive.FLOAT32)


def weight_sums(sink):
    """Returns the sum of the attention weights: a channel of ones that no query looks at."""
    start = np.array([0, 25])
    (queries, recent, _), entries, selected, _, _ = make(start)
    queries[..., 0], recent[..., 0], entries[..., 0] = 0, 1, 1
    sink = np.full(HEADS, sink)
    return np.asarray(attend(queries, recent, sink, start, entries, selected)[..., 0])


def test_sink_takes_weight():
    assert (weight_sums(1.0) < 1).all()
    np.testing.assert_allclose(weight_sums(-np.inf), 1, 0, naive.FLOAT32)
    assert (weight_sums(1e4) == 0).all(), "a sink far above all scores must not overflow"


def test_gradients():
    """Of everything that carries one, the first queries without any entry included."""
    start = np.array([0, 20])
    (queries, recent, sink), entries, selected, _, seen = make(start)
    inputs = tuple(jnp.asarray(x, jnp.float32) for x in (queries, recent, sink, entries))
    weight = jnp.asarray(np.random.RandomState(1).standard_normal(queries.shape), jnp.float32)

    def ours(queries, recent, sink, entries):
        return (attend(queries, recent, sink, start, entries, selected) * weight).sum()

    def theirs(queries, recent, sink, entries):
        keys = jnp.concatenate([recent, entries], 1)
        return (naive.attend(jnp, queries, keys, seen, sink)[0] * weight).sum()

    found = jax.grad(ours, argnums=(0, 1, 2, 3))(*inputs)
    for value, wanted in zip(found, jax.grad(theirs, argnums=(0, 1, 2, 3))(*inputs), strict=True):
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(value, wanted, 0, 10 * naive.FLOAT32)
