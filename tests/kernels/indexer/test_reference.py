"""Selection against a full sort of float64 scores; small integers make ties exact."""

import functools

import jax
import numpy as np
import pytest

from v4jax.kernels import indexer
from v4jax.kernels.indexer import reference

from .. import naive

RATIO, HEADS, CHANNELS = 4, 4, 8
TOKENS, COUNT = 10, 5  # three tiles of 4 queries, the last not full
CAPACITY = 37  # five blocks of 8 entries in groups of 4; neither divides


@pytest.fixture(scope="module", autouse=True, params=[4, 1], ids=["groups", "single entries"])
def small_tiles(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "QUERY_TILE", 4)
        patch.setattr(reference, "ENTRY_BLOCK", 8)
        patch.setattr(reference, "SPAN", 4)
        patch.setattr(reference, "choose_group", lambda *_: request.param)
        yield


@functools.partial(jax.jit, static_argnames="count")
def select(queries, weights, keys, start, end, count=COUNT, begin=None):
    options = {"ratio": RATIO, "count": count, "begin": begin}
    chosen = indexer.select(queries, weights, naive.table(keys), start, end, **options)
    return jax.numpy.sort(chosen, axis=-1)


def scores_of(queries, weights, keys):
    """Returns the scores [b, t, w] by the formula, in float64."""
    products = np.einsum("btix,bwx->btiw", queries, keys)
    return np.einsum("bti,btiw->btw", weights, np.maximum(products, 0))


def best(scores, start, count, begin=None):
    """Returns the `count` best visible ids of each query in order, ties to the smaller id."""
    batch, tokens, capacity = scores.shape
    visible = naive.entries_seen(start, tokens, capacity, RATIO, begin)
    chosen = np.full((batch, tokens, min(count, capacity)), -1)
    for place in np.ndindex(batch, tokens):
        ids = np.flatnonzero(visible[place])
        ids = ids[np.argsort(-scores[place][ids], kind="stable")][:count]
        chosen[place][: len(ids)] = ids
    return np.sort(chosen, -1)


def draw(kind, tokens=TOKENS, capacity=CAPACITY):
    """Returns queries, head weights and keys; all but "reals" are integers that float32 adds
    exactly.
    """
    random = np.random.RandomState(list(KINDS).index(kind))
    shapes = (2, tokens, HEADS, CHANNELS), (2, tokens, HEADS), (2, capacity, CHANNELS)
    if kind == "reals":
        return tuple(random.standard_normal(shape) for shape in shapes)
    queries, weights, keys = (random.randint(-2, 3, shape).astype(float) for shape in shapes)
    if kind == "all scores zero":  # −0 too: some weights are negative
        queries, keys = np.abs(queries), -np.abs(keys)
    if kind == "all keys equal":
        keys[:] = keys[:, :1]
    if kind == "all scores negative":
        queries, weights, keys = np.abs(queries), -1 - np.abs(weights), 1 + np.abs(keys)
    if kind == "best ones last":
        keys[:] = 0
        keys[:, :, 0] = np.arange(capacity)
        queries[:], weights[:] = 1, 1
    if kind == "best ones in one group":
        keys[:] = 0
        keys[:, 20:24, 0] = 3
        keys[:, 16:20, 0] = 1
        queries[:], weights[:] = 1, 1
    return queries, weights, keys


KINDS = (
    "reals",
    "integers with many ties",
    "all scores zero",
    "all keys equal",
    "all scores negative",
    "best ones last",
    "best ones in one group",
)
# Start of two sequences; the last token of 37 entries is at position 147.
STARTS = {
    "from the beginning": [0, 0],
    "as many entries as places": [13, 17],
    "far apart": [2, 138],
    "all entries": [138, 131],
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_selection(kind, start):
    start = np.array(start)
    queries, weights, keys = draw(kind)
    chosen = select(queries, weights, keys, start, start + TOKENS)
    expected = best(scores_of(queries, weights, keys), start, COUNT)
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("kind", ["reals", "integers with many ties"])
def test_several_documents(kind):
    """The first tile needs no block before the second; the last one's documents fit wholly."""
    start = np.array([138, 131])
    begin = np.array([[40] * 2 + [140] * 7 + [-1], [64] + [132] * 4 + [136] * 5])
    queries, weights, keys = draw(kind)
    expected = best(scores_of(queries, weights, keys), start, COUNT, begin)
    keys[:, :8] = np.nan
    chosen = select(queries, weights, keys, start, start + TOKENS, begin=begin)
    np.testing.assert_array_equal(chosen, expected)


def test_padding_costs_nothing_and_changes_nothing():
    start, end = np.array([2, 120]), np.array([5, 121])
    queries, weights, keys = draw("reals")
    expected = best(scores_of(queries, weights, keys), start, COUNT)
    # What lies beyond the last real token's entries is not looked at.
    keys[0, 1:] = keys[1, 30:] = np.nan
    chosen = np.asarray(select(queries, weights, keys, start, end))
    np.testing.assert_array_equal(chosen[0, :3], expected[0, :3])
    np.testing.assert_array_equal(chosen[1, :1], expected[1, :1])


@pytest.mark.parametrize("position", [0, 3, 22, 23, 24, 146, 147])
def test_one_token(position):
    start = np.array([position, 100])
    queries, weights, keys = draw("integers with many ties", tokens=1)
    chosen = select(queries, weights, keys, start, start + 1)
    expected = best(scores_of(queries, weights, keys), start, COUNT)
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("capacity", [3, 5, 6])
def test_capacity_near_the_count(capacity):
    start = np.array([capacity * RATIO - TOKENS, 0])
    queries, weights, keys = draw("integers with many ties", capacity=capacity)
    chosen = select(queries, weights, keys, start, start + TOKENS)
    expected = best(scores_of(queries, weights, keys), start, COUNT)
    np.testing.assert_array_equal(chosen, expected)


def test_not_a_number_selects_no_garbage():
    start = np.array([138, 60])
    queries, weights, keys = draw("reals")
    keys[:, 7] = np.nan
    chosen = np.asarray(select(queries, weights, keys, start, start + TOKENS))
    visible = (start[:, None] + np.arange(TOKENS) + 1) // RATIO
    assert ((chosen >= -1) & (chosen < visible[..., None])).all()
