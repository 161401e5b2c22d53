"""From a configuration to Batches, and back to a saved position.

    loader = Loader(config, tokenizer)
    batch = next(loader)
    state = loader.state()          # small and JSON-able: positions, no documents
    Loader(config, tokenizer).restore(state)

Every batch is the same for every number of hosts. Host i of n makes the rows from i · batch / n on,
reads only their records, and never waits for another host.
"""

import functools
import weakref
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from v4jax.config.data import DataConfig
from v4jax.errors import ConfigError, DataError
from v4jax.tokenizer import Vocabulary
from v4jax.training.batch import Batch
from v4jax.training.data.packing import Counts, empty_row
from v4jax.training.data.sources import open_source


class Loader:
    """An iterator of Batches that can save its position and go on from it."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Vocabulary,
        *,
        shard_index: int = 0,
        shard_count: int = 1,
    ):
        """Finds and indexes the files.

        Args:
          shard_index: which host this is, below `shard_count`; each gets equal batches.

        Raises:
          ConfigError: a file is missing, or the batch does not divide among the hosts.
        """
        _check_shards(config, shard_index, shard_count)
        pipeline = _import_pipeline()
        sources = [open_source(config, i, tokenizer) for i in range(len(config.sources))]
        self._data = _describe(config, [len(source) for source in sources])
        rows = config.batch // shard_count
        lanes = range(shard_index * rows, (shard_index + 1) * rows)
        self._open = functools.partial(
            pipeline.build_iterator, sources, config, lanes, tokenizer.pad_id
        )
        self._iterator = self._open()
        # Ends the thread that makes batches ahead. It is called at exit too, because the iterator
        # must be gone before the interpreter unloads its modules.
        self.close = weakref.finalize(self, vars(self).pop, "_iterator", None)
        row = empty_row(config.length, tokenizer.pad_id, gaps=config.gaps)
        # A batch without a document.
        self.padding = jax.tree.map(lambda array: np.repeat(array, rows, axis=0), row)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """Returns this host's rows of the next batch.

        Raises:
          StopIteration: every record of this host was read `epochs` times; others may have more.
          DataError: a record is bad where that is fatal; the message names its place.
        """
        return next(self._iterator)

    def count(self) -> int:
        """Returns how many batches `epochs` make on this host, by making them all.

        Raises:
          DataError: as `__next__`.
        """
        return sum(1 for _ in self._open())

    def state(self) -> dict:
        """Returns the position after the last returned batch, JSON-able.

        It holds the lanes of this host. `merge_states` joins the positions of all hosts into one,
        from which any number of hosts can go on.
        """
        return {"data": self._data, "lanes": self._iterator.get_state()}

    def restore(self, state: Mapping) -> None:
        """Goes on from a `state`.

        Raises:
          DataError: the state belongs to other data, or lacks rows of this host.
        """
        changed = [
            f"{name} was {state['data'].get(name)!r} and is {value!r}"
            for name, value in self._data.items()
            if state["data"].get(name) != value
        ]
        if changed:
            raise DataError(
                f"data: the position was saved for other data: {'; '.join(changed)}; restore the "
                "configuration and the files, or start the data anew"
            )
        missing = self._iterator.get_state().keys() - state["lanes"].keys()
        if missing:
            raise DataError(
                f"data: the position lacks rows {', '.join(sorted(missing))} of the batch; join "
                "the states of all hosts with merge_states"
            )
        self._iterator.set_state(state["lanes"])

    def counts(self) -> Counts:
        """Returns what this host made since the beginning of the data."""
        lanes = self._iterator.get_state().values()
        return sum((Counts(**lane["counts"]) for lane in lanes), Counts())

    def report(self) -> str:
        """Returns a line for people: documents, tokens, fill of the rows, bad records."""
        counts = self.counts()
        return (
            f"data: {counts.documents:,} documents, {counts.tokens:,} tokens, rows "
            f"{100 * counts.fill:.1f} % full, {counts.skipped:,} bad records skipped"
        )


def merge_states(states: Sequence[Mapping]) -> dict:
    """Returns the state of all hosts, given each host's after the same number of batches."""
    lanes = {name: lane for state in states for name, lane in state["lanes"].items()}
    return {"data": states[0]["data"], "lanes": lanes}


def _check_shards(config: DataConfig, shard_index: int, shard_count: int) -> None:
    if not 0 <= shard_index < shard_count:
        raise ConfigError(
            f"shard_index must be between 0 and shard_count - 1 = {shard_count - 1}, got "
            f"{shard_index}"
        )
    if config.batch % shard_count:
        raise ConfigError(
            f"data.batch must be a multiple of the number of hosts, {shard_count}, got "
            f"{config.batch}"
        )


def _describe(config: DataConfig, records: Sequence[int]) -> dict:
    """Returns what a saved position depends on, as a JSON-able value."""
    names = ("length", "batch", "packing", "lookahead", "shuffle", "seed", "epochs")
    sources = [
        vars(source) | {"paths": None, "settings": repr(source.settings), "records": count}
        for source, count in zip(config.sources, records, strict=True)
    ]
    return {name: getattr(config, name) for name in names} | {"sources": sources}


def _import_pipeline():
    try:
        from v4jax.training.data import pipeline
    except ModuleNotFoundError as error:
        if error.name != "grain":
            raise
        raise ConfigError(
            'training data needs grain, which is not installed; pip install "v4jax[train]"'
        ) from error
    return pipeline
