"""Samples: where they begin, and that they are the greedy answers of the same model."""

import functools

import jax
import numpy as np
import optax
import pytest
from small_models import make_config, make_model, on_mesh

from v4jax.model.weights import read_weights
from v4jax.tokenizer import ByteTokenizer
from v4jax.training.batch import PADDING, Batch
from v4jax.training.samples import Span, find_spans, predict, write_samples
from v4jax.training.state import compile_forward, init_state, split_model

T = 512
TOKENIZER = ByteTokenizer()

# Each document as its first token's weight, how many tokens have it, and so on.
SPANS = {
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


@pytest.mark.parametrize("case", SPANS.values(), ids=SPANS.keys())
def test_span(case):
    documents, expected = case
    spans = find_spans(pack(documents), rows=4, tokens=8)
    assert spans == ([Span(0, 0, *expected)] if expected else [])


def test_at_most_one_span_for_each_row():
    tokens = np.zeros((3, 128), np.int32)
    batch = Batch(tokens, np.ones(tokens.shape, np.float32))
    assert [span.row for span in find_spans(batch, rows=2, tokens=8)] == [0, 1]


def batch() -> Batch:
    """Returns two packed rows; the first documents end within the tokens that are written."""
    rows = [pack([[(0, 130), (1, 3)], [(0, 60), (1, 60)]]), pack([[(0, 1), (1, 299)]])]
    rows[1].tokens[:] = np.random.RandomState(1).randint(0, 256, (1, T))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)


@functools.cache
def written(**sizes):
    made = make_model(make_config("csa"))
    made = on_mesh(made, "train", **sizes) if sizes else made
    frozen, weights, biases = split_model(made, read_weights(made))
    state = init_state(frozen, weights, biases, optax.sgd(1.0))
    options, given = {"samples": 2, "tokens": 6, "layout": made.layout}, batch()
    found = write_samples(compile_forward(frozen, predict), state, given, TOKENIZER, **options)
    jax.tree.map(np.testing.assert_array_equal, given, batch())  # held-out text stays as it is
    return found


def test_samples_are_greedy_answers():
    """As the whole model writes them, from the document alone."""
    model, tokens = make_model(make_config("csa")), batch().tokens
    for sample, (row, start) in zip(written(), [(0, 130), (1, 150)], strict=True):
        assert sample["prompt"] == TOKENIZER.decode(tokens[row, start - 80 : start].tolist())
        row = np.where(np.arange(T) < start, tokens[row], 0)
        for place in range(start, start + 6):
            row[place] = np.argmax(model(row[None])[0, place - 1])
        answer = row[start : start + 6].tolist()
        end = answer.index(TOKENIZER.eos_id) if TOKENIZER.eos_id in answer else None
        assert sample["written"] == TOKENIZER.decode(answer[:end]) != sample["expected"]
    assert written()[0]["expected"] == TOKENIZER.decode(tokens[0, 130:133].tolist())


@pytest.mark.slow
def test_samples_on_a_mesh():
    assert written(data=2, context=2, tensor=2) == written()
