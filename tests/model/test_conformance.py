"""What every way of feeding a sequence must have in common, on the tiny configuration.

The whole sequence in one call is the truth (`test_golden_logits.py` ties it to the published
implementation). Here: any chunking, any batch, any slot, any past of the slot give the same logits.
One batch holds many schedules, one per slot, so that few shapes are compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from v4jax.model import abstract_transformer

TOKENS = 300  # two windows of 128 and a rest that is no multiple of 4
CAPACITY = 320

# Logits have deviation near 1 (see `model`). Chunkings differ in the order of float32 sums only:
# the largest difference seen is 2.1e-5. The bound is the one promised towards the published code.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    """The tiny model with every parameter away from its neutral start, logits of deviation ~1."""
    model = v4jax.load("tiny", seed=11)
    random = np.random.RandomState(5)

    def perturb(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return leaf * (1 + 0.2 * noise)
        if "sink" in name or "position_bias" in name or "bias" in name or "base" in name:
            return leaf + 0.5 * noise
        if "scale" in name:
            return leaf + 0.7 + 0.1 * noise
        return noise * (1.5 / np.sqrt(leaf.shape[-1]))

    return jax.tree_util.tree_map_with_path(perturb, model)


@pytest.fixture(scope="module")
def ids():
    return np.random.RandomState(3).randint(0, 256, TOKENS)


@pytest.fixture(scope="module")
def whole(model, ids):
    """Logits [t, v] of the sequence in one call."""
    return np.asarray(model(ids[None]))[0]


def feed(model, sequences, schedules, width, cache=None):
    """Feeds every slot its sequence by its own schedule; returns each slot's logits, and the cache.

    A schedule is a list of chunk lengths, none above `width`; all calls have shape [slots, width].
    """
    slots = len(sequences)
    cache = model.init_cache(slots, CAPACITY) if cache is None else cache
    done, rows = np.zeros(slots, int), [[] for _ in range(slots)]
    for step in range(max(map(len, schedules))):
        lengths = np.array([s[step] if step < len(s) else 0 for s in schedules])
        tokens = np.full((slots, width), 7)
        for slot, sequence in enumerate(sequences):
            piece = sequence[done[slot] : done[slot] + lengths[slot]]
            tokens[slot, : len(piece)] = piece
        logits, cache = model.extend(tokens, cache, lengths=lengths, donate=True)
        logits = np.asarray(logits)
        for slot in range(slots):
            rows[slot].append(logits[slot, : lengths[slot]])
        done += lengths
    return [np.concatenate(row) for row in rows], cache


def chunks(total, size):
    """Returns chunk lengths of `size` that add up to `total`."""
    return [min(size, total - start) for start in range(0, total, size)]


def test_every_chunk_size(model, ids, whole):
    """Chunks of 1 … 12: cuts at every residue modulo 4, one token at a time, several at once."""
    sizes = range(1, 13)
    got, _ = feed(model, [ids] * 12, [chunks(TOKENS, size) for size in sizes], width=12)
    for size, logits in zip(sizes, got, strict=True):
        np.testing.assert_allclose(logits, whole, atol=TOLERANCE, err_msg=f"chunks of {size}")


FIRST_CUTS = (1, 2, 3, 4, 5, 126, 127, 128, 129, 130, 255, 256, 257, 258)


def test_cuts_around_multiples_of_128(model, ids, whole):
    """One cut at each of these places, then the rest."""
    schedules = [[cut, *chunks(TOKENS - cut, 260)] for cut in FIRST_CUTS]
    got, _ = feed(model, [ids] * len(FIRST_CUTS), schedules, width=260)
    for cut, logits in zip(FIRST_CUTS, got, strict=True):
        np.testing.assert_allclose(logits, whole, atol=TOLERANCE, err_msg=f"cut at {cut}")


LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 127, 128, 129, 258, 0)


def test_batch_of_different_lengths(model, ids, whole):
    """Every sequence of a ragged batch has the logits it has alone; an empty one stays empty."""
    got, cache = feed(model, [ids] * len(LENGTHS), [[n] for n in LENGTHS], width=260)
    for length, logits in zip(LENGTHS, got, strict=True):
        np.testing.assert_allclose(logits, whole[:length], atol=TOLERANCE, err_msg=f"{length}")
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    # And they go on from there, each at its own phase.
    rest = [[min(12, TOKENS - n)] for n in LENGTHS]
    got, _ = feed(model, [ids[n:] for n in LENGTHS], rest, width=12, cache=repeat(cache))
    for length, logits in zip(LENGTHS, got, strict=True):
        want = whole[length : length + 12]
        np.testing.assert_allclose(logits, want, atol=TOLERANCE, err_msg=f"after {length}")


def repeat(cache):
    """Returns a copy, so that a donating call leaves the original alone."""
    return cache.take(np.arange(cache.batch))


def test_different_sequences_in_one_batch(model, ids, whole):
    """Neighbours do not leak: other sequences in the other slots."""
    random = np.random.RandomState(8)
    others = [random.randint(0, 256, TOKENS) for _ in range(11)]
    schedule = chunks(24, 12)
    got, _ = feed(model, [ids[:24], *others], [schedule] * 12, width=12)
    np.testing.assert_allclose(got[0], whole[:24], atol=TOLERANCE)
    assert np.abs(got[1] - got[0]).max() > 0.1


def test_last_logits(model, ids, whole):
    """`logits="last"` is the row of the last real token."""
    lengths = np.array([1, 3, 12, 7, 2, 4, 5, 6, 8, 9, 10, 11])
    tokens = np.tile(ids[:12], (12, 1))
    last, _ = model.extend(tokens, model.init_cache(12, CAPACITY), lengths=lengths, logits="last")
    np.testing.assert_allclose(last, whole[lengths - 1], atol=TOLERANCE)


def test_reused_slot_equals_fresh(model, ids):
    """After a reset a slot remembers nothing, bit for bit, even of 1 … 11 tokens."""
    schedule = [chunks(60, 12)] * 12
    fresh, _ = feed(model, [ids] * 12, schedule, width=12)
    random = np.random.RandomState(9)
    past = [random.randint(0, 256, 200) for _ in range(12)]
    past_schedule = [[n] for n in range(1, 12)] + [[12] * 16]
    _, cache = feed(model, past, past_schedule, width=12)
    cache = cache.reset(np.ones(12, bool))
    reused, _ = feed(model, [ids] * 12, schedule, width=12, cache=cache)
    for slot in range(12):
        np.testing.assert_array_equal(reused[slot], fresh[slot], err_msg=f"slot {slot}")


def test_reset_leaves_other_slots(model, ids, whole):
    """Resetting one slot does not touch its neighbours."""
    _, cache = feed(model, [ids] * 12, [[12]] * 12, width=12)
    cache = cache.reset(np.arange(12) == 4)
    starts = [0 if slot == 4 else 12 for slot in range(12)]
    got, _ = feed(model, [ids[s:] for s in starts], [[12]] * 12, width=12, cache=cache)
    for slot, start in enumerate(starts):
        np.testing.assert_allclose(got[slot], whole[start : start + 12], atol=TOLERANCE)


def test_unfinished_windows_are_never_seen(model, ids):
    """Rows that belong to no token so far may hold anything: results are equal bit for bit."""
    schedule = [chunks(150, 12)] * 12
    clean, _ = feed(model, [ids] * 12, schedule, width=12)
    cache = model.init_cache(12, CAPACITY)

    def poison(x):
        return x + 1000 if jnp.issubdtype(x.dtype, jnp.floating) else x

    poisoned = jax.tree.map(poison, cache)
    got, _ = feed(model, [ids] * 12, schedule, width=12, cache=poisoned)
    np.testing.assert_array_equal(got[0], clean[0])


@pytest.mark.parametrize("changed", [1, 3, 4, 5, 127, 128, 131, 255, 256, 299])
def test_future_tokens_change_nothing(model, ids, whole, changed):
    """A change of token t leaves all logits before t alone, and changes those at t."""
    other = ids.copy()
    other[changed] = (other[changed] + 100) % 256
    got = np.asarray(model(other[None]))[0]
    np.testing.assert_allclose(got[:changed], whole[:changed], atol=TOLERANCE)
    assert np.abs(got[changed] - whole[changed]).max() > 1e-3


def test_fork(model, ids, whole):
    """A forked document goes on in every copy; the original stays usable."""
    _, cache = feed(model, [ids] * 12, [[n] for n in range(1, 13)], width=12)
    forked = cache.take(np.full(12, 6))  # slot 6 holds seven tokens
    got, _ = feed(model, [ids[7:]] * 12, [[12]] * 12, width=12, cache=forked)
    for logits in got:
        np.testing.assert_allclose(logits, whole[7:19], atol=TOLERANCE)
    got, _ = feed(model, [ids[n:] for n in range(1, 13)], [[12]] * 12, width=12, cache=cache)
    np.testing.assert_allclose(got[2], whole[3:15], atol=TOLERANCE)


def test_selection_matters_here(model, ids, whole):
    """The tiny model's selection truncates: selecting everything gives other logits."""
    config = dataclasses.replace(model.config, index_topk=4096)
    everything = v4jax.load("tiny", seed=11)
    leaves = jax.tree.leaves(model)
    other = rebuild_with(config, everything.numerics, leaves)
    logits = np.asarray(other(ids[None]))[0]
    seen = model.config.index_topk * 4
    np.testing.assert_allclose(logits[: seen - 1], whole[: seen - 1], atol=TOLERANCE)
    assert np.abs(logits[seen + 40 :] - whole[seen + 40 :]).max() > 1e-2


def rebuild_with(config, numerics, leaves):
    """Returns a model of another configuration with the given parameters."""
    abstract = abstract_transformer(config, numerics, storage="float32")
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
