"""Dense attention against one naive softmax: window layers and HCA layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.kernels import dense_attention
from v4jax.kernels.dense_attention import reference

from .. import naive

WINDOW, RATIO, HEADS, CHANNELS = 8, 4, 2, 8
TOKENS, CAPACITY = 11, 7  # three tiles of 4 queries and three blocks of 3 entries, none full


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERY_TILE", 4)
        patch.setattr(reference, "ENTRY_BLOCK", 3)
        yield


@functools.partial(jax.jit, static_argnames="ratio")
def attend(queries, recent, sink, start, end, entries, ratio, begin=None):
    stored = naive.table(entries) if ratio else None
    options = {"window": WINDOW, "entries": stored, "ratio": ratio, "begin": begin}
    return dense_attention.attend(queries, recent, sink, start, end, **options)


def make(start, tokens=TOKENS, ratio=RATIO, seed=0, begin=None):
    """Returns (arguments of `attend` up to the sink, entries, keys, mask) as float64 arrays."""
    random, batch = np.random.RandomState(seed), len(start)
    queries = random.standard_normal((batch, tokens, HEADS, CHANNELS))
    recent = random.standard_normal((batch, WINDOW + tokens, CHANNELS))
    entries = random.standard_normal((batch, CAPACITY, CHANNELS))
    sink = random.standard_normal(HEADS)
    seen = naive.window_seen(start, tokens, WINDOW, begin)
    recent[~seen.any(1)] = naive.GARBAGE
    keys = recent
    if ratio:
        visible = naive.entries_seen(start, tokens, CAPACITY, ratio, begin)
        entries[~visible.any(1)] = naive.GARBAGE
        keys, seen = np.concatenate([recent, entries], 1), np.concatenate([seen, visible], 2)
    return (queries, recent, sink), entries, keys, seen


# name: (start, end) of two sequences; the last token of 7 entries is at position 27.
CASES = {
    "from the beginning": ([0, 0], [11, 11]),
    "window full, first entry": ([3, 4], [14, 15]),
    "entry completed by the first token": ([3, 7], [14, 18]),
    "far apart": ([0, 17], [11, 28]),
    "padding": ([2, 9], [3, 16]),
    "one sequence has no token": ([5, 9], [5, 20]),
}


@pytest.mark.parametrize("ratio", [0, RATIO], ids=["window", "entries"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values(case, ratio):
    start, end = map(np.array, case)
    arguments, entries, keys, seen = make(start, ratio=ratio)
    expected = naive.attend(np, arguments[0], keys, seen, arguments[2])
    attended = attend(*arguments, start, end, entries, ratio)
    real = np.arange(TOKENS) < (end - start)[:, None]
    for value, wanted in zip(attended, expected, strict=True):
        np.testing.assert_allclose(np.asarray(value)[real], wanted[real], 0, naive.FLOAT32)


@pytest.mark.parametrize("position", [0, 3, 7, 8, 26, 27])
def test_one_token(position):
    start = np.array([position, 2])
    arguments, entries, keys, seen = make(start, tokens=1)
    attended, _ = attend(*arguments, start, start + 1, entries, RATIO)
    expected, _ = naive.attend(np, arguments[0], keys, seen, arguments[2])
    np.testing.assert_allclose(attended, expected, 0, naive.FLOAT32)


def weight_sums(sink):
    """Returns the sum of the attention weights: a channel of ones that no query looks at."""
    start = np.array([0, 17])
    (queries, recent, _), entries, _, _ = make(start)
    queries[..., 0], recent[..., 0], entries[..., 0] = 0, 1, 1
    sink = np.full(HEADS, sink)
    return np.asarray(attend(queries, recent, sink, start, start + 11, entries, RATIO)[0][..., 0])


def test_sink_takes_weight():
    assert (weight_sums(1.0) < 1).all()
    np.testing.assert_allclose(weight_sums(-np.inf), 1, 0, naive.FLOAT32)
    assert (weight_sums(1e4) == 0).all(), "a sink far above all scores must not overflow"


# Documents of two rows; padding is −1. The last tile of queries needs no entry before the fourth.
BEGIN = np.array([[0, 0, 0, 0, 8, 8, -1, -1, 12, 12, 12], [4] * 3 + [20] * 8])
# name: start of two sequences, begin.
DOCUMENTS = {"one document": ([0, 14], None), "several documents": ([4, 17], BEGIN)}


def test_several_documents():
    start = np.array(DOCUMENTS["several documents"][0])
    arguments, entries, keys, seen = make(start, begin=BEGIN)
    expected = naive.attend(np, arguments[0], keys, seen, arguments[2])
    attended = attend(*arguments, start, start + TOKENS, entries, RATIO, BEGIN)
    for value, wanted in zip(attended, expected, strict=True):
        np.testing.assert_allclose(value, wanted, 0, naive.FLOAT32)


@pytest.mark.parametrize("start, begin", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_gradients(start, begin):
    start = np.array(start)
    end = start + TOKENS
    (queries, recent, sink), entries, _, seen = make(start, begin=begin)
    inputs = tuple(jnp.asarray(x, jnp.float32) for x in (queries, recent, sink, entries))
    weight = jnp.asarray(np.random.RandomState(1).standard_normal(queries.shape), jnp.float32)

    def ours(queries, recent, sink, entries):
        attended, log_mass = attend(queries, recent, sink, start, end, entries, RATIO, begin)
        return (attended * weight).sum() + log_mass.sum()

    def theirs(queries, recent, sink, entries):
        keys = jnp.concatenate([recent, entries], 1)
        attended, log_mass = naive.attend(jnp, queries, keys, seen, sink)
        return (attended * weight).sum() + log_mass.sum()

    found = jax.grad(ours, argnums=(0, 1, 2, 3))(*inputs)
    for value, wanted in zip(found, jax.grad(theirs, argnums=(0, 1, 2, 3))(*inputs), strict=True):
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(value, wanted, 0, 10 * naive.FLOAT32)
