"""Selection and attention over entries that may be split over devices.

While one device reads all entries, these are the kernels. In decoding on a mesh each device has a
contiguous share of every sequence's entries: it scores and selects among its own, the candidates
are merged exactly, and attention over each device's share is merged by log-sum-exp with attention
over the window, which every device has.

The kernels number a share's entries from 0. Visibility w < (p + 1) // ratio then holds for
positions moved back by the tokens before the share.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from v4jax.kernels import dense_attention, indexer, sparse_attention
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.table import EntryTable
from v4jax.parallel.context_parallel import merge_candidates, merge_partials
from v4jax.parallel.shard import first_here, shares
from v4jax.quant.formats import round_to


def select(
    queries: Float[Array, "b t i x"],
    head_weights: Float[Array, "b t i"],
    keys: EntryTable,
    start: Int[Array, "b"],
    end: Int[Array, "b"],
    *,
    ratio: int,
    count: int,
    begin: Int[Array, "b t"] | None = None,
) -> Int[Array, "b t k"]:
    """See `v4jax.kernels.indexer.select`; ids count all entries of the sequence.

    Only rows that no cache holds have several documents, here and below.
    """
    options = {"ratio": ratio, "count": count}
    if shares("read_entries") == 1:
        return indexer.select(queries, head_weights, keys, start, end, **options, begin=begin)
    assert begin is None
    first = first_here("read_entries", keys.capacity)
    before = first * ratio
    own = indexer.select(queries, head_weights, keys, start - before, end - before, **options)
    scores = indexer.score_selected(queries, head_weights, keys, own)
    return merge_candidates(jnp.where(own < 0, -1, own + first), scores, count)


def attend_selected(
    queries: Float[Array, "b t h c"],
    recent: Float[Array, "b s c"],
    sink: Float[Array, "h"],
    start: Int[Array, "b"],
    end: Int[Array, "b"],
    *,
    window: int,
    entries: EntryTable,
    selected: Int[Array, "b t k"],
    begin: Int[Array, "b t"] | None = None,
    stretch: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """See `v4jax.kernels.sparse_attention.attend_with_mass`; windows begin at `stretch`."""
    if shares("read_entries") == 1 and stretch is None:
        options = {"window": window, "entries": entries, "selected": selected, "begin": begin}
        return sparse_attention.attend_with_mass(queries, recent, sink, start, **options)
    own = selected - first_here("read_entries", entries.capacity)
    own = jnp.where((selected >= 0) & (own >= 0) & (own < entries.capacity), own, -1)
    partial = sparse_attention.attend_with_mass(
        queries,
        recent[:, window:],
        jnp.full_like(sink, MASKED),
        start,
        window=0,
        entries=entries,
        selected=own,
    )
    return _join_window(queries, recent, sink, start, end, window, partial, stretch)


def attend_all(
    queries: Float[Array, "b t h c"],
    recent: Float[Array, "b s c"],
    sink: Float[Array, "h"],
    start: Int[Array, "b"],
    end: Int[Array, "b"],
    *,
    window: int,
    entries: EntryTable | None,
    ratio: int,
    begin: Int[Array, "b t"] | None = None,
    stretch: Int[Array, "b t"] | None = None,
    repeats: Float[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """See `v4jax.kernels.dense_attention.attend`; windows begin at `stretch`.

    Args:
      repeats: how often each entry counts for a query, as if the sequence had it so many times;
        goes with `stretch`.
    """
    assert repeats is None or stretch is not None
    if stretch is not None and entries is None:
        begin = stretch
    if entries is None or (shares("read_entries") == 1 and stretch is None):
        options = {"window": window, "entries": entries, "ratio": ratio, "begin": begin}
        return dense_attention.attend(queries, recent, sink, start, end, **options)
    before = first_here("read_entries", entries.capacity) * ratio
    partial = dense_attention.attend(
        queries,
        recent[:, window:],
        jnp.full_like(sink, MASKED),
        start - before,
        end - before,
        window=0,
        entries=entries,
        ratio=ratio,
        begin=begin,
    )
    if repeats is not None:
        attended, mass = partial
        partial = attended, mass + jnp.log(repeats)[..., None]
    return _join_window(queries, recent, sink, start, end, window, partial, stretch)


def _join_window(queries, recent, sink, start, end, window, partial, stretch):
    """Joins attention over window and sink with that over all devices' entries; both results."""
    entries_bthc, entry_mass = merge_partials(*partial)
    window_bthc, window_mass = dense_attention.attend(
        queries, recent, sink, start, end, window=window, begin=stretch
    )
    mass = jnp.logaddexp(entry_mass, window_mass)
    joined = entries_bthc * jnp.exp(entry_mass - mass)[..., None]
    joined += window_bthc.astype(jnp.float32) * jnp.exp(window_mass - mass)[..., None]
    return round_to(joined, queries.dtype), mass
