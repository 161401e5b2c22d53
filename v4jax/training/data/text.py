"""Plain text as training examples: BOS, the text, EOS, with loss on everything behind BOS.

    notes.txt, book.md        one document a file
    corpus.jsonl              one document a line: {"text": "…"}; other fields are not used

The text is data from outside: a control token's literal in it is ordinary text.

A .txt or .md file of more than `SEGMENT_BYTES` is read in segments of that size where long
documents are split anyway, so that no corpus has to fit into memory. Only the first segment begins
with BOS, only the last ends with EOS.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from v4jax.config.data import SourceConfig
from v4jax.errors import DataError
from v4jax.tokenizer import Vocabulary
from v4jax.training.data.document import Document, weigh_all
from v4jax.training.data.files import Lines, decode, parse_object, read_range

SUFFIXES = (".txt", ".md", ".jsonl")
SEGMENT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Segment:
    """Bytes `begin` to `end` of a file of `size` bytes."""

    file: Path
    begin: int
    end: int
    size: int


class TextRecords:
    """The texts of files: first the segments of plain ones, then the lines of JSONL ones."""

    def __init__(self, files: Sequence[Path], config: SourceConfig, tokenizer: Vocabulary):
        self._tokenizer = tokenizer
        plain = [file for file in files if file.suffix != ".jsonl"]
        self._segments = [s for file in plain for s in cut_file(file, whole=not config.splits)]
        self._lines = Lines([file for file in files if file.suffix == ".jsonl"])

    def __len__(self) -> int:
        return len(self._segments) + len(self._lines)

    def place(self, index: int) -> str:
        """Returns where record `index` stands."""
        if index >= len(self._segments):
            return self._lines.place(index - len(self._segments))
        segment = self._segments[index]
        if segment.end - segment.begin == segment.size:
            return str(segment.file)
        return f"{segment.file}, bytes {segment.begin} to {segment.end}"

    def read(self, index: int) -> Document:
        """Returns record `index`.

        Raises:
          DataError, RequestError: the record cannot be used.
        """
        if index >= len(self._segments):
            fields = parse_object(self._lines[index - len(self._segments)])
            text = fields.get("text")
            if not isinstance(text, str):
                raise DataError(f"needs the field text, a string, got {type(text).__name__}")
            return encode_text(text, self._tokenizer)
        segment = self._segments[index]
        text = decode(read_range(segment.file, segment.begin, segment.end))
        first, last = segment.begin == 0, segment.end == segment.size
        text = text.removeprefix("\ufeff") if first else text  # a byte-order mark is no content
        return encode_text(text, self._tokenizer, first=first, last=last)


def encode_text(
    text: str, tokenizer: Vocabulary, *, first: bool = True, last: bool = True
) -> Document:
    """Returns a text as a Document of which all but the first token have weight 1.

    Args:
      first: begin with BOS; `last`: end with EOS.

    Raises:
      DataError: the text is blank.
      RequestError: it holds a lone surrogate.
    """
    if not text.strip():
        raise DataError("is blank; leave it out")
    ids = tokenizer.encode(text, specials=False)
    tokens = [tokenizer.bos_id] * first + ids + [tokenizer.eos_id] * last
    return Document(tokens, weigh_all(len(tokens)))


def cut_file(file: Path, *, whole: bool) -> list[Segment]:
    """Returns the segments of a file; a `whole` file is one."""
    size = file.stat().st_size
    step = size if whole else SEGMENT_BYTES
    begins = range(0, size, step) if size else (0,)
    return [Segment(file, begin, min(begin + step, size), size) for begin in begins]
