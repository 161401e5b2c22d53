"""A configured source: records to documents of at most one row; bad records are reported."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from v4jax import log
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.loading import build
from v4jax.errors import ConfigError, DataError, RequestError
from v4jax.tokenizer import ByteTokenizer, Vocabulary
from v4jax.training.data import chat, text
from v4jax.training.data.example import Example
from v4jax.training.data.files import find_files
from v4jax.training.data.packing import split_example

_MOST_WARNINGS = 100  # warnings about bad records; further ones are counted only
# Bad records in succession that mean a wrong source; reading on could be endless.
_MOST_IN_SUCCESSION = 1000
_ENDLESS = 2**31  # length of a source without end; shuffling takes 32 bits


class Records(Protocol):
    """What each kind of source implements; `read` always returns the same for an index."""

    def __len__(self) -> int: ...

    def place(self, index: int) -> str: ...

    def read(self, index: int) -> Sequence[Example]: ...


class ExampleSource:
    """The examples of one configured source, by the index of their record."""

    def __init__(self, records: Records, config: SourceConfig, data: DataConfig):
        """Reads `records`; `config` and `data` say what happens to long and to bad ones."""
        if not len(records):
            raise ConfigError(f"data.sources.paths: {', '.join(config.paths)} hold no record")
        self._records, self._length = records, data.length
        self._splits, self._skips = config.splits, data.on_bad_record == "skip"
        self._reported: set[int] = set()
        self._bad_in_succession = 0

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sequence[Example]:
        """Returns the examples of record `index`, or their parts; none where the record is bad.

        Raises:
          DataError: a record is bad where that is fatal, or too many are bad in succession.
        """
        try:
            found = self._records.read(index)
            documents = [part for document in found for part in self._fit(document)]
        except (DataError, RequestError, RecursionError) as error:  # the last: nested too deeply
            self._report(index, error)
            return ()
        self._bad_in_succession = 0
        return documents

    def _fit(self, document: Example) -> Sequence[Example]:
        if len(document) <= self._length:
            return (document,)
        if self._splits:
            return split_example(document, self._length)
        raise DataError(
            f"has {len(document):,} tokens and data.length is {self._length:,}; raise it, or set "
            'the source\'s too_long="split"'
        )

    def _report(self, index: int, error: Exception) -> None:
        message = f"data: {self._records.place(index)}: {error}"
        if not self._skips:
            raise DataError(f'{message} (data.on_bad_record="skip" leaves it out)') from error
        self._bad_in_succession += 1
        if self._bad_in_succession >= _MOST_IN_SUCCESSION:
            raise DataError(
                f"{message}; so were the {_MOST_IN_SUCCESSION - 1} records before it: is this "
                "source of the right kind?"
            ) from error
        if index not in self._reported and len(self._reported) < _MOST_WARNINGS:
            self._reported.add(index)
            log.warning(f"{message}; skipped")
            if len(self._reported) == _MOST_WARNINGS:
                log.warning("data: further bad records of this source are counted, not shown")


class NeedleRecords:
    """Documents of the needle task, each made on request; they never end."""

    def __init__(self, make_document: Callable[[int], Example]):
        self._make_document = make_document

    def __len__(self) -> int:
        return _ENDLESS

    def place(self, index: int) -> str:
        """Returns the name of document `index` for messages."""
        return f"needles, document {index}"

    def read(self, index: int) -> Sequence[Example]:
        """Returns document `index`."""
        return (self._make_document(index),)


def open_source(data: DataConfig, which: int, tokenizer: Vocabulary) -> ExampleSource:
    """Returns source `which` of the configuration, with its files found and indexed.

    Raises:
      ConfigError: a file is missing or of the wrong kind, or there is no record.
    """
    return ExampleSource(_open_records(data, which, tokenizer), data.sources[which], data)


def _open_records(data: DataConfig, which: int, tokenizer: Vocabulary) -> Records:
    config = data.sources[which]
    match config.kind:
        case "chat":
            return chat.ChatRecords(find_source_files(config), config, tokenizer)
        case "text":
            return text.TextRecords(find_source_files(config), config, tokenizer, data.length)
        case "needles":
            return _open_needles(data, which, tokenizer)
    raise AssertionError(f"kind {config.kind!r} was let through")


def find_source_files(config: SourceConfig) -> list[Path]:
    """Returns the files of a source.

    Raises:
      ConfigError: as `find_files`.
    """
    return find_files(config.paths, (chat if config.kind == "chat" else text).SUFFIXES)


def _open_needles(data: DataConfig, which: int, tokenizer: Vocabulary) -> Records:
    from v4jax.training.data import needles  # imports a mebibyte of text

    place = f"data.sources[{which}]"
    if not isinstance(tokenizer, ByteTokenizer):
        raise ConfigError(
            f"{place}.kind needles is made of bytes; it needs a model with the byte tokenizer, "
            "such as nano"
        )
    settings = build(needles.Needles, data.sources[which].settings or {}, f"{place}.settings")
    # Two sources of needles must not make the same documents in two lengths.
    (seed,) = np.random.SeedSequence((data.seed, which)).generate_state(1)
    return NeedleRecords(partial(needles.make_document, int(seed), settings=settings))
