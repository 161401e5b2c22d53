"""What portable operations do on GPUs, traced for one and run on a CPU: the same as there.

The two kernels for GPUs are interpreted; that they compile and run on a card is no test's here
(`benchmarks/layers.py` is run on one).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from v4jax.kernels import (
    dense_attention,
    dispatch,
    grouped_matmul,
    hyper_connections,
    indexer,
    sparse_attention,
)
from v4jax.kernels.dense_attention import reference as dense
from v4jax.kernels.grouped_matmul import reference as experts
from v4jax.kernels.hyper_connections import reference as streams_reference
from v4jax.kernels.hyper_connections import sinkhorn_gpu
from v4jax.kernels.indexer import reference as selection
from v4jax.kernels.indexer import scores_gpu
from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.kernels.sparse_attention import reference as sparse
from v4jax.kernels.tiles import map_query_tiles

from . import naive

# Float32 sums in another order; bfloat16 results, of which the last of eight bits may differ.
FLOAT32, BFLOAT16 = 2e-5, 2**-7
STREAMS = {"norm_eps": 1e-6, "eps": 1e-6, "iterations": 20}


@pytest.fixture(autouse=True)
def small_and_interpreted(monkeypatch):
    """Sizes that a test's arrays exceed; kernels run as jnp."""
    call = pl.pallas_call

    def interpret(*arguments, compiler_params=None, **options):
        return call(*arguments, interpret=True, **options)

    monkeypatch.setattr(pl, "pallas_call", interpret)
    sizes = {"GPU_TILE": 8, "GPU_BLOCK": 16}
    for module in (dense, sparse, selection, experts):
        for name in sizes.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, sizes[name])
    monkeypatch.setattr(dense, "QUERY_TILE", 4)
    monkeypatch.setattr(dense, "GPU_TOGETHER", 6)  # three of each of two rows
    monkeypatch.setattr(selection, "ENTRY_BLOCK", 8)
    monkeypatch.setattr(selection, "SPAN", 4)
    monkeypatch.setattr(selection, "SMALL", 8)


def both(function, *arguments):
    """Returns what a function gives here, and traced for a GPU."""
    here = jax.jit(function)(*arguments)
    with dispatch.compiling_for("gpu"):
        return here, jax.jit(lambda *a: function(*a))(*arguments)


def check(function, *arguments, error):
    for here, there in zip(*map(jax.tree.leaves, both(function, *arguments)), strict=True):
        here, there = np.asarray(here, np.float32), np.asarray(there, np.float32)
        np.testing.assert_allclose(there, here, rtol=error, atol=error * np.abs(here).max())


def draw(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("tokens", [16, 150])
def test_index_scores(tokens):
    queries, keys = draw(2, tokens, 4, 32, dtype="bfloat16"), draw(2, 70, 32, dtype="bfloat16")
    arguments = queries, draw(2, tokens, 4, seed=2), keys
    assert scores_gpu.supported(queries, keys) is None
    check(selection.score, *arguments, error=FLOAT32)


def test_which_index_scores():
    few, many = draw(1, 15, 4, 32, dtype="bfloat16"), draw(1, 16, 4, 32, dtype="bfloat16")
    assert "at least 16, got 15" in scores_gpu.supported(few, many[:, 0])
    assert "bfloat16, got bfloat16 and float32" in scores_gpu.supported(many, draw(1, 9, 32))
    assert "power of two from 16 on, got 24" in scores_gpu.supported(many[..., :24], many[:, 0])


@pytest.mark.parametrize("tokens", [1, 10])
@pytest.mark.parametrize("capacity", [16, 37, 150])
def test_selection_with_ties(tokens, capacity):
    """Integers: all sums are exact, and many scores equal. The last capacity has groups of two."""
    assert selection.choose_group(capacity, 5) == {16: 1, 37: 1, 150: 2}[capacity]
    shapes = (2, tokens, 4, 8), (2, tokens, 4), (2, capacity, 8)
    arrays = [jnp.round(draw(*shape, seed=i)) for i, shape in enumerate(shapes)]
    start = jnp.array([0, 500])

    def select(queries, weights, keys):
        options = {"ratio": 4, "count": 5}
        found = indexer.select(
            queries, weights, naive.table(keys), start, start + tokens, **options
        )
        return jnp.sort(found, axis=-1)

    here, there = both(select, *arrays)
    np.testing.assert_array_equal(here, there)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("dtype, error", [("float32", FLOAT32), ("bfloat16", BFLOAT16)])
@pytest.mark.parametrize("tokens, capacity", [(1, 12), (1, 40), (22, 12), (22, 40)])
@pytest.mark.parametrize("packed", [False, True], ids=["", "documents"])
def test_attention(kind, dtype, error, tokens, capacity, packed):
    """And its gradients: six tiles in groups of three, the last not full; one block and several."""
    window, start = 8, jnp.array([0, 0 if packed else 60])
    arrays = draw(2, tokens, 2, 16), draw(2, window + tokens, 16), draw(2, capacity, 16), draw(2)
    selected = jax.random.randint(jax.random.key(1), (2, tokens, 6), -1, capacity)
    cotangent = draw(2, tokens, 2, 16, seed=3)
    begin = None
    if packed:  # a document of 8 tokens, one of more, and padding in the second row
        begin = jnp.where(jnp.arange(tokens) < 8, 0, 8) * jnp.ones((2, 1), jnp.int32)
        begin = begin.at[1, 15:].set(-1)
        cotangent = cotangent.at[1, 15:].set(0.0)

    def attend(queries, recent, entries, sink):
        table = naive.table(entries)
        queries, recent = queries.astype(dtype), recent.astype(dtype)
        options = {"window": window, "entries": table, "begin": begin}
        if kind == "sparse":
            selection = {"selected": selected}
            found = sparse_attention.attend(queries, recent, sink, start, **options, **selection)
        else:
            end = start + tokens
            found, _ = dense_attention.attend(queries, recent, sink, start, end, ratio=4, **options)
        return (found * cotangent).sum(), found * (cotangent != 0)

    check(jax.value_and_grad(attend, (0, 1, 2, 3), has_aux=True), *arrays, error=error)


def test_tiles_at_once():
    """Nine tiles, four at once at most: three groups of three, and the last tile not full."""
    groups = []

    def body(first, x):
        groups.append(x.shape)
        return x + first

    found = jax.jit(lambda x: map_query_tiles(body, 4, x, together=4))(jnp.zeros((2, 34)))
    np.testing.assert_array_equal(found[1], np.arange(34) // 4 * 4)
    assert groups == [(2, 4)]


def test_experts():
    ids = jax.random.randint(jax.random.key(2), (37, 3), 0, 5)
    arrays = draw(37, 64), draw(37, 3), draw(5, 2, 32, 64), draw(5, 64, 32)

    def apply(x, weights, gate_up, down):
        return grouped_matmul.apply_experts(x, ids, weights, gate_up, down, limit=1.0)

    check(apply, *arrays, error=FLOAT32)


@pytest.mark.parametrize("dtype, error", [("float32", FLOAT32), ("bfloat16", BFLOAT16)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_hyper_connections(dtype, error, tokens):
    """And their gradients; the projection's last bits are lost where streams are bfloat16."""
    shapes = (2, tokens, 4, 12), (24, 48), (24,), (3,)
    streams, *site = (draw(*shape, seed=i) for i, shape in enumerate(shapes))

    def mix(streams, *site):
        found, mixing = hyper_connections.mix(streams.astype(dtype), *site, **STREAMS)
        return sum(jnp.sin(x.astype(jnp.float32)).sum() for x in (found, *mixing)), mixing

    check(jax.value_and_grad(mix, (0, 1, 2, 3), has_aux=True), streams, *site, error=error)


def test_projection_of_streams_is_that_of_float32():
    streams, fn = draw(1, 50, 4, 256, dtype="bfloat16"), draw(24, 1024, seed=1)
    found = jax.jit(streams_reference._project_bfloat16)(streams, fn)
    exact = np.asarray(streams, np.float64).reshape(1, 50, -1) @ np.asarray(fn, np.float64).T
    assert np.abs(found - exact).max() < 1e-6 * np.abs(exact).max()


def test_sinkhorn():
    logits = draw(4, 4, 2, 70)
    run = functools.partial(sinkhorn_gpu.sinkhorn, eps=1e-6, iterations=20)
    plain = functools.partial(streams_reference.normalize, eps=1e-6, iterations=20)
    np.testing.assert_allclose(jax.jit(run)(logits), jax.jit(plain)(logits), rtol=1e-6)


def test_products_of_bfloat16_in_float32():
    x, weight = draw(2, 3, 64, dtype="bfloat16"), draw(32, 64, seed=1, dtype="bfloat16")
    cotangent = draw(2, 3, 32, seed=2)

    def multiply(x, weight):
        found = matmul_float32(x, weight)
        return (found * cotangent).sum(), found

    here, there = both(jax.value_and_grad(multiply, (0, 1), has_aux=True), x, weight)
    ((_, found), gradients), ((_, expected), _) = there, here
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == jnp.float32
    check(jax.grad(lambda *a: multiply(*a)[0], (0, 1)), x, weight, error=BFLOAT16)
    assert {gradient.dtype for gradient in gradients} == {jnp.dtype("bfloat16")}


def test_gradients_of_several_products_are_added_in_float32():
    """A thousand small ones after a large one: in bfloat16 they would not count."""
    weight = jnp.ones((1, 16), jnp.bfloat16)
    x = jnp.ones((1001, 1, 16), jnp.bfloat16)
    cotangents = jnp.full(1001, 1 / 1024).at[0].set(1.0)

    def total(weight):
        wide = weight.astype(jnp.float32)
        one = jax.checkpoint(lambda x: matmul_float32(x, weight, wide)[0, 0])
        return (jax.lax.map(one, x) * cotangents).sum()

    here, there = both(jax.grad(total), weight)
    np.testing.assert_array_equal(here, there)
    np.testing.assert_allclose(there.astype(jnp.float32), 1 + 1000 / 1024, rtol=2**-8)
