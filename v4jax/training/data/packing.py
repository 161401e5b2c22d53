"""Documents to rows: several in a row, none cut, each beginning at a multiple of 128 tokens.

    row of 1024   0 │ document of 300 │ padding │ 384 │ document of 600 │ padding │ 1024

A `Lane` fills one row of every batch from records of its own. Lanes are independent. A batch is
therefore the same whichever host fills which lane.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from v4jax.config.data import ALIGN
from v4jax.errors import DataError
from v4jax.shapes import round_up
from v4jax.training.batch import PADDING, Batch
from v4jax.training.data.example import Example

_WAITING_ROWS = 4  # rows of tokens that may wait; bounds the memory that long documents take


@dataclass
class Counts:
    """What a lane, or all lanes together, made so far.

    Attributes:
      rows: rows made, of `row_tokens` tokens in all.
      documents, tokens: contents of these rows; a split document counts once for each part.
      skipped: bad records left out.
    """

    rows: int = 0
    row_tokens: int = 0
    documents: int = 0
    tokens: int = 0
    skipped: int = 0

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that belong to documents: 1 is full, 0 is all padding."""
        return self.tokens / max(self.row_tokens, 1)

    def __add__(self, other: "Counts") -> "Counts":
        mine, others = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + others[name] for name in mine})


@dataclass(frozen=True)
class _Waiting:
    """A document in the queue: part `part` of the lane's record `record`."""

    record: int
    part: int
    document: Example


class Lane:
    """Fills one row of every batch from a bounded queue of documents.

    The document that waited longest begins a row. Then the longest that fits follows, until none
    fits. No document therefore waits for more than `lookahead` rows.
    """

    def __init__(
        self,
        read: Callable[[int], Sequence[Example] | None],
        length: int,
        *,
        packing: bool = True,
        gaps: bool = False,
        lookahead: int = 64,
        pad_id: int = 0,
    ):
        """Begins at the lane's first record.

        Args:
          read: returns the documents of the lane's record k: none where the record is bad, None
            after the last record.
          length: tokens of a row; a multiple of 128.
          packing: whether several documents share a row.
          gaps: whether rows have `skipped`, which documents with gaps need.
          lookahead: documents in the queue, at most.
          pad_id: the token of padding.
        """
        self._read, self._length = read, length
        self._packing, self._gaps = packing, gaps
        self._lookahead, self._pad_id = lookahead, pad_id
        self._restart(0, 0, [], Counts())

    def _restart(self, record: int, part: int, queue: list[_Waiting], counts: Counts) -> None:
        self._record, self._part = record, part  # the next to join the queue
        self._parts: Sequence[Example] = ()  # of that record, once it is read
        self._queue, self._counts, self._ended = queue, counts, False

    def next_row(self) -> Batch | None:
        """Returns the next row as a batch of one; None at the end."""
        self._fill_queue()
        if not self._queue:
            return None
        row = empty_row(self._length, self._pad_id, gaps=self._gaps)
        begin, chosen = 0, 0
        while chosen is not None:
            document = self._queue.pop(chosen).document
            end = begin + len(document)
            row.tokens[0, begin:end] = document.tokens
            row.weights[0, begin:end] = document.weights
            row.begin[0, begin:end] = begin
            if document.skipped is not None:
                if row.skipped is None:
                    raise DataError(
                        "data.gaps is False, but a document leaves positions out; set data.gaps"
                    )
                row.skipped[0, begin:end] = document.skipped
            self._counts.documents += 1
            self._counts.tokens += len(document)
            begin = round_up(end, ALIGN)
            chosen = self._choose(self._length - begin) if self._packing else None
        self._counts.rows += 1
        self._counts.row_tokens += self._length
        return row

    def state(self) -> dict:
        """Returns the lane's position as JSON-able numbers: records and parts, no documents."""
        return {
            "next": [self._record, self._part],
            "line": [[waiting.record, waiting.part] for waiting in self._queue],
            "counts": asdict(self._counts),
        }

    def restore(self, state: dict) -> None:
        """Goes on from a `state`; reads the documents of its queue again.

        Raises:
          DataError: one of them is no longer there.
        """
        queue: list[_Waiting] = []
        read: dict[int, Sequence[Example] | None] = {}
        for record, part in state["line"]:
            if record not in read:
                read = {record: self._read(record)}  # parts of a record are neighbours
            parts = read[record] or ()
            if part >= len(parts):
                raise DataError(
                    f"data: document {part} of record {record} was there when the position was "
                    "saved and is gone; restore the files, or start the data anew"
                )
            queue.append(_Waiting(record, part, parts[part]))
        self._restart(*state["next"], queue, Counts(**state["counts"]))

    def _choose(self, room: int) -> int | None:
        """Returns the index of the longest waiting document of at most `room` tokens."""
        self._fill_queue()
        fitting = [i for i, waiting in enumerate(self._queue) if len(waiting.document) <= room]
        return max(fitting, key=lambda i: len(self._queue[i].document), default=None)

    def _fill_queue(self) -> None:
        tokens = sum(len(waiting.document) for waiting in self._queue)
        while len(self._queue) < self._lookahead and tokens < _WAITING_ROWS * self._length:
            document = self._next_document()
            if document is None:
                break
            tokens += len(document)

    def _next_document(self) -> Example | None:
        """Appends the next document to the queue and returns it; None at the end."""
        while not self._ended:
            if not self._parts:
                parts = self._read(self._record)
                if parts is None:
                    self._ended = True
                    break
                self._parts = parts
                self._counts.skipped += not parts
            if self._part < len(self._parts):
                document = self._parts[self._part]
                self._queue.append(_Waiting(self._record, self._part, document))
                self._part += 1
                return document
            self._record, self._part, self._parts = self._record + 1, 0, ()
        return None


def split_example(document: Example, length: int) -> list[Example]:
    """Returns a document cut at whole multiples of `length` tokens.

    Each part begins anew: it sees nothing of the parts before it, and its first token is no target.
    A part without any target is left out, because nothing would be learned from it.

    Raises:
      DataError: the document has gaps and would have to be cut.
    """
    if document.skipped is not None:
        if len(document) <= length:
            return [document]
        raise DataError(
            f"data.length = {length} is too short for a document of {len(document)} tokens with "
            "gaps, which cannot be cut; make rows longer, or documents shorter"
        )
    parts = []
    for begin in range(0, len(document), length):
        weights = document.weights[begin : begin + length].copy()
        weights[0] = 0
        if weights.any():
            parts.append(Example(document.tokens[begin : begin + length], weights))
    return parts


def empty_row(length: int, pad_id: int, *, gaps: bool = False) -> Batch:
    """Returns a row of padding as a batch of one; with `gaps` it has `skipped`."""
    return Batch(
        tokens=np.full((1, length), pad_id, np.int32),
        weights=np.zeros((1, length), np.float32),
        begin=np.full((1, length), PADDING, np.int32),
        skipped=np.zeros((1, length), np.int32) if gaps else None,
    )
