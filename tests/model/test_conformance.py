"""What every way of feeding a sequence must have in common, whatever the calls.

The whole sequence in one call is the truth (`test_golden_logits.py` ties it to the published
implementation). Here: any chunking, any batch, any slot, any past of the slot give the same logits.
One batch holds many schedules, one per slot, so that few shapes are compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from v4jax.model import abstract_transformer

CONFIG = small_models.make_config("csa hca csa hca")
TOKENS = 300  # two windows of 128 and a rest that is no multiple of 4
CAPACITY = 320
SLOTS = 14
NARROW, WIDE = 12, 260  # the two shapes of all calls: [SLOTS, NARROW] and [SLOTS, WIDE]

# Logits have deviation near 1. Chunkings differ in the order of float32 sums only: the largest
# difference seen is 2.1e-5. The bound is the one promised towards the published code.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return small_models.make_model(CONFIG)


@pytest.fixture(scope="module")
def ids():
    return np.random.RandomState(3).randint(0, 256, TOKENS)


@pytest.fixture(scope="module")
def whole(model, ids):
    """Logits [t, v] of the sequence in one call."""
    return np.asarray(model(ids[None]))[0]


def feed(model, sequences, schedules, cache=None):
    """Feeds every slot its sequence by its own schedule; returns each slot's logits, and the cache.

    A schedule is a list of chunk lengths. Slots without one stay empty.
    """
    cache = model.init_cache(SLOTS, CAPACITY) if cache is None else cache
    width = WIDE if max(map(max, schedules)) > NARROW else NARROW
    schedules = [*schedules, *[[]] * (SLOTS - len(schedules))]
    done, rows = np.zeros(SLOTS, int), [[np.zeros((0, model.config.vocab_size))]] * SLOTS
    for step in range(max(map(len, schedules))):
        lengths = np.array([s[step] if step < len(s) else 0 for s in schedules])
        tokens = np.full((SLOTS, width), 7)
        for slot, sequence in enumerate(sequences):
            piece = sequence[done[slot] : done[slot] + lengths[slot]]
            tokens[slot, : len(piece)] = piece
        logits, cache = model.extend(tokens, cache, lengths=lengths, donate=True)
        logits = np.asarray(logits)
        rows = [[*row, logits[slot, : lengths[slot]]] for slot, row in enumerate(rows)]
        done += lengths
    return [np.concatenate(row) for row in rows], cache


def chunks(total, size):
    """Returns chunk lengths of `size` that add up to `total`."""
    return [min(size, total - start) for start in range(0, total, size)]


def assert_rows(got, whole, starts, what):
    """Compares every slot's logits with the rows of the whole sequence from its start on."""
    for logits, start, name in zip(got, starts, what, strict=False):
        wanted = whole[start : start + len(logits)]
        np.testing.assert_allclose(logits, wanted, atol=TOLERANCE, err_msg=f"{name}")


def test_every_chunk_size(model, ids, whole):
    """Chunks of 1 … 12: cuts at every residue modulo 4, one token at a time, several at once."""
    sizes = range(1, 13)
    got, _ = feed(model, [ids] * 12, [chunks(TOKENS, size) for size in sizes])
    assert all(len(logits) == TOKENS for logits in got[:12])
    assert_rows(got, whole, [0] * 12, sizes)


FIRST_CUTS = (1, 2, 3, 4, 5, 126, 127, 128, 129, 130, 255, 256, 257, 258)


def test_cuts_around_multiples_of_128(model, ids, whole):
    """One cut at each of these places, then the rest."""
    schedules = [[cut, *chunks(TOKENS - cut, WIDE)] for cut in FIRST_CUTS]
    got, _ = feed(model, [ids] * SLOTS, schedules)
    assert all(len(logits) == TOKENS for logits in got)
    assert_rows(got, whole, [0] * SLOTS, FIRST_CUTS)


LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 127, 128, 129, 258, 0)


def test_batch_of_different_lengths(model, ids, whole):
    """Every sequence of a ragged batch has the logits it has alone; an empty one stays empty."""
    got, cache = feed(model, [ids] * SLOTS, [[n] for n in LENGTHS])
    assert_rows(got, whole, [0] * SLOTS, LENGTHS)
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    # And they go on from there, each at its own phase; a forked document in every copy.
    forked = cache.take(np.full(SLOTS, 6))  # slot 6 holds seven tokens
    rest = [[min(NARROW, TOKENS - n)] for n in LENGTHS]
    got, _ = feed(model, [ids[n:] for n in LENGTHS], rest, cache=cache)
    assert_rows(got, whole, LENGTHS, LENGTHS)
    got, _ = feed(model, [ids[7:]] * SLOTS, [[12]] * SLOTS, cache=forked)
    assert_rows(got, whole, [7] * SLOTS, ["fork"] * SLOTS)


def test_different_sequences_in_one_batch(model, ids, whole):
    """Neighbours do not leak: other sequences in the other slots."""
    random = np.random.RandomState(8)
    others = [random.randint(0, 256, TOKENS) for _ in range(SLOTS - 1)]
    got, _ = feed(model, [ids[:24], *others], [chunks(24, 12)] * SLOTS)
    assert_rows(got[:1], whole, [0], ["first"])
    assert np.abs(got[1] - got[0]).max() > 0.1


def test_last_logits(model, ids, whole):
    """`logits="last"` is the row of the last real token."""
    lengths = np.array([1, 3, 12, 7, 2, 4, 5, 6, 8, 9, 10, 11])
    tokens = np.tile(ids[:12], (12, 1))
    last, _ = model.extend(tokens, model.init_cache(12, CAPACITY), lengths=lengths, logits="last")
    np.testing.assert_allclose(last, whole[lengths - 1], atol=TOLERANCE)


def test_reused_slot_equals_fresh(model, ids):
    """After a reset a slot remembers nothing, bit for bit, even of 1 … 11 tokens."""
    schedule = [chunks(60, 12)] * SLOTS
    fresh, _ = feed(model, [ids] * SLOTS, schedule)
    random = np.random.RandomState(9)
    past = [random.randint(0, 256, 200) for _ in range(SLOTS)]
    _, cache = feed(model, past, [[1 + n % 12] for n in range(SLOTS - 1)] + [[12] * 16])
    reused, _ = feed(model, [ids] * SLOTS, schedule, cache=cache.reset(np.ones(SLOTS, bool)))
    for slot in range(SLOTS):
        np.testing.assert_array_equal(reused[slot], fresh[slot], err_msg=f"slot {slot}")


def test_reset_leaves_other_slots(model, ids, whole):
    """Resetting one slot does not touch its neighbours."""
    _, cache = feed(model, [ids] * SLOTS, [[12]] * SLOTS)
    starts = [0 if slot == 4 else 12 for slot in range(SLOTS)]
    cache = cache.reset(np.arange(SLOTS) == 4)
    got, _ = feed(model, [ids[s:] for s in starts], [[12]] * SLOTS, cache=cache)
    assert_rows(got, whole, starts, range(SLOTS))


def test_unfinished_windows_are_never_seen(model, ids):
    """Rows that belong to no token so far may hold anything: results are equal bit for bit."""
    schedule = [chunks(150, 12)] * SLOTS
    clean, _ = feed(model, [ids] * SLOTS, schedule)

    def poison(x):
        return x + 1000 if jnp.issubdtype(x.dtype, jnp.floating) else x

    poisoned = jax.tree.map(poison, model.init_cache(SLOTS, CAPACITY))
    got, _ = feed(model, [ids] * SLOTS, schedule, cache=poisoned)
    np.testing.assert_array_equal(got[0], clean[0])


@pytest.mark.parametrize("changed", [1, 3, 4, 5, 127, 128, 131, 255, 256, 299])
def test_future_tokens_change_nothing(model, ids, whole, changed):
    """A change of token t leaves all logits before t alone, and changes those at t."""
    other = ids.copy()
    other[changed] = (other[changed] + 100) % 256
    got = np.asarray(model(other[None]))[0]
    np.testing.assert_allclose(got[:changed], whole[:changed], atol=TOLERANCE)
    assert np.abs(got[changed] - whole[changed]).max() > 1e-3


def test_selection_matters_here(model, ids, whole):
    """The model's selection truncates: selecting everything gives other logits."""
    config = dataclasses.replace(CONFIG, index_topk=4096)
    abstract = abstract_transformer(config, model.numerics, storage="float32", target=model.target)
    other = jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(model))
    logits = np.asarray(other(ids[None]))[0]
    seen = CONFIG.index_topk * 4
    np.testing.assert_allclose(logits[: seen - 1], whole[: seen - 1], atol=TOLERANCE)
    assert np.abs(logits[seen + 40 :] - whole[seen + 40 :]).max() > 1e-2
