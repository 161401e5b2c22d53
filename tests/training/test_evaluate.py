"""Held-out text: a result that is no number is said with the batch."""

import math

import numpy as np
import pytest

from v4jax.training.batch import Batch
from v4jax.training.evaluate import POSITION_GROUPS, evaluate_text

BATCH = Batch(np.zeros((1, 4), np.int32), np.ones((1, 4), np.float32))


@pytest.mark.parametrize("spoilt", ["loss", "recall", ""])
def test_batches_that_are_not_finite_are_named(capsys, spoilt):
    sums = np.ones((2, len(POSITION_GROUPS)))
    results = [(sums, {"recall": 0.5}) for _ in range(4)]
    if spoilt == "loss":
        results[2] = (np.where([[1.0], [0.0]], np.nan, sums), {"recall": 0.5})
    elif spoilt:
        results[2] = (sums, {"recall": np.float32(np.nan)})
    scores = iter(results)
    found = evaluate_text(lambda state, batch: next(scores), None, [BATCH] * 4)
    warning = capsys.readouterr().err
    assert math.isnan(found["eval_loss"]) == (spoilt == "loss")
    assert math.isnan(found["eval_recall"]) == (spoilt == "recall")
    assert ("NaN or infinity in 1 of 4 batches" in warning) == bool(spoilt)
    assert ("first in number 3" in warning) == bool(spoilt)
