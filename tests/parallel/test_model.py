"""The model on eight simulated devices gives the one-device logits, cache and gradients (float32).

Each mesh of the suite splits several axes, and runs the calls that it splits otherwise than the
others. Axes alone are slow tests; so are gradients, which a training step on a mesh compares too
(`tests/training/test_mesh.py`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import PAIRS, make_model, on_mesh

from v4jax.errors import CacheError, ConfigError
from v4jax.model.weights import read_weights, write_weights

from .golden import check_collectives, skip_other_versions

# Logits have deviation 1.5; sums of float32 in another order differ by up to 3e-5 (measured).
TOLERANCE = 1e-4
# Relative to the largest gradient of a parameter.
GRADIENT_TOLERANCE = 1e-4
IDS = np.random.RandomState(0).randint(0, 256, (4, 2600))

# One call after the other: (tokens given to each, real ones per sequence, cyclically). Four shards
# of 128 tokens are a prefill; the second starts at odd phases of all windows. Where a sequence is
# on eight devices the wide calls have too few tokens, which are then on every device.
PREFILL, AGAIN = (512, (512, 389)), (512, (500, 512))
SINGLE = [PREFILL, (1, (1, 0)), AGAIN, (1, (1, 1))]
SEVERAL = [PREFILL, (3, (1, 3)), (3, (3, 2)), AGAIN, (3, (3, 3))]
ECT, DEC = dict(expert=2, context=2, tensor=2), dict(data=2, expert=2, context=2)
MESHES = {
    "expert, context, tensor": (ECT, SINGLE),
    "data, expert, context": (DEC, SEVERAL),
    "expert alone": (dict(expert=8), SINGLE),
    "context alone": (dict(context=8), SEVERAL),
    "data and tensor": (dict(data=4, tensor=2), SEVERAL),
}


def mark(sizes: dict, *fast: dict):
    """Returns a mesh as a parameter of a test: slow unless it is one of `fast`."""
    return pytest.param(sizes, id="_".join(sizes), marks=[] if sizes in fast else pytest.mark.slow)


def batch_of(sizes):
    return max(2, sizes.get("data", 1))


def feed(model, batch, calls):
    """Returns the logits of the real tokens of every call, and the cache after the last."""
    cache, done, rows = model.init_cache(batch, 1900), np.zeros(batch, int), []
    for width, counts in calls:
        lengths = np.resize(counts, batch)
        tokens = np.zeros((batch, width), int)
        for slot, count in enumerate(lengths):
            tokens[slot, :count] = IDS[slot, done[slot] : done[slot] + count]
        logits, cache = model.extend(tokens, cache, lengths, donate=True)
        rows.append([np.asarray(logits)[slot, :count] for slot, count in enumerate(lengths)])
        done += lengths
    return rows, cache


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if i > 1 else []) for i, n in enumerate(MESHES)]
)
def test_prefill_and_decode(name):
    sizes, calls = MESHES[name]
    batch = batch_of(sizes)
    want, want_cache = feed(make_model(PAIRS), batch, calls)
    got, cache = feed(on_mesh(make_model(PAIRS), **sizes), batch, calls)
    for call, (a, b) in enumerate(zip(got, want, strict=True)):
        for slot in range(batch):
            message = f"call {call}, sequence {slot}"
            np.testing.assert_allclose(a[slot], b[slot], atol=TOLERANCE, err_msg=message)
    np.testing.assert_array_equal(cache.lengths, want_cache.lengths)
    for slot, length in enumerate(np.asarray(cache.lengths)):
        for kind, ratio in (("csa", 4), ("hca", 128), ("index", 4)):
            stored, wanted = (
                np.asarray(x.stored[kind]["values"])[:, slot, : length // ratio]
                for x in (cache, want_cache)
            )
            message = f"{kind} of sequence {slot}"
            np.testing.assert_allclose(stored, wanted, atol=TOLERANCE, err_msg=message)


@pytest.mark.parametrize("sizes", [mark(sizes, ECT) for sizes, _ in MESHES.values()])
@pytest.mark.parametrize("step, width", [("prefill", 1024), ("decode", 1)])
def test_collectives(step, width, sizes):
    skip_other_versions()
    batch, model = batch_of(sizes), on_mesh(make_model(PAIRS), **sizes)

    @jax.jit
    def extend(model, tokens, cache, lengths):
        return model.extend(tokens, cache, lengths, logits="last", trusted=True)

    tokens, lengths = jnp.zeros((batch, width), jnp.int32), jnp.full(batch, width, jnp.int32)
    compiled = extend.lower(model, tokens, model.init_cache(batch, 1900), lengths).compile()
    check_collectives(compiled.as_text(), f"{step}_{'_'.join(sizes)}")


def test_sequence():
    """A length that the devices do not divide, by weights that are gathered where they are used."""
    tokens = IDS[:2, :400]
    got = on_mesh(make_model(PAIRS), "train", **ECT)(tokens)
    np.testing.assert_allclose(got, make_model(PAIRS)(tokens), atol=TOLERANCE)


@functools.cache
def differentiate(*sizes):
    """Returns the loss and the gradient of every weight, as NumPy."""
    model = on_mesh(make_model(PAIRS), "train", **dict(sizes)) if sizes else make_model(PAIRS)
    tokens = jnp.asarray(IDS[:2, :400])  # padded to whole shards

    def run(weights):
        logits = write_weights(model, weights)(tokens)
        log_probabilities = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)
        return -picked.mean()

    loss, gradients = jax.jit(jax.value_and_grad(run))(read_weights(model))
    return float(loss), {k: np.asarray(g) for k, g in gradients.items()}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [ECT, DEC, dict(expert=8)], ids=str)
def test_gradients(sizes):
    want_loss, want = differentiate()
    loss, got = differentiate(*sizes.items())
    assert loss == pytest.approx(want_loss, abs=1e-5)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        largest = max(np.abs(gradient).max(), 1e-6)
        np.testing.assert_allclose(
            got[name] / largest, gradient / largest, atol=GRADIENT_TOLERANCE, err_msg=name
        )


@pytest.mark.slow
def test_drafts():
    """The MTP block's pairs of streams and next tokens, of which the last has none."""
    tokens = IDS[:2, :400]
    want = make_model(PAIRS).predict_ahead(tokens)
    got = on_mesh(make_model(PAIRS), "train", **ECT).predict_ahead(tokens)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_arrays_are_split():
    """No device has more than its shard of weights and cache."""
    model = on_mesh(make_model(PAIRS), **ECT)
    gate_up = model.stack.period[0].moe.experts.gate_up.get_value()
    e, f = PAIRS.n_routed_experts, PAIRS.moe_intermediate_size
    assert gate_up.addressable_shards[0].data.shape[1:4] == (e // 2, 2, f // 2)
    cache = model.init_cache(2, 1900)
    entries = cache.stored["csa"]["values"]
    assert entries.shape[2] == 476 and entries.addressable_shards[0].data.shape[2] == 119
    assert cache.reset(np.array([True, False])).take(np.array([1, 0])).batch == 2


def test_misuse():
    model = on_mesh(make_model(PAIRS), **DEC)
    with pytest.raises(ConfigError) as error:
        model.init_cache(3, 100)
    assert "mesh.data = 2 does not divide a batch of 3; use a multiple of 2" in str(error.value)
    with pytest.raises(CacheError, match="the cache belongs to another model or to other numerics"):
        model.extend(IDS[:2, :4], make_model(PAIRS).init_cache(2, 99))
