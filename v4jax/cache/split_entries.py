"""Selection and attention over entries that may be split over devices.

While one device reads all entries, these are the kernels. In decoding on a mesh each device has a
contiguous share of every sequence's entries: it scores and selects among its own, keeps of these
what is among the best of all devices' exactly, and attention over each device's share is merged by
log-sum-exp with attention over the window, which every device has.

The kernels number a share's entries from 0. Visibility w < (p + 1) // ratio then holds for
positions moved back by the tokens before the share.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from v4jax.kernels import dense_attention, indexer, sparse_attention
from v4jax.kernels.indexer.largest import LANES, mark_largest
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.table import EntryTable
from v4jax.parallel.context_parallel import merge_partials
from v4jax.parallel.shard import first_here, gather, shares
from v4jax.quant.formats import round_to

NONE = 2**31 - 1  # id of no entry, behind all others


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

    Where devices share the entries, each gets those of the selected that it has, in ascending
    order, and −1 behind them.

    Only rows that no cache holds have several documents, here and below.
    """
    options = {"ratio": ratio, "count": count}
    if shares("read_entries") == 1:
        return indexer.select(queries, head_weights, keys, start, end, **options, begin=begin)
    assert begin is None
    first = first_here("read_entries", keys.capacity)
    before = first * ratio
    arguments = queries, head_weights, keys, start - before, end - before
    own, scores = indexer.select_with_scores(*arguments, **options)
    own = jnp.where(own < 0, NONE, own + first)
    own, scores = jax.lax.sort((own, scores), num_keys=1)
    # Those that attention fetches come first.
    own = jnp.sort(jnp.where(keep_best(scores, count), own, NONE), axis=-1)
    return jnp.where(own == NONE, -1, own)


def keep_best(scores: Float[Array, "b t k"], count: int) -> Bool[Array, "b t k"]:
    """Returns which of this device's candidates are among the `count` best of all devices'.

    Ties go to the smaller id: shares hold ascending ranges of ids, and each is sorted by id. Only
    scores travel, for a device attends to no entries but its own; and they are counted, not sorted,
    for the TPU compiler spends 18 s of a core on the code that sorts 8,192 of them.

    Args:
      scores: −∞ for none, behind the candidates of the device.
    """
    batch, tokens, own = scores.shape
    everywhere = gather(scores, "read_entries", 2).reshape(batch * tokens, -1)
    missing = -everywhere.shape[1] % LANES
    everywhere = jnp.pad(everywhere, [(0, 0), (0, missing)], constant_values=-jnp.inf)
    best = mark_largest(everywhere, min(count, everywhere.shape[1]))
    best = best.reshape(batch, tokens, -1)
    return jax.lax.dynamic_slice_in_dim(best, first_here("read_entries", own), own, axis=2)


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
