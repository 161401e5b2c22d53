"""Selection and attention over entries that may be split over devices.

While one device reads all entries, these are the kernels. In decoding on a mesh each device has a
contiguous shard of every sequence's entries. It scores and selects among its own, and keeps those
that are exactly among the best of all devices'. Attention over each device's shard is then merged
by log-sum-exp with attention over the window, which every device has.

The kernels number a shard's entries from 0. Visibility w < (p + 1) // ratio then holds for
positions counted from the shard's first token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from v4jax.kernels import attention, indexer
from v4jax.kernels.indexer.largest import mark_largest
from v4jax.kernels.softmax import MASKED
from v4jax.kernels.table import EntryTable
from v4jax.model.context import Context
from v4jax.parallel import Axes
from v4jax.parallel.context_parallel import merge_partials
from v4jax.quant.formats import round_to

NONE = 2**31 - 1  # id of no entry, behind all others


def select(
    context: Context,
    queries: Float[Array, "b t i x"],
    head_weights: Float[Array, "b t i"],
    keys: EntryTable,
    *,
    ratio: int,
    count: int,
) -> Int[Array, "b t k"]:
    """See `v4jax.kernels.indexer.select`; ids count all entries of the sequence.

    Where devices share the entries, each gets those of the selected that it has, in ascending
    order, and −1 behind them. Only rows that no cache holds have several documents.
    """
    axes, options = context.axes, {"ratio": ratio, "count": count, "target": context.target}
    if axes.size("read_entries") == 1:
        places = {"begin": context.document_begin}
        rows = context.start, context.end
        return indexer.select(queries, head_weights, keys, *rows, **options, **places)
    assert context.document_begin is None
    first = axes.offset("read_entries", keys.capacity)
    before = first * ratio
    rows = context.start - before, context.end - before
    own, scores = indexer.select_with_scores(queries, head_weights, keys, *rows, **options)
    own = jnp.where(own < 0, NONE, own + first)
    own, scores = jax.lax.sort((own, scores), num_keys=1)
    # Those that attention fetches come first.
    own = jnp.sort(jnp.where(keep_best(axes, scores, count), own, NONE), axis=-1)
    return jnp.where(own == NONE, -1, own)


def keep_best(axes: Axes, scores: Float[Array, "b t k"], count: int) -> Bool[Array, "b t k"]:
    """Returns which of this device's candidates are among the `count` best of all devices'.

    Ties go to the smaller id: shards hold ascending ranges of ids, and each is sorted by id. Only
    scores travel, because a device attends to its own entries alone. They are counted and not
    sorted, because the TPU compiler spends 18 s of a core on code that sorts 8,192 of them.

    Args:
      scores: −∞ for none, behind the candidates of the device.
    """
    batch, tokens, own = scores.shape
    everywhere = axes.all_gather(scores, "read_entries", 2).reshape(batch * tokens, -1)
    best = mark_largest(everywhere, min(count, everywhere.shape[1]))
    best = best.reshape(batch, tokens, -1)
    return jax.lax.dynamic_slice_in_dim(best, axes.offset("read_entries", own), own, axis=2)


def attend_selected(
    context: Context,
    queries: Float[Array, "b t h c"],
    recent: Float[Array, "b s c"],
    sink: Float[Array, "h"],
    *,
    window: int,
    entries: EntryTable,
    selected: Int[Array, "b t k"],
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """See `v4jax.kernels.attention.attend_sparse`."""
    if not _joins(context):
        return attention.attend_sparse(
            queries,
            recent,
            sink,
            context.start,
            window=window,
            entries=entries,
            selected=selected,
            begin=context.document_begin,
            target=context.target,
        )
    own = selected - context.axes.offset("read_entries", entries.capacity)
    own = jnp.where((selected >= 0) & (own >= 0) & (own < entries.capacity), own, -1)
    partial = attention.attend_sparse(
        queries,
        recent[:, window:],
        jnp.full_like(sink, MASKED),
        context.start,
        window=0,
        entries=entries,
        selected=own,
        target=context.target,
    )
    return _join_window(context, queries, recent, sink, window, partial)


def attend_all(
    context: Context,
    queries: Float[Array, "b t h c"],
    recent: Float[Array, "b s c"],
    sink: Float[Array, "h"],
    *,
    window: int,
    entries: EntryTable | None,
    ratio: int,
    entry_weight: Float[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """See `v4jax.kernels.attention.attend_dense`.

    Args:
      entry_weight: how often each entry counts for a query, as if the sequence had it so many
        times; goes with the context's `window_begin`.
    """
    assert entry_weight is None or context.window_begin is not None
    begin = context.document_begin
    if entries is None or not _joins(context):
        if entries is None and context.window_begin is not None:
            begin = context.window_begin
        rows = context.start, context.end
        options = {"window": window, "entries": entries, "ratio": ratio, "begin": begin}
        return attention.attend_dense(
            queries, recent, sink, *rows, **options, target=context.target
        )
    before = context.axes.offset("read_entries", entries.capacity) * ratio
    attended, mass = attention.attend_dense(
        queries,
        recent[:, window:],
        jnp.full_like(sink, MASKED),
        context.start - before,
        context.end - before,
        window=0,
        entries=entries,
        ratio=ratio,
        begin=begin,
        target=context.target,
    )
    if entry_weight is not None:
        mass = mass + jnp.log(entry_weight)[..., None]
    return _join_window(context, queries, recent, sink, window, (attended, mass))


def _joins(context: Context) -> bool:
    """Whether window and entries are attended to apart, and then joined."""
    return context.axes.size("read_entries") > 1 or context.window_begin is not None


def _join_window(context, queries, recent, sink, window, partial):
    """Joins attention over window and sink with that over all devices' entries; both results."""
    entries_bthc, entry_mass = merge_partials(context.axes, *partial)
    rows = context.start, context.end
    options = {"window": window, "begin": context.window_begin, "target": context.target}
    window_bthc, window_mass = attention.attend_dense(queries, recent, sink, *rows, **options)
    mass = jnp.logaddexp(entry_mass, window_mass)
    joined = entries_bthc * jnp.exp(entry_mass - mass)[..., None]
    joined += window_bthc.astype(jnp.float32) * jnp.exp(window_mass - mass)[..., None]
    return round_to(joined, queries.dtype), mass
