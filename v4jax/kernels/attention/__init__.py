"""Attention: every query head reads one stream of key-values, raw tokens and compressed entries.

`attend_dense` sees the window and every visible entry (HCA and window layers), `attend_sparse` the
window and selected entries (CSA). Each vector is key and value at once, the same for all heads.
Where entries are split over devices, the results of all shards are merged by their log-sum-exp. All
shards but one attend with window 0 and a sink of `softmax.MASKED`, and count positions from their
first entry. Read `reference.py` first.
"""

from jaxtyping import Array, Float, Int

from v4jax.kernels import dispatch
from v4jax.kernels.attention.call import Call, Inputs
from v4jax.kernels.dispatch import Target
from v4jax.kernels.table import EntryTable, hide_padding
from v4jax.shapes import check_shape


def attend_dense(
    queries: Float[Array, "b t h c"],
    recent: Float[Array, "b s c"],
    sink: Float[Array, "h"],
    start: Int[Array, "b"],
    end: Int[Array, "b"],
    *,
    window: int,
    entries: EntryTable | None = None,
    ratio: int = 0,
    begin: Int[Array, "b t"] | None = None,
    target: Target,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """Returns softmax(q·k / √c) · k over window, visible entries and sink, and its log-sum-exp.

    The query at position p sees raw tokens p−window+1 … p and entries w < (p+1) // ratio.

    Args:
      queries: rotated queries of tokens start … start+t−1.
      recent: rotated key-values in order of position: `window` rows of history, then the t tokens
        themselves.
      sink: one logit per head, with no value.
      start: position of the first query of each sequence; rows before position 0 are masked.
      end: position after the last real token; later queries are padding, and cost nothing.
      window: tokens a query sees, itself included; 0 for none.
      entries: compressed entries, or None on a window layer.
      ratio: tokens per entry.
      begin: where a row holds several documents, the position of the first token of each query's
        document, a multiple of `table.DOCUMENT_UNIT`, as start then is; negative for padding. What
        lies before it is invisible; what padding gets means nothing.
      target: the devices the program is made for.

    Source: spec B.6, B.10.
    """
    _check(queries, recent, sink, window, begin)
    stored, layer, stored_as = None, None, None
    if entries is not None:
        stored, layer, stored_as = entries.stored, entries.layer, entries.format
    call = Call(window, ratio, stored_as, target)
    begin = hide_padding(begin)
    inputs = Inputs(queries, recent, sink, start, end, begin, None, stored, layer)
    return _run("dense_attention", "dense_tpu", call, inputs)


def attend_sparse(
    queries: Float[Array, "b t h c"],
    recent: Float[Array, "b s c"],
    sink: Float[Array, "h"],
    start: Int[Array, "b"],
    *,
    window: int,
    entries: EntryTable,
    selected: Int[Array, "b t k"],
    begin: Int[Array, "b t"] | None = None,
    target: Target,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """As `attend_dense`, over the window, the selected entries and the sink.

    Args:
      selected: ids of the entries each query sees, −1 where it has fewer; the same for all heads.
        With several documents in a row they must not lie before the query's own.

    Source: spec B.9, B.10.
    """
    _check(queries, recent, sink, window, begin)
    check_shape("selected", selected, (*queries.shape[:2], None))
    call = Call(window, 0, entries.format, target)
    begin, stored = hide_padding(begin), (entries.stored, entries.layer)
    inputs = Inputs(queries, recent, sink, start, None, begin, selected, *stored)
    return _run("sparse_attention", "sparse_tpu", call, inputs)


def _run(operation: str, kernel: str, call: Call, inputs: Inputs):
    names = (kernel, "portable")
    implementation = dispatch.pick(call.target, operation, __name__, call, inputs, names=names)
    return implementation.attend(call, inputs)


def _check(queries, recent, sink, window, begin):
    batch, tokens, heads, channels = queries.shape
    check_shape("recent", recent, (batch, window + tokens, channels))
    check_shape("sink", sink, (heads,))
    if begin is not None:
        check_shape("begin", begin, (batch, tokens))
