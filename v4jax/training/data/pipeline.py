"""The part of the data that uses grain: shuffling, mixing, endless epochs, batches made ahead.

    source ─ shuffle ─ repeat ─┐                 ┌ lane 0 ─┐
    source ─ shuffle ─ repeat ─┴─ records by lane ┼ lane 1 ─┼─ batch ─ prefetch
                                                  └ …      ─┘

Lane r makes row r of every batch. Records are addressed by number, and a lane's position is
therefore a number too.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np

from v4jax.config.data import DataConfig
from v4jax.training.batch import Batch
from v4jax.training.data.example import Example
from v4jax.training.data.packing import Lane, empty_row
from v4jax.training.data.sources import ExampleSource

# The examples of a lane's record: none where the record is bad, None after the last record.
ReadRecord = Callable[[int], Sequence[Example] | None]

# Number of turns of the mixture at which lanes begin: no batch then has all rows of one source.
_FIRST_TURNS = 64


def share_records(
    sources: Sequence[ExampleSource], config: DataConfig
) -> Callable[[int], ReadRecord]:
    """Returns the function that gives lane r of B its records: r, r + B, r + 2 B, … of each source.

    Without `epochs`, sources are endless and shuffled again after each pass. Every lane draws from
    them by weight, to whole percents of the smallest weight. Each lane mixes by itself, because
    lanes read at their own pace, and a shared mixture could leave one of them a single source. With
    `epochs`, all records of all sources are in one order.
    """
    seeds = [int(s) for s in np.random.SeedSequence(config.seed).generate_state(len(sources) + 1)]
    datasets = [grain.MapDataset.source(source) for source in sources]
    if config.epochs is not None:
        together = grain.MapDataset.concatenate(datasets)
        together = together.shuffle(seeds[0]) if config.shuffle else together
        return _share_epochs(together.repeat(config.epochs), config.batch)
    for i, source in enumerate(config.sources):
        if config.shuffle and source.kind != "needles":  # needles are random already
            datasets[i] = datasets[i].shuffle(seeds[i + 1])
    endless = [dataset.repeat() for dataset in datasets]
    return _share_mixture(endless, [source.weight for source in config.sources], config.batch)


def _share_epochs(records: grain.MapDataset, lanes: int) -> Callable[[int], ReadRecord]:
    def open_lane(lane: int) -> ReadRecord:
        def read(record: int) -> Sequence[Example] | None:
            position = lane + record * lanes
            return records[position] if position < len(records) else None

        return read

    return open_lane


def _share_mixture(
    sources: Sequence[grain.MapDataset], weights: Sequence[float], lanes: int
) -> Callable[[int], ReadRecord]:
    # We mix plain counters instead of records. Each turn of the mixture then tells the source and
    # the record's index within the source.
    numbers = grain.MapDataset.range(sys.maxsize)
    turns = grain.MapDataset.mix(
        [numbers.map(lambda number, i=i: (i, number)) for i in range(len(sources))], weights=weights
    )

    def open_lane(lane: int) -> ReadRecord:
        first = lane % _FIRST_TURNS
        missed = Counter(turns[turn][0] for turn in range(first))

        def read(record: int) -> Sequence[Example]:
            source, number = turns[first + record]
            return sources[source][lane + (number - missed[source]) * lanes]

        return read

    return open_lane


def build_iterator(
    sources: Sequence[ExampleSource], config: DataConfig, lanes: Sequence[int], pad_id: int
) -> grain.DatasetIterator:
    """Returns an iterator of Batches that hold the rows `lanes` of every batch."""
    batches = _Batches(share_records(sources, config), config, lanes, pad_id)
    # Even with a buffer of 0 it keeps the state after the last batch that it returned. An error
    # while the next batch is made therefore leaves a valid state.
    ahead = grain.experimental.ThreadPrefetchIterDataset(
        batches, prefetch_buffer_size=config.prefetch
    )
    return iter(ahead)


class _Batches(grain.IterDataset):
    def __init__(self, *arguments):
        super().__init__()
        self._arguments = arguments

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(*self._arguments)


class _BatchIterator(grain.DatasetIterator):
    """Joins one row of every lane until no lane has one; lanes that end early give padding."""

    def __init__(
        self,
        open_lane: Callable[[int], ReadRecord],
        config: DataConfig,
        lanes: Sequence[int],
        pad_id: int,
    ):
        super().__init__()
        self._config, self._pad_id = config, pad_id
        options = dict(packing=config.packing, gaps=config.gaps, lookahead=config.lookahead)
        options["pad_id"] = pad_id
        self._lanes = {str(i): Lane(open_lane(i), config.length, **options) for i in lanes}

    def __next__(self) -> Batch:
        rows = [lane.next_row() for lane in self._lanes.values()]
        if all(row is None for row in rows):
            raise StopIteration
        padding = empty_row(self._config.length, self._pad_id, gaps=self._config.gaps)
        rows = [padding if row is None else row for row in rows]
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)

    def get_state(self) -> dict:
        return {name: lane.state() for name, lane in self._lanes.items()}

    def set_state(self, state: dict) -> None:
        for name, lane in self._lanes.items():
            lane.restore(state[name])
