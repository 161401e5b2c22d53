"""The part of the data that is grain's: shuffling, mixing, endless epochs, batches made ahead.

    Source ─shuffle─repeat─┐
    Source ─shuffle─repeat─┴─mix─ stream ─ lanes ─ batch ─ prefetch

The stream is addressed by position, so a lane's place is a number.
"""

from collections.abc import Sequence

import grain
import numpy as np

from v4jax.config.data import DataConfig
from v4jax.training.batch import Batch
from v4jax.training.data.document import Document
from v4jax.training.data.packing import Lane, empty_row
from v4jax.training.data.sources import Source


def build_stream(sources: Sequence[Source], config: DataConfig) -> grain.MapDataset:
    """Returns the records of all sources by position: their documents, none where one is bad.

    Without `epochs` it is endless, every source in its share (whole percents of the smallest) and
    reshuffled whenever it was read through. With them, it is all records in one order per epoch.
    """
    seeds = np.random.SeedSequence(config.seed).generate_state(len(sources) + 1)
    datasets = [grain.MapDataset.source(source) for source in sources]
    if config.epochs is not None:
        together = grain.MapDataset.concatenate(datasets)
        together = together.shuffle(int(seeds[0])) if config.shuffle else together
        return together.repeat(config.epochs)
    for i, source in enumerate(config.sources):
        if config.shuffle and source.kind != "needles":  # made at random, in the order they say
            datasets[i] = datasets[i].shuffle(int(seeds[i + 1]))
    endless = [dataset.repeat() for dataset in datasets]
    return grain.MapDataset.mix(endless, weights=[source.weight for source in config.sources])


def build_iterator(
    stream: grain.MapDataset, config: DataConfig, lanes: Sequence[int], pad_id: int
) -> grain.DatasetIterator:
    """Returns an iterator of Batches that hold the rows `lanes` of every batch."""
    batches = _Batches(stream, config, lanes, pad_id)
    if config.prefetch:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=config.prefetch
        )
    return iter(batches)


class _Batches(grain.IterDataset):
    def __init__(self, stream, config: DataConfig, lanes: Sequence[int], pad_id: int):
        super().__init__()
        self._arguments = stream, config, lanes, pad_id

    def __iter__(self) -> "_BatchIterator":
        return _BatchIterator(*self._arguments)


class _BatchIterator(grain.DatasetIterator):
    """One row of every lane at a time, until no lane has one; padding for those that end early."""

    def __init__(self, stream, config: DataConfig, lanes: Sequence[int], pad_id: int):
        super().__init__()
        self._config, self._pad_id = config, pad_id

        def open_lane(lane: int) -> Lane:
            def read(record: int) -> Sequence[Document] | None:
                position = lane + record * config.batch
                return stream[position] if position < len(stream) else None

            return Lane(
                read,
                config.length,
                packing=config.packing,
                lookahead=config.lookahead,
                pad_id=pad_id,
            )

        self._lanes = {str(lane): open_lane(lane) for lane in lanes}

    def __next__(self) -> Batch:
        rows = [lane.next_row() for lane in self._lanes.values()]
        if all(row is None for row in rows):
            raise StopIteration
        padding = empty_row(self._config.length, self._pad_id)
        rows = [padding if row is None else row for row in rows]
        return Batch(
            tokens=np.stack([row.tokens for row in rows]),
            weights=np.stack([row.weights for row in rows]),
            begin=np.stack([row.begin for row in rows]),
        )

    def get_state(self) -> dict:
        return {name: lane.state() for name, lane in self._lanes.items()}

    def set_state(self, state: dict) -> None:
        for name, lane in self._lanes.items():
            lane.restore(state[name])
