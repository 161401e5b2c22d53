"""Attention over the window and, on HCA layers, every visible compressed entry."""

from jaxtyping import Array, Float, Int

from v4jax.kernels import dispatch
from v4jax.kernels.dense_attention import reference
from v4jax.kernels.table import EntryTable, hide_padding
from v4jax.shapes import check_shape


def attend(
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
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """Returns softmax(q·k / √c) · k over window, visible entries and sink, and its log-sum-exp.

    The query at position p sees raw tokens p−window+1 … p and entries w < (p+1) // ratio; each
    vector is key and value at once, the same for all heads. Where entries are split over devices,
    each share's result and log-sum-exp merge into the whole's: all but one attend with window 0
    and a sink of `softmax.MASKED`, and count positions from their first entry.

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

    Source: spec B.6, B.10.
    """
    batch, tokens, heads, channels = queries.shape
    check_shape("recent", recent, (batch, window + tokens, channels))
    check_shape("sink", sink, (heads,))
    if begin is not None:
        check_shape("begin", begin, (batch, tokens))
    implementation = reference
    if _choose(queries, recent, window, entries) == "pallas_tpu":
        from v4jax.kernels.dense_attention import pallas_tpu as implementation
    options = {"window": window, "entries": entries, "ratio": ratio}
    return implementation.attend(
        queries, recent, sink, start, end, **options, begin=hide_padding(begin)
    )


def _choose(queries, recent, window, entries) -> str:
    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.dense_attention import pallas_tpu

        return pallas_tpu.supported(queries, recent, window, entries)

    return dispatch.choose("dense_attention", {"pallas_tpu": check_tpu, "reference": lambda: None})
