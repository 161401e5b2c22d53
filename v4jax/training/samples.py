"""Samples: what the model writes where held-out documents have their answers.

Every token takes one forward pass over whole rows, the pass of training. This is slow, but it needs
neither a cache nor another sharding of the weights. It works on every mesh and for every kind of
training.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from v4jax.model import Transformer
from v4jax.model.passes import read_logits
from v4jax.parallel import Layout
from v4jax.tokenizer.vocabulary import Vocabulary
from v4jax.training.batch import PADDING, Batch, put_batch, row_shares
from v4jax.training.forward import Mode, run_rows
from v4jax.training.state import TrainState

SHOWN = 80  # tokens of the prompt that a sample shows


@dataclasses.dataclass(frozen=True)
class Span:
    """Where a sample is written: tokens `start` to `stop` of a row.

    Its document begins at `begin` and ends at `end`. `stop` may be after `end`: the sample then
    overwrites later documents of the row.
    """

    row: int
    begin: int
    start: int
    stop: int
    end: int


def find_spans(batch: Batch, rows: int, tokens: int) -> list[Span]:
    """Returns one span in the first document of each of the first rows of a host batch.

    It begins at the first answer: where targets first have the document's largest weight. In a
    document without a prompt, as in plain text, it begins in the middle. Rows of padding have none.
    """
    found = []
    for row in range(min(rows, batch.tokens.shape[0])):
        count = batch.tokens.shape[1]
        begins = np.zeros(count, int) if batch.begin is None else np.asarray(batch.begin[row])
        real = np.flatnonzero(begins != PADDING)
        if not real.size:
            continue
        begin = int(begins[real[0]])
        inside = np.flatnonzero(begins == begin)
        end = int(inside[-1]) + 1
        weights = np.asarray(batch.weights[row])[begin:end]
        first = int(np.argmax(weights >= weights.max()))
        start = begin + (first if first > 1 else (end - begin) // 2)
        if start > begin:
            found.append(Span(row, begin, start, min(start + tokens, count), end))
    return found


def predict(model: Transformer, batch: Batch, at_b: Int[Array, "b"]) -> Int[Array, "b"]:
    """Returns the most probable token after index `at_b` of each row."""
    streams, _ = run_rows(model, batch.tokens, batch.begin, Mode(remat="none"), batch.skipped)
    streams_b1nd = jnp.take_along_axis(streams, at_b[:, None, None, None], axis=1)
    return jnp.argmax(read_logits(model, streams_b1nd)[:, 0], axis=-1).astype(jnp.int32)


def write_samples(
    predict: Callable,
    state: TrainState,
    batch: Batch,
    tokenizer: Vocabulary,
    *,
    samples: int,
    tokens: int,
    layout: Layout | None = None,
) -> list[dict[str, str]]:
    """Returns samples of this host's first rows: `prompt` (its end), `expected` and `written`.

    Args:
      predict: compiled by `compile_forward`.
      batch: this host's rows, from a loader. All hosts call this with batches of one shape.
      samples: at most that many. tokens: of each sample; an end token ends it.
    """
    spans = find_spans(batch, samples, tokens)
    first = row_shares(layout)[0] * batch.tokens.shape[0]
    written = jax.tree.map(np.array, batch)
    for span in spans:
        # The document takes the rest of the row. Tokens there are read only after they are written.
        tail = span.row, slice(span.start, None)
        if written.begin is not None:
            written.begin[tail] = span.begin
        if written.skipped is not None:
            written.skipped[tail] = written.skipped[span.row, span.start - 1]
    for step in range(tokens):
        whole = put_batch(written, layout)
        unfinished = [span for span in spans if span.start + step < span.stop]
        at = np.zeros(whole.tokens.shape[0], np.int32)
        for span in unfinished:
            at[first + span.row] = span.start + step - 1
        predicted = np.asarray(predict(state, whole, at))
        for span in unfinished:
            written.tokens[span.row, span.start + step] = predicted[first + span.row]
    return [_describe(span, batch, written, tokenizer) for span in spans]


def describe_sample(sample: Mapping[str, str]) -> str:
    """Returns a line of the log: the end of the prompt and both continuations."""
    return (
        f"evaluation: after {sample['prompt'][-40:]!r} stands {sample['expected']!r}, "
        f"the model writes {sample['written']!r}"
    )


def _describe(span: Span, batch: Batch, written: Batch, tokenizer: Vocabulary) -> dict[str, str]:
    def read(tokens: np.ndarray) -> str:
        until_end = itertools.takewhile(lambda token: token != tokenizer.eos_id, tokens.tolist())
        return tokenizer.decode(until_end)

    row, tokens = span.row, np.asarray(batch.tokens)
    prompt = slice(max(span.begin, span.start - SHOWN), span.start)
    return {
        "prompt": read(tokens[row, prompt]),
        "expected": read(tokens[row, span.start : min(span.stop, span.end)]),
        "written": read(written.tokens[row, span.start : span.stop]),
    }
