"""Rows of documents: all there, whole, on the grid; resumable; and how full they are."""

import json

import numpy as np
import pytest

from v4jax.errors import DataError
from v4jax.shapes import round_up
from v4jax.training.batch import PADDING
from v4jax.training.data import Example, split_example, weigh_all
from v4jax.training.data.packing import Counts, Lane

LENGTH, ALIGN, PAD = 1024, 128, 9


def make_document(name: int, tokens: int) -> Example:
    """Returns a document whose tokens say which it is and where."""
    return Example(1000 * name + np.arange(tokens), weigh_all(tokens))


def make_records(lengths) -> list[list[Example]]:
    """Returns one record for each length; 0 is a bad one, a list is one split into parts."""
    names = iter(range(10**6))
    return [
        [
            make_document(next(names), n)
            for n in (entry if isinstance(entry, list) else [entry])
            if n
        ]
        for entry in lengths
    ]


def open_lane(records, **options) -> Lane:
    def read(index):
        return records[index] if index < len(records) else None

    return Lane(read, LENGTH, pad_id=PAD, **options)


def read_rows(lane: Lane) -> list:
    return list(iter(lane.next_row, None))


def documents_of(row) -> list[np.ndarray]:
    """Returns the documents that a row says it holds, having checked what surrounds them."""
    (tokens,), (weights,), (begins,) = row.tokens, row.weights, row.begin
    inside = begins != PADDING
    assert (tokens[~inside] == PAD).all() and not weights[~inside].any()
    documents = []
    for begin in np.unique(begins[inside]):
        (where,) = np.nonzero(begins == begin)
        assert begin % ALIGN == 0 and where[0] == begin
        assert (np.diff(where) == 1).all()
        assert weights[begin] == 0 and (weights[where[1:]] == 1).all()
        documents.append(tokens[where])
    return documents


LENGTHS = {
    "random": np.random.default_rng(0).integers(1, LENGTH + 1, 60).tolist(),
    "short": np.random.default_rng(1).integers(1, 100, 60).tolist(),
    "full rows": [LENGTH] * 5,
    "bad records and parts": [700, 0, [LENGTH, LENGTH, 5], 0, 300, [10] * 30, 0],
    "nothing": [],
    "nothing good": [0, 0],
}


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_every_document_once_and_whole(lengths, packing):
    records = make_records(lengths)
    lane = open_lane(records, packing=packing, lookahead=8)
    rows = read_rows(lane)
    found = [tokens.tolist() for row in rows for tokens in documents_of(row)]
    expected = [document.tokens.tolist() for record in records for document in record]
    assert sorted(found) == sorted(expected)
    if not packing:
        assert found == expected and len(rows) == len(found)
    state = lane.state()
    assert state["counts"] == {
        "rows": len(rows),
        "row_tokens": LENGTH * len(rows),
        "documents": len(expected),
        "tokens": sum(map(len, expected)),
        "skipped": sum(not record for record in records),
    }


def test_the_longest_that_fits_follows_the_oldest():
    lane = open_lane(make_records([200, 900, 768, 100, 600, 120]))
    rows = [[len(tokens) for tokens in documents_of(row)] for row in read_rows(lane)]
    # 200 takes 256, which leaves 768: 768 just fits, 900 does not. 900 takes all 1024.
    assert rows == [[200, 768], [900], [100, 600, 120]]


def test_no_document_waits_for_more_rows_than_stand_in_line():
    lengths = [1000, *[40] * 400]
    lane = open_lane(make_records([700, 800, *lengths]), lookahead=4)
    first_seen = {}
    for i, row in enumerate(read_rows(lane)):
        for tokens in documents_of(row):
            first_seen[int(tokens[0]) // 1000] = i
    assert first_seen[1] <= 4 and first_seen[2] <= 4


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_goes_on_from_any_row(lengths, packing):
    records = make_records(lengths)
    lane = open_lane(records, packing=packing, lookahead=8)
    states, rows = [lane.state()], []
    while (row := lane.next_row()) is not None:
        rows.append(row)
        states.append(json.loads(json.dumps(lane.state())))
    last = lane.state()
    for i, state in enumerate(states):
        lane = open_lane(records, packing=packing, lookahead=8)
        lane.restore(state)
        again = read_rows(lane)
        assert len(again) == len(rows) - i
        for row, expected in zip(again, rows[i:], strict=True):
            assert (row.tokens == expected.tokens).all() and (row.begin == expected.begin).all()
        assert lane.state() == last


def test_a_position_whose_documents_are_gone():
    lane = open_lane(make_records([100] * 20), packing=False)
    lane.next_row()
    with pytest.raises(DataError, match="document 0 of record 1 was there when the position was"):
        open_lane(make_records([100])).restore(lane.state())


def test_long_documents_do_not_fill_the_memory():
    read = []

    def endless(index):
        read.append(index)
        return [make_document(0, LENGTH)]

    Lane(endless, LENGTH, lookahead=64).next_row()
    assert len(read) <= 6


def test_rows_are_full():
    """Best fit against rows in the order of arrival, on lengths as conversations have them."""
    lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 2000).astype(int).clip(2, LENGTH)
    lane = open_lane(make_records(lengths.tolist()))
    rows = len(read_rows(lane))
    in_order, room = 1, LENGTH
    for length in lengths:
        if length > room:
            in_order, room = in_order + 1, LENGTH
        room -= round_up(int(length), ALIGN)
    # No packing needs fewer rows than the documents' aligned tokens fill.
    bound = sum(round_up(int(n), ALIGN) for n in lengths) / LENGTH
    assert rows <= 1.01 * bound + 1 < 0.95 * in_order
    assert Counts(**lane.state()["counts"]).fill == pytest.approx(lengths.sum() / (rows * LENGTH))


# {tokens of a document: the parts of a split at 4}
SPLITS = {3: [3], 4: [4], 8: [4, 4], 10: [4, 4, 2], 9: [4, 4]}  # the ninth would be no target


@pytest.mark.parametrize(("tokens", "parts"), SPLITS.items())
def test_split_at_whole_multiples(tokens, parts):
    document = make_document(0, tokens)
    split = split_example(document, 4)
    assert [len(part) for part in split] == parts
    joined = np.concatenate([part.tokens for part in split])
    assert (joined == document.tokens[: len(joined)]).all()
    for part in split:
        assert part.weights.tolist() == [0.0] + [1.0] * (len(part) - 1)


def test_a_part_that_is_all_prompt_is_left_out():
    weights = [0] * 6 + [1] * 4
    (part, last) = split_example(Example(range(10), weights), 4)
    assert part.tokens.tolist() == [4, 5, 6, 7] and part.weights.tolist() == [0, 0, 1, 1]
    assert last.tokens.tolist() == [8, 9] and last.weights.tolist() == [0, 1]
