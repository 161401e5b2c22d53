"""A configured source: records to documents of at most a row, bad records reported or fatal."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from v4jax import log
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.loading import build
from v4jax.errors import ConfigError, DataError, RequestError
from v4jax.tokenizer import ByteTokenizer, Vocabulary
from v4jax.training.data import chat, text
from v4jax.training.data.document import Document
from v4jax.training.data.files import find_files
from v4jax.training.data.packing import split_document

_MOST_WARNINGS = 100  # of bad records; more are counted only
# So many bad records in succession mean that the source is wrong, and reading on could be endless.
_MOST_IN_SUCCESSION = 1000
_ENDLESS = 2**31  # documents of a kind that has no end; shuffling takes 32 bits


class Records(Protocol):
    """What a kind of source implements; `read` gives the same document for an index every time."""

    def __len__(self) -> int: ...

    def place(self, index: int) -> str: ...

    def read(self, index: int) -> Document: ...


class Source:
    """The documents of one configured source, at random access."""

    def __init__(self, records: Records, config: SourceConfig, data: DataConfig):
        """Joins a kind's records with what happens to long and bad ones."""
        if not len(records):
            raise ConfigError(f"data.sources.paths: {', '.join(config.paths)} hold no record")
        self._records, self._length = records, data.length
        self._splits, self._skips = config.splits, data.on_bad_record == "skip"
        self._reported: set[int] = set()
        self._bad_in_succession = 0

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sequence[Document]:
        """Returns record `index` as one document or its parts; none where it is bad.

        Raises:
          DataError: it is bad and bad records are fatal, or there are only bad ones.
        """
        try:
            documents = self._fit(self._records.read(index))
        except (DataError, RequestError, RecursionError) as error:  # the last: nested too deeply
            self._report(index, error)
            return ()
        self._bad_in_succession = 0
        return documents

    def _fit(self, document: Document) -> Sequence[Document]:
        if len(document) <= self._length:
            return (document,)
        if self._splits:
            return split_document(document, self._length)
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
    """Documents of the needle task, each made when it is asked for; there is no last one."""

    def __init__(self, make_document: Callable[[int], Document]):
        self._make_document = make_document

    def __len__(self) -> int:
        return _ENDLESS

    def place(self, index: int) -> str:
        """Returns which document `index` is."""
        return f"needles, document {index}"

    def read(self, index: int) -> Document:
        """Returns document `index`."""
        return self._make_document(index)


def open_source(data: DataConfig, which: int, tokenizer: Vocabulary) -> Source:
    """Returns source `which` of the configuration, its files found and indexed.

    Raises:
      ConfigError: a file is missing or of the wrong kind, or there is no record.
    """
    return Source(_open_records(data, which, tokenizer), data.sources[which], data)


def _open_records(data: DataConfig, which: int, tokenizer: Vocabulary) -> Records:
    config = data.sources[which]
    match config.kind:
        case "chat":
            files = find_files(config.paths, chat.SUFFIXES)
            return chat.ChatRecords(files, config, tokenizer)
        case "text":
            files = find_files(config.paths, text.SUFFIXES)
            return text.TextRecords(files, config, tokenizer, data.length)
        case "needles":
            return _open_needles(data, which, tokenizer)
    raise AssertionError(f"kind {config.kind!r} was let through")


def _open_needles(data: DataConfig, which: int, tokenizer: Vocabulary) -> Records:
    from v4jax.training.data import needles  # brings a mebibyte of text along

    place = f"data.sources[{which}]"
    if not isinstance(tokenizer, ByteTokenizer):
        raise ConfigError(
            f"{place}.kind needles is made of bytes; it needs a model with the byte tokenizer, "
            "such as nano"
        )
    settings = build(needles.Needles, data.sources[which].settings or {}, f"{place}.settings")
    # Two sources of needles are not the same documents in two lengths.
    (seed,) = np.random.SeedSequence((data.seed, which)).generate_state(1)
    return NeedleRecords(partial(needles.make_document, int(seed), settings=settings))
