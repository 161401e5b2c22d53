"""Plain text as training examples: BOS, the text, EOS; everything after BOS counts.

    notes.txt, book.md        one document per file
    corpus.jsonl              one document per line: {"text": "…"}; other fields are ignored

The text comes from outside: the literal of a control token in it is ordinary text.

Where long documents are split, long .txt and .md files are read in segments, and no file has to fit
into memory. Only the first segment begins with BOS, and only the last ends with EOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from v4jax.config.data import SourceConfig
from v4jax.errors import DataError
from v4jax.tokenizer import Vocabulary
from v4jax.training.data.example import Example, weigh_all
from v4jax.training.data.files import LINES, Lines, decode, parse_object, read_range

SUFFIXES = (".txt", ".md", *LINES)
# Size of a segment: some rows of tokens (a token of V4 has about four bytes), at least 1 MiB.
ROWS_OF_A_SEGMENT, LEAST_SEGMENT_BYTES = 16, 2**20


@dataclass(frozen=True)
class Segment:
    """Bytes `begin` to `end` of a file of `size` bytes."""

    file: Path
    begin: int
    end: int
    size: int


class TextRecords:
    """The texts of files: first the segments of plain ones, then the lines of JSONL ones."""

    def __init__(
        self, files: Sequence[Path], config: SourceConfig, tokenizer: Vocabulary, length: int
    ):
        """Indexes the files; `length` is the tokens of a row."""
        self._tokenizer = tokenizer
        step = max(ROWS_OF_A_SEGMENT * length, LEAST_SEGMENT_BYTES) if config.splits else None
        plain = [file for file in files if file.suffix in (".txt", ".md")]
        self._segments = [segment for file in plain for segment in cut_file(file, step)]
        self._lines = Lines([file for file in files if file not in plain])

    def __len__(self) -> int:
        return len(self._segments) + len(self._lines)

    def place(self, index: int) -> str:
        """Returns the place of record `index` for messages."""
        if index >= len(self._segments):
            return self._lines.place(index - len(self._segments))
        segment = self._segments[index]
        if segment.end - segment.begin == segment.size:
            return str(segment.file)
        return f"{segment.file}, bytes {segment.begin} to {segment.end}"

    def read(self, index: int) -> list[Example]:
        """Returns the example of record `index`.

        Raises:
          DataError, RequestError: the record cannot be used.
        """
        if index >= len(self._segments):
            fields = parse_object(self._lines[index - len(self._segments)])
            text = fields.get("text")
            if not isinstance(text, str):
                raise DataError(f"needs the field text, a string, got {type(text).__name__}")
            return [encode_text(text, self._tokenizer)]
        segment = self._segments[index]
        text = decode(read_range(segment.file, segment.begin, segment.end))
        first, last = segment.begin == 0, segment.end == segment.size
        text = text.removeprefix("\ufeff") if first else text  # a byte-order mark is no content
        return [encode_text(text, self._tokenizer, first=first, last=last)]


def encode_text(
    text: str, tokenizer: Vocabulary, *, first: bool = True, last: bool = True
) -> Example:
    """Returns a text as an Example; all tokens but the first have weight 1.

    Args:
      first: whether it begins with BOS. last: whether it ends with EOS.

    Raises:
      DataError: the text is blank.
      RequestError: it holds a lone surrogate.
    """
    if not text.strip():
        raise DataError("is blank; leave it out")
    ids = np.array(tokenizer.encode(text, specials=False), np.int32)
    tokens = np.concatenate([[tokenizer.bos_id] * first, ids, [tokenizer.eos_id] * last])
    return Example(tokens.astype(np.int32), weigh_all(len(tokens)))


def cut_file(file: Path, segment_bytes: int | None) -> list[Segment]:
    """Returns the segments of a file; with None, the whole file is one."""
    size = file.stat().st_size
    step = segment_bytes or max(size, 1)
    begins = range(0, max(size, 1), step)  # an empty file is a record too: a bad one
    return [Segment(file, begin, min(begin + step, size), size) for begin in begins]
