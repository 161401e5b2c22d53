"""Positions left out inside a document: windows end there, entries stay visible, far away."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CPU

from model.test_packing import MODE, make_model
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.kernels.table import EntryTable
from v4jax.model import attend
from v4jax.model.context import make_context
from v4jax.quant import EntryFormat
from v4jax.training.forward import read_normed, run_rows, weigh_entries

ROW = 384
LOGITS = 5e-5  # float32 through four blocks, logits of deviation 1; the order of sums differs
ROTATED = 2e-3  # as LOGITS, and rotations by angles of thousands, in float32
TOKENS = np.random.RandomState(4).randint(0, 256, (1, ROW))


@jax.jit
def run(model, tokens, begin, skipped):
    streams, _ = run_rows(model, tokens, begin, MODE, skipped)
    return matmul_float32(read_normed(model, streams), model.head[...], target=model.target)


def logits(tokens, skipped, begin=0):
    tokens, skipped = jnp.asarray(tokens, jnp.int32), jnp.asarray(skipped, jnp.int32)
    begin = jnp.broadcast_to(jnp.asarray(begin, jnp.int32), tokens.shape)
    return np.asarray(run(make_model(), tokens, begin, skipped[None]))[0]


def gap(size, first=128):
    """Skips `size` positions in front of token `first` of the row."""
    return np.where(np.arange(ROW) < first, 0, size)


def test_no_gap_is_no_gap():
    np.testing.assert_allclose(
        logits(TOKENS, gap(0)), np.asarray(make_model()(TOKENS))[0], atol=LOGITS
    )


def test_only_distances_count():
    want = logits(TOKENS, gap(1280))
    got = logits(TOKENS, gap(1280) + 128 * 50)
    np.testing.assert_allclose(got, want, atol=ROTATED)


def test_before_the_gap_nothing_changes_and_behind_it_the_distance_does():
    near, far = logits(TOKENS, gap(0)), logits(TOKENS, gap(128 * 30))
    np.testing.assert_array_equal(near[:128], far[:128])
    assert np.abs(near[128:] - far[128:]).max() > 0.05


def test_windows_do_not_reach_over_a_gap_and_entries_do():
    """Without an entry before the gap, what follows stands as if alone; with one it does not."""
    begin = np.full(ROW, 128)
    begin[:128] = -1
    alone = logits(TOKENS, gap(0), begin)
    other = TOKENS.copy()
    other[:, :128] = np.random.RandomState(5).randint(0, 256, 128)
    # Padding in front of the gap has no entries for anyone.
    hidden = np.where(np.arange(ROW) < 128, -1, 128)
    np.testing.assert_allclose(logits(other, gap(640), hidden)[128:], alone[128:], atol=ROTATED)
    seen = logits(TOKENS, gap(640))
    assert np.abs(seen[128:] - alone[128:]).max() > 0.05
    assert np.abs(seen[128:] - logits(other, gap(640))[128:]).max() > 0.05


def test_entries_count_for_what_is_left_out():
    """Where n HCA entries are complete, they count for those of all positions before the query."""
    tokens, skipped = jnp.asarray(TOKENS, jnp.int32), jnp.asarray(gap(1280), jnp.int32)[None]
    begin, counted = jnp.zeros_like(tokens), dataclasses.replace(MODE, count_gaps=True)
    weight = weigh_entries(jnp.zeros(1, jnp.int32), begin, jnp.arange(ROW) + skipped)
    complete = np.arange(1, 4)  # at the last token of each 128
    standing = np.asarray(weight)[0, 127::128] * complete
    np.testing.assert_allclose(standing, np.array([1, 12, 13]), rtol=1e-6)

    def last(mode):
        return run_rows(make_model(), tokens, begin, mode, skipped)[0]

    # Without optimization XLA rounds these two parts of a program apart, by 7e-5.
    options = {"xla_backend_optimization_level": 1}
    plain, other = jax.jit(lambda: (last(MODE), last(counted)), compiler_options=options)()
    np.testing.assert_array_equal(plain[:, :128], other[:, :128])
    assert np.abs(plain[:, 128:] - other[:, 128:]).max() > 0.05


@pytest.mark.parametrize("which", ["selected", "all", "weighted"])
def test_attention_over_a_gap_equals_the_naive_softmax(which):
    random, window, ratio, heads, channels = np.random.RandomState(6), 8, 4, 2, 8
    tokens, window_begin = 24, np.where(np.arange(24) < 12, 0, 12)
    queries = random.standard_normal((1, tokens, heads, channels)).astype(np.float32)
    recent = random.standard_normal((1, window + tokens, channels)).astype(np.float32)
    rows = random.standard_normal((1, 1, tokens // ratio, channels)).astype(np.float32)
    sink = random.standard_normal(heads).astype(np.float32)
    zero = jnp.zeros(1, jnp.int32)
    visible = (np.arange(tokens)[:, None] + 1) // ratio > np.arange(tokens // ratio)
    if which == "selected":
        visible &= random.uniform(size=visible.shape) < 0.6
        ids = np.where(visible, np.arange(tokens // ratio), -1)[None]
        options = {"selected": jnp.asarray(ids, jnp.int32)}
        function = attend.attend_selected
    else:
        options, function = {"ratio": ratio}, attend.attend_all
    often = np.ones((1, tokens), np.float32)
    if which == "weighted":  # as if each entry stood there so many times
        often = np.exp2(random.uniform(0, 9, often.shape)).astype(np.float32)
        options["entry_weight"] = often

    def ours(queries, rows, recent):
        stored_as = EntryFormat("float32", channels, 0, "float32")
        entries = EntryTable({"values": rows}, jnp.int32(0), stored_as)
        ids = jnp.zeros((1, tokens), jnp.int32)
        begins = {"document_begin": ids, "window_begin": jnp.asarray(window_begin)[None]}
        context = make_context(ids, zero, zero + tokens, set(), CPU, **begins)
        arguments = context, queries, recent, jnp.asarray(sink)
        return function(*arguments, window=window, entries=entries, **options)

    def naive(queries, rows, recent):
        place = np.arange(tokens)
        near = (place[None] <= place[:, None]) & (place[None] > place[:, None] - window)
        near &= place[None] >= window_begin[:, None]
        keys = jnp.concatenate([recent[0, window:], rows[0, 0]])
        scores = jnp.einsum("thc,sc->ths", queries[0], keys) * channels**-0.5
        mask = np.concatenate([near, visible], axis=1)[:, None]
        scores = scores.at[..., tokens:].add(jnp.log(often[0])[:, None, None])
        scores = jnp.where(mask, scores, -jnp.inf)
        mass = jnp.logaddexp(jax.nn.logsumexp(scores, axis=-1), sink)
        return jnp.einsum("ths,sc->thc", jnp.exp(scores - mass[..., None]), keys)[None], mass[None]

    queries, rows, recent = map(jnp.asarray, (queries, rows, recent))
    for got, want in zip(ours(queries, rows, recent), naive(queries, rows, recent), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    loss = lambda f: lambda *a: (f(*a)[0] ** 2).sum() + f(*a)[1].sum()  # noqa: E731
    got = jax.grad(loss(ours), (0, 1, 2))(queries, rows, recent)
    want = jax.grad(loss(naive), (0, 1, 2))(queries, rows, recent)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
