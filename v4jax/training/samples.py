"""Samples: what the model writes where held-out documents have their answers.

Every token is a forward pass over whole rows, as training makes them. That is slow, and needs no
cache, no other placement of the weights, and no other program than the evaluation's: so it works on
every mesh and for every way of training.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.model import Transformer
from v4jax.model.transformer import read_logits
from v4jax.parallel import Layout
from v4jax.tokenizer.vocabulary import Vocabulary
from v4jax.training.batch import PADDING, Batch
from v4jax.training.forward import Mode, run_rows
from v4jax.training.placement import put_batches, row_shares
from v4jax.training.step import TrainState, join_model

SHOWN = 80  # tokens of a prompt that a sample repeats


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a sample is written: tokens `start` up to `stop` of a row; its document ends at `end`.

    `stop` may lie behind `end`: the row's later documents make room.
    """

    row: int
    begin: int
    start: int
    stop: int
    end: int


def find_places(batch: Batch, rows: int, tokens: int) -> list[Place]:
    """Returns a place in the first document of each of the first rows of a host batch.

    It is where the first answer begins, which is where targets first have the document's largest
    weight; without a prompt, as in plain text, the document's middle. Rows of padding have none.
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
            found.append(Place(row, begin, start, min(start + tokens, count), end))
    return found


def build_writer(frozen: Transformer):
    """Returns the function from a state, a batch and a row index for each of its rows to the most
    probable next token there, int32 [b], equal on all devices.
    """

    def predict(frozen: Transformer, state: TrainState, batch: Batch, at_b):
        model = join_model(frozen, state)
        streams, _ = run_rows(model, batch.tokens, batch.begin, Mode(remat="none"), batch.skipped)
        streams_b1nd = jnp.take_along_axis(streams, at_b[:, None, None, None], axis=1)
        return jnp.argmax(read_logits(model, streams_b1nd)[:, 0], axis=-1).astype(jnp.int32)

    layout = frozen.layout
    everywhere = None if layout is None else NamedSharding(layout.mesh, P())
    compiled = jax.jit(predict, out_shardings=everywhere)
    return lambda state, batch, at: compiled(frozen, state, batch, at)


def write_samples(
    writer,
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
      writer: of `build_writer`.
      batch: of this host, as a loader gives it. All hosts call this, with batches of one shape.
      samples, tokens: how many samples at most, and how long each is; an end token ends one.
    """
    places = find_places(batch, samples, tokens)
    first = row_shares(layout)[0] * batch.tokens.shape[0]
    written = jax.tree.map(np.array, batch)
    for place in places:
        # The document takes the rest of the row. What stands there is read only once written.
        tail = place.row, slice(place.start, None)
        if written.begin is not None:
            written.begin[tail] = place.begin
        if written.skipped is not None:
            written.skipped[tail] = written.skipped[place.row, place.start - 1]
    for step in range(tokens):
        stacked = put_batches(jax.tree.map(lambda x: x[None], written), layout)
        whole = jax.tree.map(lambda x: x[0], stacked)
        open_places = [place for place in places if place.start + step < place.stop]
        at = np.zeros(whole.tokens.shape[0], np.int32)
        for place in open_places:
            at[first + place.row] = place.start + step - 1
        predicted = np.asarray(writer(state, whole, at))
        for place in open_places:
            written.tokens[place.row, place.start + step] = predicted[first + place.row]
    return [_describe(place, batch, written, tokenizer) for place in places]


def describe_sample(sample: Mapping[str, str]) -> str:
    """Returns a sample as a line of the log: the end of its prompt, both continuations."""
    return (
        f"evaluation: after {sample['prompt'][-40:]!r} stands {sample['expected']!r}, "
        f"the model writes {sample['written']!r}"
    )


def _describe(place: Place, batch: Batch, written: Batch, tokenizer: Vocabulary) -> dict[str, str]:
    def read(tokens: np.ndarray) -> str:
        until_end = itertools.takewhile(lambda token: token != tokenizer.eos_id, tokens.tolist())
        return tokenizer.decode(until_end)

    row, tokens = place.row, np.asarray(batch.tokens)
    prompt = slice(max(place.begin, place.start - SHOWN), place.start)
    return {
        "prompt": read(tokens[row, prompt]),
        "expected": read(tokens[row, place.start : min(place.stop, place.end)]),
        "written": read(written.tokens[row, place.start : place.stop]),
    }
