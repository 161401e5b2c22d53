"""What a Example accepts, and what it says otherwise."""

import re

import numpy as np
import pytest

from v4jax.errors import DataError
from v4jax.training.data import Example, weigh_all


def test_types_are_settled():
    document = Example([5, 6, 7], [0, 1, 0.5])
    assert document.tokens.dtype == np.int32 and document.weights.dtype == np.float32
    assert len(document) == 3 and document.weights.tolist() == [0, 1, 0.5]


def test_all_but_the_first_count():
    assert weigh_all(3).tolist() == [0, 1, 1] and weigh_all(0).tolist() == []


# {what is wrong: (tokens, weights, what the message must say)}
BROKEN = {
    "empty": ([], [], "example.tokens must be a row of at least one token id, got shape [0]"),
    "two rows": ([[1]], [[0]], "must be a row of at least one token id, got shape [1, 1] of int64"),
    "no ids": ([1.5], [0], "at least one token id, got shape [1] of float64"),
    "other length": ([1, 2], [0], "one weight for each of the 2 tokens, got shape [1]"),
    "negative id": ([1, -1], [0, 1], "ids from 0 to 2³¹ − 1, got -1"),
    "huge id": ([1, 2**31], [0, 1], "ids from 0 to 2³¹ − 1, got 2147483648"),
    "negative weight": ([1, 2], [0, -1], "weights must be finite and not negative, got -1.0"),
    "nan": ([1, 2], [0, float("nan")], "weights must be finite and not negative, got nan"),
    "first counts": ([1, 2], [1, 1], "weights[0] must be 0, because no token predicts the first"),
}


@pytest.mark.parametrize(("tokens", "weights", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken(tokens, weights, message):
    with pytest.raises(DataError, match=re.escape(message)):
        Example(tokens, weights)
