"""Packed equals unpacked: logits, losses and gradients of documents alone and in any packing.

Every row has the same length, so that all packings are one program; the row of one document that
fills it is also run without `begin`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from flax import nnx

from v4jax.kernels.scaled_matmul import matmul_float32
from v4jax.kernels.table import DOCUMENT_UNIT
from v4jax.training.forward import Mode, read_normed, run_drafts, run_rows

# CSA, of which 8 entries are selected, HCA, and an MTP block with a window.
CONFIG = small_models.make_config("csa hca", mtp=True)
ROW = 10 * DOCUMENT_UNIT
MODE = Mode(remat="none")  # compiles in half the time
LENGTHS = (1, 5, 127, 128, 129, 300)
# name: documents in their order; None is a unit of padding.
PACKINGS = {
    "ascending": (0, 1, 2, 3, 4, 5),
    "descending, padding in front": (None, 5, 4, 3, 2, 1, 0),
    "padding between": (2, 5, 0, None, 4, 1, 3),
}
# Float32 through five blocks on logits of deviation 1; what differs is the order of sums.
LOGITS = 5e-5
GRADIENTS = 1e-4  # of the norm of a parameter's gradient


def make_model():
    return small_models.make_model(CONFIG)


@functools.cache
def documents():
    """Returns (tokens, weights of targets) of every document; the first token is no target."""
    random = np.random.RandomState(3)
    found = []
    for length in LENGTHS:
        weights = random.uniform(0.2, 1.0, length) * (random.uniform(size=length) < 0.8)
        weights[0] = 0
        found.append((random.randint(0, 256, length), weights.astype(np.float32)))
    return found


def pack(order):
    """Returns (tokens, weights, begin) [1, ROW] and where each document stands."""
    tokens, weights = np.full((1, ROW), 77, np.int32), np.zeros((1, ROW), np.float32)
    begin, places, first = np.full((1, ROW), -1, np.int32), {}, 0
    for name in order:
        if name is None:
            first += DOCUMENT_UNIT
            continue
        place = slice(first, first + LENGTHS[name])
        tokens[0, place], weights[0, place] = documents()[name]
        begin[0, place], places[name] = first, place
        first += -(-LENGTHS[name] // DOCUMENT_UNIT) * DOCUMENT_UNIT
    return (tokens, weights, begin), places


def read(model, tokens, begin):
    """Returns the logits of next tokens and of the tokens after them."""
    streams, _ = run_rows(model, tokens, begin, MODE)
    drafts, _ = run_drafts(model, streams, tokens, begin, MODE)
    head, normed = model.head[...], read_normed(model, streams)
    return tuple(matmul_float32(x, head, target=model.target) for x in (normed, drafts))


read_jit = jax.jit(read)


@jax.jit
def run(model, tokens, weights, begin):
    """Returns `read`, the summed loss of both, and its gradients."""

    def shift(x, ahead):
        return jnp.pad(x[:, ahead:], [(0, 0), (0, ahead)])

    def loss_of(logits, ahead):
        scores = jax.nn.log_softmax(logits)
        targets = shift(tokens, ahead)[..., None]
        counted = jnp.where(shift(begin + 1, ahead) == begin + 1, shift(weights, ahead), 0)
        return -(jnp.take_along_axis(scores, targets, -1)[..., 0] * counted).sum()

    def compute(model):
        logits, drafts = read(model, tokens, begin)
        return loss_of(logits, 1) + 0.3 * loss_of(drafts, 2), (logits[0], drafts[0])

    graph, trained, rest = nnx.split(model, nnx.Param, ...)
    differentiate = jax.value_and_grad(lambda x: compute(nnx.merge(graph, x, rest)), has_aux=True)
    (loss, logits), gradients = differentiate(trained)
    return logits, loss, nnx.to_pure_dict(gradients)


@functools.cache
def alone(name):
    """Returns what `run` gives for one document at the beginning of a row."""
    return run(make_model(), *pack([name])[0])


def assert_close(gradients, expected):
    for (path, value), wanted in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        difference = np.linalg.norm(value - wanted)
        assert difference <= GRADIENTS * np.linalg.norm(wanted), (path, difference)


@pytest.mark.parametrize("order", PACKINGS.values(), ids=PACKINGS.keys())
def test_packed_equals_alone(order):
    arguments, places = pack(order)
    logits, loss, gradients = run(make_model(), *arguments)
    for name, place in places.items():
        for found, wanted in zip(logits, alone(name)[0], strict=True):
            # A draft needs the token after its own.
            count = LENGTHS[name] - (found is logits[1])
            found, wanted = found[place][:count], wanted[:count]
            np.testing.assert_allclose(found, wanted, 0, LOGITS, err_msg=f"document {name}")
    np.testing.assert_allclose(loss, sum(alone(name)[1] for name in places), 1e-6)
    assert_close(gradients, jax.tree.map(lambda *x: sum(x), *(alone(n)[2] for n in places)))


def test_gradient_of_one_document_in_a_packing():
    (tokens, weights, begin), places = pack(PACKINGS["padding between"])
    only = np.zeros_like(weights)
    only[0, places[4]] = weights[0, places[4]]
    _, loss, gradients = run(make_model(), tokens, only, begin)
    np.testing.assert_allclose(loss, alone(4)[1], 1e-6)
    assert_close(gradients, alone(4)[2])


def test_one_document_needs_no_begin():
    """A row that is one document gives the same bits with `begin` and without.

    XLA optimizes here: without that it rounds these two programs apart, by 2e-6.
    """
    tokens = np.random.RandomState(0).randint(0, 256, (1, ROW))
    begin = np.zeros((1, ROW), np.int32)
    optimized = jax.jit(read, compiler_options={"xla_backend_optimization_level": 1})
    with_begin, without = (optimized(make_model(), tokens, x) for x in (begin, None))
    jax.tree.map(np.testing.assert_array_equal, with_begin, without)


def test_rows_split_over_devices():
    """Shares of 384 tokens, the last of them padding: documents begin inside and reach across."""
    (tokens, _, begin), _ = pack(PACKINGS["padding between"])
    expected = read_jit(make_model(), tokens, begin)
    on_mesh = small_models.on_mesh(make_model(), context=4, tensor=2)
    for found, wanted in zip(read_jit(on_mesh, tokens, begin), expected, strict=True):
        real = begin[0] >= 0
        np.testing.assert_allclose(found[0][real], wanted[0][real], 0, LOGITS)
