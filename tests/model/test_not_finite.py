"""A number that is not finite shows in the logits, wherever it arises and whatever hides it.

A selection of entries or experts by NaN is one of plausible ids, FP4 has no code for NaN, and a
window forgets the token that had it.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import CSA, IDS, make_config, make_model, on_mesh

from v4jax.model.weights import read_weights, write_weights

FORGETFUL = make_config("window window", sliding_window=8)
TOKENS = jnp.asarray(IDS[:2, :64])


def spoil(model, name: str, index, value: float):
    """Returns the model with one number of one weight changed."""
    weight = (read_weights(model) | read_weights(model, buffers=True))[name]
    return write_weights(model, {name: jnp.asarray(weight).at[index].set(value)})


def read(model, tokens=TOKENS, lengths=(64, 20)) -> np.ndarray:
    """Returns which sequences have finite logits after one chunk."""
    cache = model.init_cache(len(tokens), 128)
    logits_bv, _ = model.extend(tokens, cache, jnp.asarray(lengths), logits="last")
    return np.isfinite(np.asarray(logits_bv)).all(axis=-1)


FIRST, LAYER = (0, 0), "stack.period.0"  # the first channel or row of the first layer
WEIGHTS = {
    "a norm": (f"{LAYER}.attention_norm.weight", np.nan),
    "the indexer's keys": (f"{LAYER}.attention.indexer.compressor.norm.weight", np.nan),
    "keys that overflow a score": (f"{LAYER}.attention.indexer.compressor.norm.weight", 1e30),
    "the indexer's queries": (f"{LAYER}.attention.indexer.query_up", np.inf),
    "its heads' weights": (f"{LAYER}.attention.indexer.head_weights", np.nan),
    "the router's bias": (f"{LAYER}.moe.router.bias", np.nan),
}


@pytest.mark.parametrize("name, value", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_weights_that_are_no_numbers_show(name, value):
    assert not read(spoil(make_model(CSA), name, FIRST, value)).any()


def test_numbers_show_nothing():
    assert read(make_model(CSA)).all() and read(make_model(FORGETFUL)).all()


def test_fp4_does_not_hide_a_key():
    name = f"{LAYER}.attention.indexer.compressor.norm.weight"
    model = make_model(CSA, "released", stored_as="released")
    assert read(model).all()
    assert not read(spoil(model, name, FIRST, np.nan)).any()


def test_a_token_that_windows_forget_shows_in_its_own_sequence():
    """The fourth token's id is in the first sequence alone, 60 tokens before its last one."""
    token = next(t for t in IDS[0, 3:] if t not in IDS[1])
    tokens = np.array(TOKENS)
    tokens[0, 3], tokens[0, 4:] = token, np.where(tokens[0, 4:] == token, 0, tokens[0, 4:])
    model = spoil(make_model(FORGETFUL), "embed", (int(token), 0), np.nan)
    assert read(model, tokens).tolist() == [False, True]


def test_shards_of_a_sequence_tell_each_other():
    """The spoilt token is on the first device of the sequence, the last one on another."""
    token = next(t for t in IDS[0] if t not in IDS[1, 64:])
    tokens = np.concatenate([IDS[:1], IDS[1:2]])
    tokens[1] = np.where(tokens[1] == token, 0, tokens[1])
    tokens[0, 0], tokens[0, 1:] = token, np.where(tokens[0, 1:] == token, 0, tokens[0, 1:])
    model = on_mesh(spoil(make_model(FORGETFUL), "embed", (int(token), 0), np.nan), context=8)
    cache = model.init_cache(2, 128)
    logits_bv, _ = model.extend(jnp.asarray(tokens), cache, logits="last")
    assert np.isfinite(np.asarray(logits_bv)).all(axis=-1).tolist() == [False, True]
