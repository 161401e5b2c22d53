"""The model on eight simulated devices gives the one-device logits, cache and gradients (float32).

Few programs are compiled: meshes that split everything at once run with the suite, axes alone are
marked slow.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import PAIRS, make_model, on_mesh

from v4jax.errors import CacheError, ConfigError

from .golden import check_collectives, skip_other_versions

# Logits have deviation 1.5; sums of float32 in another order differ by up to 3e-5 (measured).
TOLERANCE = 1e-4
# Relative to the largest gradient of a parameter.
GRADIENT_TOLERANCE = 1e-4

COMBINED = {
    "expert, context, tensor": dict(expert=2, context=2, tensor=2),
    "data, expert, context": dict(data=2, expert=2, context=2),
}
ALONE = {
    "expert alone": dict(expert=8),
    "context alone": dict(context=8),
    "data and tensor": dict(data=4, tensor=2),
}
MESHES = [
    *(pytest.param(sizes, id=name) for name, sizes in COMBINED.items()),
    *(pytest.param(sizes, id=name, marks=pytest.mark.slow) for name, sizes in ALONE.items()),
]

IDS = np.random.RandomState(0).randint(0, 256, (4, 2600))


def batch_of(sizes):
    return max(2, sizes.get("data", 1))


# One call after the other: (tokens given to each, real ones per sequence, cyclically). Four shares
# of 128 tokens are a prefill; the second starts at odd phases of all windows. Where a sequence lies
# on eight devices the wide calls have too few tokens, which are then on every device.
CALLS = [
    (512, (512, 389)),
    (3, (1, 3)),
    (3, (3, 2)),
    (1, (1, 0)),
    (512, (500, 512)),
    (1, (1, 1)),
    (3, (3, 3)),
]


def feed(made, batch, calls=CALLS):
    """Returns the logits of the real tokens of every call, and the cache after the last."""
    cache, done, rows = made.init_cache(batch, 1900), np.zeros(batch, int), []
    for width, counts in calls:
        lengths = np.resize(counts, batch)
        tokens = np.zeros((batch, width), int)
        for slot, count in enumerate(lengths):
            tokens[slot, :count] = IDS[slot, done[slot] : done[slot] + count]
        logits, cache = made.extend(tokens, cache, lengths, donate=True)
        rows.append([np.asarray(logits)[slot, :count] for slot, count in enumerate(lengths)])
        done += lengths
    return rows, cache


@functools.cache
def on_one_device(batch):
    return feed(make_model(PAIRS), batch)


@pytest.mark.parametrize("sizes", MESHES)
def test_prefill_and_decode(sizes):
    batch = batch_of(sizes)
    want, want_cache = on_one_device(batch)
    got, cache = feed(on_mesh(make_model(PAIRS), **sizes), batch)
    for call, (a, b) in enumerate(zip(got, want, strict=True)):
        for slot in range(batch):
            np.testing.assert_allclose(
                a[slot], b[slot], atol=TOLERANCE, err_msg=f"call {call}, sequence {slot}"
            )
    np.testing.assert_array_equal(cache.lengths, want_cache.lengths)
    for slot, length in enumerate(np.asarray(cache.lengths)):
        for name, ratio in (("csa", 4), ("hca", 128), ("index", 4)):
            np.testing.assert_allclose(
                np.asarray(cache.stored[name]["values"])[:, slot, : length // ratio],
                np.asarray(want_cache.stored[name]["values"])[:, slot, : length // ratio],
                atol=TOLERANCE,
                err_msg=f"{name} of sequence {slot}",
            )


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("step, width", [("prefill", 1024), ("decode", 1)])
def test_collectives(step, width, sizes):
    skip_other_versions()
    batch, made = batch_of(sizes), on_mesh(make_model(PAIRS), **sizes)

    @jax.jit
    def extend(made, tokens, cache, lengths):
        return made.extend(tokens, cache, lengths, logits="last", trusted=True)

    tokens, lengths = jnp.zeros((batch, width), jnp.int32), jnp.full(batch, width, jnp.int32)
    compiled = extend.lower(made, tokens, made.init_cache(batch, 1900), lengths).compile()
    check_collectives(compiled.as_text(), f"{step}_{'_'.join(sizes)}")


def loss_and_logits(made, tokens):
    logits = made(tokens)
    log_probabilities = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)
    return -picked.mean(), logits


@functools.cache
def differentiate(sizes):
    """Returns loss, logits and the gradient of every float parameter, as NumPy."""
    made = on_mesh(make_model(PAIRS), "train", **dict(sizes)) if sizes else make_model(PAIRS)
    tokens = jnp.asarray(IDS[:2, :400])  # padded to whole shares
    trained, rest = split_floats(made)

    def run(trained):
        return loss_and_logits(join(made, trained, rest), tokens)

    (loss, logits), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(trained)
    return float(loss), np.asarray(logits), {k: np.asarray(g) for k, g in gradients.items()}


def split_floats(made):
    leaves = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(made)
    }
    floats = {k: x for k, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return floats, {k: x for k, x in leaves.items() if k not in floats}


def join(made, *parts):
    leaves = {k: x for part in parts for k, x in part.items()}
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(made)]
    return jax.tree.unflatten(jax.tree.structure(made), [leaves[path] for path in paths])


# A backward pass is the longest compilation: one mesh runs with the suite.
GRADIENT_MESHES = [
    COMBINED["expert, context, tensor"],
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in (COMBINED["data, expert, context"], ALONE["expert alone"])
    ),
]


@pytest.mark.parametrize("sizes", GRADIENT_MESHES, ids=str)
def test_sequence_and_gradients(sizes):
    want_loss, want_logits, want = differentiate(())
    loss, logits, got = differentiate(tuple(sizes.items()))
    np.testing.assert_allclose(logits, want_logits, atol=TOLERANCE)
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
    got = on_mesh(make_model(PAIRS), "train", expert=2, context=2, tensor=2).predict_ahead(tokens)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_arrays_are_split():
    """No device has more than its shard of weights and cache."""
    made = on_mesh(make_model(PAIRS), expert=2, context=2, tensor=2)
    gate_up = made.stack.period[0].moe.experts.gate_up.get_value()
    e, f = PAIRS.n_routed_experts, PAIRS.moe_intermediate_size
    assert gate_up.addressable_shards[0].data.shape[1:4] == (e // 2, 2, f // 2)
    cache = made.init_cache(2, 1900)
    entries = cache.stored["csa"]["values"]
    assert entries.shape[2] == 476 and entries.addressable_shards[0].data.shape[2] == 119
    assert cache.reset(np.array([True, False])).take(np.array([1, 0])).batch == 2


MISUSE = {
    "batch": (
        lambda m: m.init_cache(3, 100), ConfigError,
        "mesh.data = 2 does not divide a batch of 3; use a multiple of 2",
    ),
    "cache of one device": (
        lambda m: m.extend(IDS[:2, :4], make_model(PAIRS).init_cache(2, 99)), CacheError,
        "the cache belongs to another model or to other numerics",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSE)
def test_misuse(case):
    call, kind, message = MISUSE[case]
    with pytest.raises(kind) as error:
        call(on_mesh(make_model(PAIRS), data=2, expert=2, context=2))
    assert message in str(error.value)
