"""Sampling: what each option keeps, and that nothing around a sequence changes its tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.inference.request import SamplingOptions
from v4jax.inference.sampling import NOT_FINITE, init_sampler, sample

EOS = 0
PROBABILITIES = np.array([0.02, 0.4, 0.3, 0.15, 0.08, 0.05])  # of tokens 0 … 5; 0 is EOS
LOGITS = jnp.log(jnp.array(PROBABILITIES, jnp.float32))

KEPT = {
    "everything": (SamplingOptions(temperature=1.0), {0, 1, 2, 3, 4, 5}),
    "greedy": (SamplingOptions(top_p=0.9), {1}),
    "hardly warm": (SamplingOptions(temperature=1e-40), {1}),
    "top-k 1": (SamplingOptions(temperature=1.0, top_k=1), {1}),
    "top-k 3": (SamplingOptions(temperature=1.0, top_k=3), {1, 2, 3}),
    "top-k beyond the vocabulary": (SamplingOptions(temperature=1.0, top_k=99), {0, 1, 2, 3, 4, 5}),
    "top-p below the first": (SamplingOptions(temperature=1.0, top_p=0.1), {1}),
    "top-p reached by two": (SamplingOptions(temperature=1.0, top_p=0.69), {1, 2}),
    "top-p needs a third": (SamplingOptions(temperature=1.0, top_p=0.71), {1, 2, 3}),
    "top-p of what top-k kept": (SamplingOptions(temperature=1.0, top_k=2, top_p=0.5), {1}),
}


def draw_many(options: SamplingOptions, count: int) -> np.ndarray:
    """Returns tokens drawn with `count` seeds, side by side."""
    state = init_sampler([options.replace(seed=seed) for seed in range(count)], count)
    tokens, _, _ = sample(jnp.tile(LOGITS, (count, 1)), state, end_tokens=(EOS,))
    return np.asarray(tokens)


@pytest.mark.parametrize(("options", "kept"), KEPT.values(), ids=KEPT.keys())
def test_tokens_kept(options, kept):
    assert set(draw_many(options, 1000).tolist()) == kept


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(temperature):
    count = 4000
    tokens = draw_many(SamplingOptions(temperature=temperature), count)
    expected = PROBABILITIES ** (1 / temperature)
    expected /= expected.sum()
    frequencies = np.bincount(tokens, minlength=len(expected)) / count
    # Four standard deviations of a binomial frequency.
    np.testing.assert_array_less(
        np.abs(frequencies - expected), 4 * np.sqrt(expected * (1 - expected) / count) + 1e-9
    )


def write(options: list[SamplingOptions], slots: int, steps: int) -> np.ndarray:
    """Returns the tokens of some steps over fixed logits, one column per slot."""
    state, rows = init_sampler(options, slots), []
    for _ in range(steps):
        tokens, _, state = sample(jnp.tile(LOGITS, (slots, 1)), state, end_tokens=(-1,))
        rows.append(np.asarray(tokens))
    return np.stack(rows)


def test_tokens_do_not_depend_on_batch_or_slot():
    mine = SamplingOptions(temperature=1.0, seed=7, top_p=0.95)
    other = SamplingOptions(temperature=2.0, seed=8, top_k=2)
    alone = write([mine], 1, 12)[:, 0]
    assert len(set(alone.tolist())) > 1
    np.testing.assert_array_equal(write([mine, other, other], 3, 12)[:, 0], alone)
    np.testing.assert_array_equal(write([other, other, mine], 4, 12)[:, 2], alone)


def test_another_seed_and_another_step_give_other_noise():
    rows = write([SamplingOptions(temperature=1.0, seed=s) for s in (0, 1)], 2, 40)
    assert not np.array_equal(rows[:, 0], rows[:, 1])
    assert not np.array_equal(rows[:20, 0], rows[20:, 0])


def test_rows_that_are_not_finite_have_no_token():
    rows = jnp.stack([LOGITS, LOGITS.at[3].set(jnp.nan), LOGITS.at[0].set(jnp.inf), LOGITS])
    for options in (SamplingOptions(), SamplingOptions(temperature=1.0)):
        tokens, active, state = sample(rows, init_sampler([options] * 4, 4), end_tokens=(EOS,))
        assert (tokens == NOT_FINITE).tolist() == [False, True, True, False]
        assert active.tolist() == [True, False, False, True]
        assert state.remaining.tolist() == [255, 0, 0, 255]


def test_ids_without_text_are_never_chosen():
    warm, greedy = SamplingOptions(temperature=1.0), SamplingOptions()
    rows = jnp.tile(LOGITS.at[4].set(9.0).at[5].set(jnp.nan), (64, 1))
    state = init_sampler([*[warm.replace(seed=i) for i in range(63)], greedy], 64)
    tokens, _, _ = sample(rows, state, end_tokens=(EOS,), choices=4)
    assert set(tokens.tolist()) == {0, 1, 2, 3} and int(tokens[-1]) == 1


def test_sequences_end_by_eos_or_length():
    options = [SamplingOptions(max_new_tokens=1), SamplingOptions(max_new_tokens=2)]
    state = init_sampler(options, 3)
    tokens, active, state = sample(jnp.tile(LOGITS, (3, 1)), state, end_tokens=(9,))
    assert active.tolist() == [False, True, False]
    _, active, _ = sample(jnp.tile(LOGITS, (3, 1)), state, end_tokens=(5, int(tokens[1])))
    assert active.tolist() == [False, False, False]
