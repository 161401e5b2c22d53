"""Naive attention for the tests: one dense softmax over all keys, with a mask made query by query.

`xp` is NumPy with float64 arrays for values, or jax.numpy for gradients.
"""

import jax.numpy as jnp
import numpy as np

from v4jax.kernels.table import EntryTable
from v4jax.quant import EntryFormat

# Float32 against float64 over sums of tens of products of size 1.
FLOAT32 = 1e-5
# Entries that no query may see, and rows before position 0, hold this: a mask that leaks shows.
GARBAGE = 1e4


def table(entries_bwc):
    """Returns an entry table of float32 entries as the second of three layers; the others NaN."""
    entries_bwc = jnp.asarray(entries_bwc, jnp.float32)
    stored = jnp.full((3, *entries_bwc.shape), jnp.nan).at[1].set(entries_bwc)
    stored_as = EntryFormat("float32", entries_bwc.shape[-1], 2, "float32")
    return EntryTable({"values": stored}, jnp.int32(1), stored_as)


def begin_of(begin, b, t):
    """Returns where the document of a query begins: [b, t], negative for padding; None: at 0."""
    if begin is None:
        return 0
    return begin[b, t] if begin[b, t] >= 0 else np.inf


def window_seen(start, tokens, window, begin=None):
    """Returns which of the `window` + `tokens` recent rows each query sees: [b, t, s]."""
    seen = np.zeros((len(start), tokens, window + tokens), bool)
    for b, first in enumerate(start):
        for t in range(tokens):
            for row in range(window + tokens):
                position, query = first - window + row, first + t
                lowest = max(query - window + 1, begin_of(begin, b, t))
                seen[b, t, row] = lowest <= position <= query
    return seen


def entries_seen(start, tokens, capacity, ratio, begin=None):
    """Returns which entries each query may see: its document's, whose last token has passed."""
    seen = np.zeros((len(start), tokens, capacity), bool)
    for b, first in enumerate(start):
        for t in range(tokens):
            for entry in range(capacity):
                first_token, last_token = entry * ratio, entry * ratio + ratio - 1
                seen[b, t, entry] = begin_of(begin, b, t) <= first_token and last_token <= first + t
    return seen


def attend(xp, queries, keys, seen, sink):
    """Returns (attended [b, t, h, c], log-sum-exp [b, t, h]) of keys [b, n, c], mask [b, t, n]."""
    scores = xp.einsum("bthc,bnc->bthn", queries, keys) / np.sqrt(queries.shape[-1])
    scores = xp.where(seen[:, :, None], scores, -np.inf)
    highest = xp.maximum(scores.max(-1), sink)
    weights = xp.exp(scores - highest[..., None])
    total = weights.sum(-1) + xp.exp(sink - highest)
    attended = xp.einsum("bthn,bnc->bthc", weights / total[..., None], keys)
    return attended, xp.log(total) + highest


def numeric_gradients(function, inputs, weight, step=1e-6):
    """Returns the central differences of Σ weight · function(*inputs), in float64."""
    inputs = [np.asarray(x, np.float64) for x in inputs]
    gradients = []
    for x in inputs:
        gradient = np.zeros_like(x)
        for place in np.ndindex(x.shape):
            kept = x[place]
            sides = []
            for x[place] in (kept + step, kept - step):
                sides.append((function(*inputs) * weight).sum())
            x[place] = kept
            gradient[place] = (sides[0] - sides[1]) / (2 * step)
        gradients.append(gradient)
    return gradients
