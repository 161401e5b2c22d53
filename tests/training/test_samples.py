"""Samples: where they begin, and that they are the greedy answers of the same model."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from small_models import PAIRS, make_model, on_mesh

from v4jax.config.run import OptimizerConfig
from v4jax.model.weights import read_weights
from v4jax.tokenizer import ByteTokenizer
from v4jax.training.batch import PADDING, Batch
from v4jax.training.optimizer import build_optimizer
from v4jax.training.samples import Span, find_spans, predict, write_samples
from v4jax.training.state import compile_forward, init_state, split_model

T = 512
TOKENIZER = ByteTokenizer()

# Each document as its first token's weight, how many tokens have it, and so on.
PLACES = {
    "an answer behind a prompt": ([[(0, 100), (1, 20), (0, 30)]], (100, 108, 150)),
    "the first of two answers": ([[(0, 10), (1, 5), (0, 10), (1, 5)]], (10, 18, 30)),
    "text that counts less": ([[(0, 1), (0.01, 99), (1, 6)]], (100, 108, 106)),
    "plain text: its middle": ([[(0, 1), (1, 199)]], (100, 108, 200)),
    "only the first document": ([[(0, 50), (1, 50)], [(0, 10), (1, 10)]], (50, 58, 100)),
    "an answer at the end of the row": ([[(0, T - 3), (1, 3)]], (T - 3, T, T)),
    "one token: nothing to go on from": ([[(0, 1)]], None),
    "a row of padding": ([], None),
}


def pack(documents) -> Batch:
    """Returns a row of documents, each from a multiple of 128 tokens on."""
    weights, begin = np.zeros((1, T), np.float32), np.full((1, T), PADDING, np.int32)
    start = 0
    for document in documents:
        values = np.concatenate([np.full(count, weight) for weight, count in document])
        weights[0, start : start + values.size] = values
        begin[0, start : start + values.size] = start
        start += -(-values.size // 128) * 128
    tokens = np.random.RandomState(0).randint(0, 256, (1, T)).astype(np.int32)
    return Batch(tokens, weights, begin)


@pytest.mark.parametrize("case", PLACES.values(), ids=PLACES.keys())
def test_place(case):
    documents, expected = case
    places = find_spans(pack(documents), rows=4, tokens=8)
    assert places == ([Span(0, 0, *expected)] if expected else [])


def test_at_most_a_row_each():
    tokens = np.zeros((3, 128), np.int32)
    batch = Batch(tokens, np.ones(tokens.shape, np.float32))
    assert [place.row for place in find_spans(batch, rows=2, tokens=8)] == [0, 1]


@functools.cache
def batch():
    """Returns two packed rows; the first documents end within the tokens that are written."""
    rows = [pack([[(0, 130), (1, 3)], [(0, 60), (1, 60)]]), pack([[(0, 1), (1, 299)]])]
    rows[1].tokens[:] = np.random.RandomState(1).randint(0, 256, (1, T))
    return Batch(
        *(np.concatenate([getattr(row, f) for row in rows]) for f in ("tokens", "weights", "begin"))
    )


@functools.cache
def written(sizes):
    made = on_mesh(make_model(PAIRS), "train", **dict(sizes)) if sizes else make_model(PAIRS)
    optimizer = build_optimizer(OptimizerConfig(kind="adamw", warmup_steps=1), PAIRS, 10)
    frozen, weights, biases = split_model(made, read_weights(made))
    state = init_state(frozen, weights, biases, optimizer)
    options = {"samples": 2, "tokens": 6, "layout": made.layout}
    return write_samples(compile_forward(frozen, predict), state, batch(), TOKENIZER, **options)


def test_samples_are_greedy_answers():
    """As `extend` writes them, from the document alone."""
    made = make_model(PAIRS)
    before = batch().tokens.copy()
    for sample, (row, start) in zip(written(()), [(0, 130), (1, 150)], strict=True):
        prompt = batch().tokens[row, :start]
        assert sample["prompt"] == TOKENIZER.decode(prompt[-80:].tolist())
        logits, cache = made.extend(prompt[None], made.init_cache(1, 512), logits="last")
        tokens = []
        for _ in range(6):
            tokens.append(int(jnp.argmax(logits[0])))
            if tokens[-1] == TOKENIZER.eos_id:
                tokens.pop()
                break
            logits, cache = made.extend(np.array([[tokens[-1]]]), cache, logits="last")
        assert sample["written"] == TOKENIZER.decode(tokens)
        assert sample["written"] != sample["expected"]
    assert written(())[0]["expected"] == TOKENIZER.decode(batch().tokens[0, 130:133].tolist())
    np.testing.assert_array_equal(batch().tokens, before)  # what is held out stays as it is


@pytest.mark.slow
def test_samples_on_a_mesh():
    assert written((("data", 2), ("context", 2), ("tensor", 2))) == written(())
