"""The indexer's loss against a dense computation of its formula (spec G.4), and what it trains.

The dense side scores every pair, with the joint softmax of each head over window, entries and sink.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CPU, CSA, IDS, make_config, make_model

from v4jax.cache.formats import index_format
from v4jax.config.numerics import FLOAT32
from v4jax.config.run import LossConfig
from v4jax.kernels.table import EntryTable
from v4jax.model.weights import read_weights, write_weights
from v4jax.parallel import ONE_DEVICE
from v4jax.training import indexer_loss
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode
from v4jax.training.indexer_loss import Shown, compare_selected, compare_visible
from v4jax.training.losses import compute_losses, count_totals

B, T, H, C, I, X, W, RATIO, TOPK = 2, 21, 3, 8, 4, 6, 5, 4, 2
# Sums of some hundred products of size 1 in float32, in another order.
TOLERANCE = 2e-5
# Rows hold two documents: of 8 and 13 tokens. (Alone they would start at multiples of 128, but the
# formulas ask for whole windows only.)
BEGIN = np.where(np.arange(T) < 8, 0, 8)[None].repeat(B, 0)


def table(rows):
    stored_as = index_format(CSA, FLOAT32).unpacked
    return EntryTable(stored_as.encode(rows[None]), jnp.int32(0), stored_as)


@functools.cache
def example():
    """Random queries, entries and index scores, and each head's true log mass."""
    random = np.random.RandomState(2)

    def draw(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    case = types.SimpleNamespace(
        queries=2 * draw(B, T, H, C),
        entries=draw(B, W, C),
        index_queries=draw(B, T, I, X),
        head_weights=draw(B, T, I),
        keys=draw(B, W, X),
    )
    position = np.arange(T)
    visible = np.arange(W) < ((position + 1) // RATIO)[:, None]
    case.visible = visible & (np.arange(W) >= BEGIN[..., None] // RATIO)
    scores = np.einsum("bthc,bwc->bthw", case.queries, case.entries) / np.sqrt(C)
    entry_mass = (np.exp(scores) * case.visible[:, :, None]).sum(-1)
    # Of window and sink; the first head looks at its window almost only, so it must count little.
    rest = np.exp(random.standard_normal((B, T, H)) + np.array([8, 0, 0]))
    case.log_mass = jnp.asarray(np.log(entry_mass + rest), jnp.float32)
    index_scores = dense_scores(case.index_queries, case.head_weights, case.keys)
    ranked = np.argsort(-np.where(case.visible, index_scores, -np.inf), -1, kind="stable")
    ranked = ranked[..., :TOPK]
    chosen = np.take_along_axis(case.visible, ranked, -1)
    case.selected = jnp.asarray(np.where(chosen, ranked, -1), jnp.int32)
    case.among = np.zeros_like(case.visible)
    np.put_along_axis(case.among, ranked, chosen, -1)
    return case


def dense_scores(index_queries, head_weights, keys):
    products = jnp.einsum("btix,bwx->btiw", index_queries, keys, precision="highest")
    return (head_weights[..., None] * jnp.maximum(products, 0)).sum(2)


def dense(index_queries, head_weights, keys, among):
    """Returns (divergence, teacher) [b, t, …] from every pair of query and entry."""
    case = example()
    scores = np.einsum("bthc,bwc->bthw", case.queries, case.entries) / np.sqrt(C)
    # True probability mass; every head's own, not renormalized over entries.
    mass = (np.exp(scores - case.log_mass[..., None]) * among[:, :, None]).sum(2)
    teacher = mass / np.maximum(mass.sum(-1, keepdims=True), 1e-30)
    student = jnp.where(among, dense_scores(index_queries, head_weights, keys), -1e9)
    log_ratio = jnp.log(jnp.maximum(teacher, 1e-30)) - jax.nn.log_softmax(student)
    return jnp.where(among, teacher * log_ratio, 0).sum(-1), teacher


def compare(mode, index_queries, head_weights, keys):
    case = example()
    attention = case.queries, case.log_mass, table(case.entries)
    arguments = ONE_DEVICE, CPU, Shown(*attention, index_queries, head_weights, table(keys))
    if mode == "selected":
        return compare_selected(*arguments, case.selected)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    first = jnp.asarray(BEGIN // RATIO)
    return compare_visible(*arguments, positions, first, ratio=RATIO, count=TOPK)


def trained():
    case = example()
    return case.index_queries, case.head_weights, case.keys


@pytest.mark.parametrize("tile", [1 << 21, 5 * B * W * max(H, C)], ids=["one tile", "tiles"])
@pytest.mark.parametrize("mode", ["visible", "selected"])
def test_divergence_recall_and_gradients(mode, tile, monkeypatch):
    monkeypatch.setattr(indexer_loss, "TILE_ELEMENTS", tile)
    case = example()
    among = case.visible if mode == "visible" else case.among
    weights = jnp.asarray(np.random.RandomState(7).uniform(0.5, 1, (B, T)), jnp.float32)

    def ours(*arrays):
        found = compare(mode, *arrays)
        return (found.divergence * weights).sum(), found

    def theirs(*arrays):
        divergence, teacher = dense(*arrays, among)
        return (divergence * weights).sum(), (divergence, teacher)

    differentiate = {"argnums": (0, 1, 2), "has_aux": True}
    (_, found), gradients = jax.value_and_grad(ours, **differentiate)(*trained())
    (_, (divergence, teacher)), wanted = jax.value_and_grad(theirs, **differentiate)(*trained())
    np.testing.assert_allclose(found.divergence, divergence, 0, TOLERANCE)
    np.testing.assert_allclose(found.recall, (teacher * case.among).sum(-1), 0, TOLERANCE)
    for a, b in zip(gradients, wanted, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, 0, TOLERANCE)
    sees = case.visible.any(-1)
    assert not np.asarray(found.divergence)[~sees].any() and (divergence[sees] >= -1e-6).all()
    assert not np.asarray(found.recall)[~sees].any() and not sees.all()
    # Queries that see nothing pull on nothing.
    assert not np.asarray(gradients[0])[~sees].any() and not np.asarray(gradients[1])[~sees].any()


def test_a_head_that_looks_elsewhere_weighs_little():
    """Renormalizing every head over the entries first would give another teacher."""
    case = example()
    scores = np.einsum("bthc,bwc->bthw", case.queries, case.entries) / np.sqrt(C)
    _, teacher = dense(*trained(), case.visible)
    mass = np.exp(scores) * case.visible[:, :, None]
    sees = case.visible.sum(-1) > 1
    wrong = (mass / np.maximum(mass.sum(-1, keepdims=True), 1e-30)).mean(2)
    assert np.abs(wrong - teacher)[sees].max() > 0.2
    # The first head's window holds e⁸ of its mass: without the head nothing changes.
    others = np.exp(scores - case.log_mass[..., None])[:, :, 1:] * case.visible[:, :, None]
    others = others.sum(2)
    others = others / np.maximum(others.sum(-1, keepdims=True), 1e-30)
    assert np.median(np.abs(others - teacher)[sees]) < 0.02


@pytest.mark.parametrize("mode", ["visible", "selected"])
def test_attention_gets_no_gradient(mode):
    case = example()

    def divergence(queries, log_mass, entries):
        index = case.index_queries, case.head_weights, table(case.keys)
        arguments = ONE_DEVICE, CPU, Shown(queries, log_mass, table(entries), *index)
        if mode == "selected":
            found = compare_selected(*arguments, case.selected)
            return found.divergence.sum()
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        options = {"ratio": RATIO, "count": TOPK}
        first = jnp.zeros_like(positions)
        found = compare_visible(*arguments, positions, first, **options)
        return found.divergence.sum() + found.recall.sum()

    slopes = jax.grad(divergence, argnums=(0, 1, 2))(case.queries, case.log_mass, case.entries)
    assert not any(np.asarray(slope).any() for slope in slopes)


# ---- in the model ----


@functools.cache
def gradients(of):
    """Returns gradients by name of the mean cross-entropy or of the divergence; dense attention."""
    return {name: np.asarray(g) for name, g in _differentiate()(float(of == "loss")).items()}


@functools.cache
def _differentiate():
    model = make_model(make_config("csa"))
    batch = Batch(jnp.asarray(IDS[:1]), jnp.ones((1, IDS.shape[1])))

    def run(weights):
        totals = count_totals(batch, model.config)
        written = write_weights(model, weights)
        options = LossConfig(mtp_weight=0), Mode(remat="none", dense=True, distill=True)
        return compute_losses(written, batch, totals, *options)[1]

    @jax.jit
    def pull(share):
        parts, back = jax.vjp(run, read_weights(model))
        slopes = jax.tree.map(jnp.zeros_like, parts)
        slopes["loss"], slopes["divergence"] = share, 1 - share
        return back(slopes)[0]

    return pull


def test_divergence_trains_the_indexer_alone():
    for name, gradient in gradients("divergence").items():
        assert np.isfinite(gradient).all()
        assert gradient.any() == (".indexer." in name), name


def test_the_language_model_loss_does_not_reach_the_indexer():
    for name, gradient in gradients("loss").items():
        if ".indexer." in name:
            assert not gradient.any(), name
    reached = {name for name, gradient in gradients("loss").items() if gradient.any()}
    assert {"embed", "head", "stack.prefix.0.attention.compressor.gate"} <= reached
