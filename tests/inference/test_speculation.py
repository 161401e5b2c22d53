"""Speculation: what is written has the model's own distribution, and greedily its own tokens."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import DRAFT, make_config, make_model, on_mesh

from v4jax.inference.request import SamplingOptions
from v4jax.inference.sampling import Sampled, init_sampler, take_block
from v4jax.inference.steps import decode, prefill
from v4jax.model.speculation import Drafts, Verified, accept_by_rejection

NEVER = (-1,)  # no token ends an answer
P = np.array([[0.4, 0.3, 0.2, 0.1, 0.0], [0.05, 0.15, 0.3, 0.2, 0.3], [0.2, 0.2, 0.2, 0.2, 0.2]])
Q = np.array([[0.1, 0.2, 0.3, 0.3, 0.1], [0.3, 0.3, 0.3, 0.1, 0.0]])


def measure(cells: np.ndarray, expected: np.ndarray) -> float:
    """Returns how far counts of cells are from a distribution, in deviations of chi-square.

    Cells that are expected fewer than five times count as one.
    """
    expected = expected.ravel() * cells.size
    seen = np.bincount(cells, minlength=expected.size)
    assert not seen[expected == 0].any(), "a token that is impossible"
    rare = expected < 5
    pairs = [*zip(seen[~rare], expected[~rare], strict=True)]
    pairs += [(seen[rare].sum(), expected[rare].sum())] if expected[rare].sum() >= 5 else []
    freedom = len(pairs) - 1
    distance = sum((n - mean) ** 2 / mean for n, mean in pairs)
    return (distance - freedom) / np.sqrt(2 * freedom)


# Counts of the right distribution exceed it once in some 30,000 seeds (chi-square, normal tail with
# room for few degrees of freedom); the wrong ones below are tens of deviations away.
FAR = 5.0


def test_rejection_gives_the_wanted_distribution():
    """Two drafts, one or none of them counted; the same numbers without rejection are far off."""
    n, keys = 20_000, jax.random.split(jax.random.key(3, impl="threefry2x32"), 3)
    q, p = (jnp.broadcast_to(x, (n, *x.shape)).astype(jnp.float32) for x in (Q, P))
    tokens = jax.random.categorical(keys[0], jnp.log(q))
    uniform = jax.random.uniform(keys[1], (n, 2))
    for count in (2, 1, 0):
        accepted, left = accept_by_rejection(tokens, q, p, uniform, jnp.full(n, count))
        following = np.asarray(jax.random.categorical(keys[2], jnp.log(left)))
        accepted = np.asarray(accepted)
        assert set(accepted.tolist()) == set(range(count + 1))
        first = np.where(accepted > 0, tokens[:, 0], following)
        assert measure(first, P[0]) < FAR
        both = accepted > 0  # then there is a second token: a draft or the one after
        if count:
            second = np.where(accepted > 1, tokens[:, 1], following)[both]
            assert measure(second, P[1]) < FAR
            assert measure(first[both] * 5 + second, np.outer(_accepted_first(), P[1])) < FAR
            assert measure(np.asarray(tokens[:, 0]), Q[0]) < FAR < 20 < measure_from(tokens[:, 0])


def _accepted_first() -> np.ndarray:
    kept = np.minimum(P[0], Q[0])
    return kept / kept.sum()


def measure_from(tokens) -> float:
    """Returns how far the drafts themselves are from P; they may be what P excludes."""
    tokens = np.asarray(tokens)
    return measure(tokens[tokens < 4], P[0][:4])


OPTIONS = {
    "as they are": SamplingOptions(temperature=1.0),
    "warmer": SamplingOptions(temperature=1.7),
    "top-p": SamplingOptions(temperature=1.0, top_p=0.75),
    "top-k": SamplingOptions(temperature=0.8, top_k=3),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_blocks_have_the_distribution_that_sampling_has(options):
    """Drafts and target rows are fixed: token i of an answer has the distribution of row i."""
    n = 8000
    state = init_sampler([options.replace(seed=s, max_new_tokens=9) for s in range(n)], n)
    choice = Sampled(state)

    @jax.jit
    def write(choice):
        q, p = (jnp.broadcast_to(jnp.log(x + 1e-9), (n, *x.shape)) for x in (Q, P))
        tokens = jnp.stack([choice.choose(q[:, row], row) for row in range(2)], axis=1)
        drafts = Drafts(tokens, q, jnp.zeros((n, 2)))
        return drafts, Verified(p, *choice.accept(drafts, p, jnp.full(n, 2)))

    tokens, counts, *_ = take_block(*write(choice), state, end_tokens=NEVER)
    tokens, counts = np.asarray(tokens), np.asarray(counts)
    assert set(counts.tolist()) == {1, 2, 3}
    for row in range(3):
        assert measure(tokens[counts > row, row], _sampled(P[row], options)) < FAR


def _sampled(p: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """Returns the distribution of sampling from p; ties are kept together."""
    p = np.where(p > 0, p, 1e-9) ** (1 / options.temperature)
    order = np.argsort(-p, kind="stable")
    if options.top_k:
        p = np.where(p >= p[order[options.top_k - 1]], p, 0)
    p = p / p.sum()
    before = np.cumsum(p[order]) - p[order]
    last = p[order][before < options.top_p][-1]
    p = np.where(p >= last, p, 0)
    return p / p.sum()


def test_a_models_answers_have_its_distribution():
    """Tokens 2 and 3 of answers, of which drafts are a part, against what the logits say."""
    config = make_config("window", draft=DRAFT, vocab_size=8, bos_token_id=0, eos_token_id=1)
    model, prompt, slots = make_model(config), [5, 3, 6, 2], 1024
    logits, cache = prefill(model, [prompt], model.init_cache(1, 64), chunk_tokens=4)
    pairs, lengths = [], []
    for begin in range(0, 4096, slots):
        options = [
            SamplingOptions(temperature=1.0, seed=begin + i, max_new_tokens=5) for i in range(slots)
        ]
        blocks = decode(
            *(model, jnp.repeat(logits, slots, axis=0), cache.repeat(slots), options),
            end_tokens=NEVER,
            drafts=3,
        )
        written = _join(blocks, lengths)
        pairs += [tokens[1] * 8 + tokens[2] for tokens in written]
    assert {1, 2, 3, 4} == set(lengths), "every number of drafts is accepted"

    ids = np.array([[a, b] for a in range(8) for b in range(8)])
    whole = np.asarray(model(jnp.asarray(np.concatenate([np.tile(prompt, (64, 1)), ids], 1))))
    p = np.exp(whole - np.logaddexp.reduce(whole, axis=-1, keepdims=True)).reshape(8, 8, 6, 8)
    first, second, third = p[0, 0, 3], p[:, 0, 4], p[:, :, 5]
    exact = np.einsum("a,ab,abc->bc", first, second, third)
    assert measure(np.array(pairs), exact) < FAR
    independent = np.outer(exact.sum(1), exact.sum(0))
    assert measure(np.array(pairs), independent) > 2 * FAR, "the test could not tell"


def _join(blocks, lengths: list[int]) -> list[list[int]]:
    """Returns the whole answers; records the lengths of what passes after the first wrote."""
    steps = [*blocks]
    lengths += [len(tokens) for step in steps[1:] for tokens in step if tokens]
    return [[*itertools.chain.from_iterable(parts)] for parts in zip(*steps, strict=True)]


class Teacher:
    """A model whose drafts are its own logits, some of them spoiled: accepted lengths differ."""

    def __init__(self, model):
        self._model, self.layout, self.steps = model, model.layout, 0
        self.init_cache = model.init_cache

    def flatten(self):
        flat = self._model.flatten()
        self.extend, self.verify = flat.extend, flat.verify
        return self

    def draft(self, last, cache, choice, *, count, trusted):
        """Drafts by decoding; the row at which a slot is spoiled goes through all of them."""
        tokens, logits = [], []
        for row in range(count):
            scores, cache = self.extend(last[:, None], cache, logits="last", trusted=True)
            spoiled = (np.arange(len(last)) + self.steps) % (count + 1) == row
            logits.append(jnp.where(spoiled[:, None], -scores, scores))
            last = choice.choose(logits[-1], row)
            tokens.append(last)
        self.steps += 1
        confidence = jnp.zeros((len(last), count))
        return Drafts(jnp.stack(tokens, 1), jnp.stack(logits, 1), confidence)


def write(model, drafts: int, *, slots: int = 4) -> tuple[list[list[int]], set[int]]:
    """Returns greedy answers to prompts of several lengths, and the lengths of their blocks."""
    prompts = [[(7 * i + 3 * j) % 250 for i in range(9 + 59 * j)] for j in range(3)]
    options = [SamplingOptions(max_new_tokens=12 - j) for j in range(3)]
    logits, cache = prefill(model, prompts, model.init_cache(slots, 256), chunk_tokens=64)
    lengths: list[int] = []
    steps = decode(model, logits, cache, options, end_tokens=(10**6,), drafts=drafts)
    return _join(steps, lengths), set(lengths)


@functools.cache
def deep_model(**kind):
    return make_model(make_config("csa hca", **kind or {"draft": DRAFT}))


def test_greedy_answers_are_those_without_drafts():
    """Windows that fill, entries that complete inside a block, and slots that differ."""
    expected, _ = write(deep_model(), 0)
    assert len({tuple(answer) for answer in expected}) == 3
    assert write(deep_model(), 3)[0] == expected
    answers, lengths = write(Teacher(deep_model()), 3)
    assert answers == expected
    assert lengths == {1, 2, 3, 4}


def test_greedy_answers_with_a_serial_block():
    model = deep_model(mtp=True)
    expected, _ = write(model, 0)
    assert write(model, 1)[0] == expected
    answers, lengths = write(Teacher(model), 1)
    assert answers == expected and lengths == {1, 2}


def test_greedy_answers_on_a_mesh():
    model = on_mesh(deep_model(), data=2, expert=2, context=2)
    assert write(Teacher(model), 3)[0] == write(deep_model(), 0)[0]
    assert write(model, 2)[0] == write(deep_model(), 0)[0]


class Broken(Teacher):
    """A model whose draft module computes no numbers."""

    def draft(self, last, cache, choice, *, count, trusted):
        """Drafts token 0, from NaN."""
        shape = (len(last), count)
        logits = jnp.full((*shape, self._model.config.vocab_size), jnp.nan)
        return Drafts(jnp.zeros(shape, jnp.int32), logits, jnp.zeros(shape))


def test_drafts_that_are_not_numbers_harm_no_answer():
    assert write(Broken(deep_model()), 3)[0] == write(deep_model(), 0)[0]
