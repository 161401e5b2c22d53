"""Losses against plain formulas: cross-entropy in tiles, what counts as a target, balance."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import CPU

from v4jax.config.loading import load_model_config
from v4jax.model.context import make_context
from v4jax.training import losses
from v4jax.training.batch import PADDING, Batch
from v4jax.training.forward import measure_router
from v4jax.training.losses import count_totals, score_targets, target_weights

MODEL = load_model_config("tiny")
WIDTH, VOCAB, BATCH, TILE = 8, 37, 2, 4
FLOAT32 = 2e-6


def head(scale=1.0):
    weight = np.random.RandomState(1).standard_normal((VOCAB, WIDTH)).astype(np.float32) * scale
    return types.SimpleNamespace(layout=None, target=CPU, head=nnx.Param(jnp.asarray(weight)))


def plain(normed, weight, targets):
    logits = jnp.einsum("btd,vd->btv", normed, weight, precision="highest")
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -picked, logits.argmax(-1) == targets


@pytest.mark.parametrize("tokens", [1, TILE - 1, TILE, TILE + 1, 3 * TILE])
def test_cross_entropy_in_tiles(tokens, monkeypatch):
    """Values and gradients of vectors and head; the last tile may be partly empty."""
    monkeypatch.setattr(losses, "LOGIT_ELEMENTS", TILE * BATCH * VOCAB)
    random, model = np.random.RandomState(tokens), head()
    normed = jnp.asarray(random.standard_normal((BATCH, tokens, WIDTH)), jnp.float32)
    targets = jnp.asarray(random.randint(0, VOCAB, (BATCH, tokens)))
    weights = jnp.asarray(random.uniform(size=(BATCH, tokens)), jnp.float32)

    def ours(normed, weight):
        model.head = nnx.Param(weight)
        nll, right = score_targets(model, normed, targets)
        return (nll * weights).sum(), (nll, right)

    def theirs(normed, weight):
        nll, right = plain(normed, weight, targets)
        return (nll * weights).sum(), (nll, right)

    arguments = normed, model.head.get_value()
    (found, wanted) = (
        jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(*arguments) for f in (ours, theirs)
    )
    np.testing.assert_array_equal(found[0][1][1], wanted[0][1][1])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, FLOAT32)


def test_cross_entropy_of_extreme_logits():
    """Logits of ±30,000: the improbable target costs their distance, the probable one nothing."""
    model = head()
    model.head = nnx.Param(jnp.zeros((VOCAB, WIDTH)).at[3, 0].set(1.0).at[4, 0].set(-1.0))
    normed = jnp.full((1, 2, WIDTH), 3e4)
    nll, right = score_targets(model, normed, jnp.array([[3, 4]]))
    np.testing.assert_allclose(nll, [[0, 6e4]])
    np.testing.assert_array_equal(right, [[1, 0]])
    slope = jax.grad(lambda x: score_targets(model, x, jnp.array([[3, 4]]))[0].sum())(normed)
    np.testing.assert_allclose(slope[0, :, 0], [0, 2])


def test_no_array_of_tokens_times_vocabulary():
    """Forward and backward, inner programs included: only a tile of logits and the head are big."""
    tokens, vocabulary = 65_536, 50_000
    sizes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(np.prod(v.aval.shape) for v in equation.outvars)
            for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    def loss(normed, weight):
        model = types.SimpleNamespace(layout=None, target=CPU, head=nnx.Param(weight))
        return score_targets(model, normed, jnp.zeros((1, tokens), jnp.int32))[0].sum()

    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, tokens, WIDTH), (vocabulary, WIDTH))
    ]
    walk(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(*shapes).jaxpr)
    largest = losses.LOGIT_ELEMENTS
    assert largest / 2 < max(sizes) <= largest < tokens * vocabulary / 100


# ---- what counts ----

# Two documents of 3 and 130 tokens from units 0 and 1, padding behind both; one of 256 tokens.
BEGIN = np.full((2, 384), PADDING)
BEGIN[0, :3], BEGIN[0, 128:258], BEGIN[1, :256] = 0, 128, 0
WEIGHTS = np.where(BEGIN < 0, 0.0, 1.0).astype(np.float32)
WEIGHTS[[0, 0, 1], [0, 128, 0]] = 0
PACKED = Batch(np.zeros((2, 384), np.int32), WEIGHTS, BEGIN)


def test_targets_stay_in_their_document():
    one, two = (np.asarray(target_weights(PACKED, ahead)) for ahead in (1, 2))
    assert one[0, :4].tolist() == [1, 1, 0, 0] and two[0, :4].tolist() == [1, 0, 0, 0]
    assert one[0, 127] == 0 and one[0, 256] == 1 and one[0, 257] == 0
    assert one.sum() == 2 + 129 + 255 and two.sum() == 1 + 128 + 254


def test_a_document_pressed_against_the_next():
    """The last token of a document that fills its units does not predict the next one's first."""
    begin = np.repeat([[0, 128]], 128, axis=1)
    one = np.asarray(target_weights(Batch(begin, np.ones((1, 256), np.float32), begin), 1))
    assert one[0, 127] == 0 and one[0, 255] == 0 and one.sum() == 254


def test_weights_count_at_their_target():
    weights = np.array([[0.0, 0.5, 0.25, 4.0]], np.float32)
    batch = Batch(np.zeros((1, 4), np.int32), weights)
    np.testing.assert_array_equal(target_weights(batch, 1), [[0.5, 0.25, 4, 0]])
    np.testing.assert_array_equal(target_weights(batch, 2), [[0.25, 4, 0, 0]])


def test_totals():
    """Queries see an entry of four tokens from their document's fourth token on."""
    totals = jax.tree.map(float, count_totals(PACKED, MODEL))
    assert totals == losses.Totals(386, 383, 389, 0 + 127 + 253)
    stacked = jax.tree.map(lambda x: x[None].repeat(3, 0), PACKED)
    assert count_totals(stacked, MODEL).queries == 3 * totals.queries
    whole = count_totals(Batch(PACKED.tokens, WEIGHTS), MODEL)
    assert (whole.tokens, whole.queries) == (768, 2 * 381)
    nothing = count_totals(Batch(PACKED.tokens, 0 * WEIGHTS, 0 * BEGIN - 1), MODEL)
    assert min(jax.tree.leaves(nothing)) > 0


# ---- balance ----

EXPERTS, CHOSEN = 5, 2


def routing(begin):
    random = np.random.RandomState(4)
    shape = begin.shape
    ids = np.stack([random.permutation(EXPERTS)[:CHOSEN] for _ in range(begin.size)])
    scores = random.uniform(0.1, 2, (begin.size, EXPERTS)).astype(np.float32)
    zeros, end = jnp.zeros(shape[0], jnp.int32), jnp.full(shape[0], shape[1], jnp.int32)
    tokens, begin = jnp.zeros(shape, jnp.int32), jnp.asarray(begin)
    return (
        jnp.asarray(ids),
        jnp.asarray(scores),
        make_context(tokens, zeros, end, set(), CPU, document_begin=begin),
    )


def test_balance_is_the_formula_of_every_document():
    """Σ over documents of T · Σ_e f_e·P_e with f_e = E/(K·T)·count_e (spec G.3)."""
    ids, scores, context = routing(BEGIN)
    found = measure_router(ids, scores, EXPERTS, context)
    shares = scores / scores.sum(1, keepdims=True)
    expected, load, count = 0.0, np.zeros(EXPERTS), BEGIN.size // 2
    for row, first, last in [(0, 0, 3), (0, 128, 258), (1, 0, 256)]:
        place, t = slice(row * count + first, row * count + last), last - first
        counts = np.bincount(np.ravel(ids[place]), minlength=EXPERTS)
        f = EXPERTS / (CHOSEN * t) * counts
        expected += t * (f * np.asarray(shares[place], float).mean(0)).sum()
        load += counts
    np.testing.assert_allclose(found["balance"], expected, 1e-5)
    np.testing.assert_array_equal(found["load"], load)


def test_balance_pulls_scores_from_full_experts():
    """Counts get no gradient: only the shares of the scores do, down where the load is high."""
    _, scores, context = routing(np.zeros((1, 128), int))
    ids = jnp.tile(jnp.array([1, 3]), (128, 1))
    scores = jnp.ones_like(scores)

    def balance(scores):
        return measure_router(ids, scores, EXPERTS, context)["balance"]

    # Of s_e/Σs at equal scores: (δ − 1/E)/E, times f_e = E/K of a full expert.
    slope, full = jax.grad(balance)(scores)[0], EXPERTS / CHOSEN
    down, up = full * (1 - 2 / EXPERTS) / EXPERTS, -full * 2 / EXPERTS / EXPERTS
    np.testing.assert_allclose(slope, [up, down, up, down, up], 1e-5)
    assert balance(scores) == pytest.approx(128)


def test_an_even_load_costs_one_per_token():
    _, scores, context = routing(np.zeros((1, 100), int))
    ids = jnp.stack([jnp.arange(100) % EXPERTS, (jnp.arange(100) + 1) % EXPERTS], 1)
    assert measure_router(ids, scores, EXPERTS, context)["balance"] == pytest.approx(100, rel=1e-5)
