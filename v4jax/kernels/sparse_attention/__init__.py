"""Attention over the window and the selected compressed entries (CSA)."""

from jaxtyping import Array, Float, Int

from v4jax.kernels import dispatch
from v4jax.kernels.sparse_attention import reference
from v4jax.kernels.table import EntryTable, hide_padding
from v4jax.shapes import check_shape


def attend(
    queries: Float[Array, "b t h c"],
    recent: Float[Array, "b s c"],
    sink: Float[Array, "h"],
    start: Int[Array, "b"],
    *,
    window: int,
    entries: EntryTable,
    selected: Int[Array, "b t k"],
    begin: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h c"]:
    """Returns softmax(q·k / √c, with sink) · k over the window and the selected entries.

    Args:
      queries: rotated queries of tokens start … start+t−1.
      recent: rotated key-values in order of position: `window` rows of history, then the t tokens
        themselves.
      sink: one logit per head, with no value.
      start: position of the first query of each sequence; rows before position 0 are masked.
      window: tokens a query sees, itself included.
      entries: compressed entries.
      selected: ids of the entries each query sees, −1 where it has fewer; the same for all heads.
      begin: where a row holds several documents, the position of the first token of each query's
        document, a multiple of `table.DOCUMENT_UNIT`, as start then is; negative for padding. The
        window does not reach before it; `selected` must not either.

    Source: spec B.9, B.10.
    """
    options = {"window": window, "entries": entries, "selected": selected, "begin": begin}
    return attend_with_mass(queries, recent, sink, start, **options)[0]


def attend_with_mass(
    queries: Float[Array, "b t h c"],
    recent: Float[Array, "b s c"],
    sink: Float[Array, "h"],
    start: Int[Array, "b"],
    *,
    window: int,
    entries: EntryTable,
    selected: Int[Array, "b t k"],
    begin: Int[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """As `attend`, and the log-sum-exp over keys and sink, by which partial results are merged.

    A window of 0 leaves the selected entries only.
    """
    batch, tokens, heads, channels = queries.shape
    check_shape("recent", recent, (batch, window + tokens, channels))
    check_shape("sink", sink, (heads,))
    check_shape("selected", selected, (batch, tokens, None))
    if begin is not None:
        check_shape("begin", begin, (batch, tokens))
    implementation = reference
    if _choose(queries, recent, window, entries, selected, begin) == "pallas_tpu":
        from v4jax.kernels.sparse_attention import pallas_tpu as implementation
    options = {"window": window, "entries": entries, "selected": selected}
    return implementation.attend_with_mass(
        queries, recent, sink, start, **options, begin=hide_padding(begin)
    )


def _choose(queries, recent, window, entries, selected, begin) -> str:
    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.sparse_attention import pallas_tpu

        return pallas_tpu.supported(queries, recent, window, entries, selected, begin)

    return dispatch.choose("sparse_attention", {"pallas_tpu": check_tpu, "reference": lambda: None})
