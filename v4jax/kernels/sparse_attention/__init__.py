"""Attention over the window and the selected compressed entries (CSA)."""

from jaxtyping import Array, Float, Int

from v4jax.kernels import dispatch
from v4jax.kernels.sparse_attention import reference
from v4jax.kernels.table import EntryTable
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

    Source: spec B.9, B.10.
    """
    options = {"window": window, "entries": entries, "selected": selected}
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
) -> tuple[Float[Array, "b t h c"], Float[Array, "b t h"]]:
    """As `attend`, and the log-sum-exp over keys and sink, by which partial results are merged.

    A window of 0 leaves the selected entries only.
    """
    batch, tokens, heads, channels = queries.shape
    check_shape("recent", recent, (batch, window + tokens, channels))
    check_shape("sink", sink, (heads,))
    check_shape("selected", selected, (batch, tokens, None))
    implementation = reference
    if _choose(queries, recent, window, entries, selected) == "pallas_tpu":
        from v4jax.kernels.sparse_attention import pallas_tpu as implementation
    return implementation.attend_with_mass(
        queries, recent, sink, start, window=window, entries=entries, selected=selected
    )


def _choose(queries, recent, window, entries, selected) -> str:
    def check_tpu():
        reason = dispatch.needs_platform("tpu")
        if reason is not None:
            return reason
        from v4jax.kernels.sparse_attention import pallas_tpu

        return pallas_tpu.supported(queries, recent, window, entries, selected)

    return dispatch.choose("sparse_attention", {"pallas_tpu": check_tpu, "reference": lambda: None})
