"""The input of a batch job: each line is a JSON object with a document and its questions.

    {"text": "It was …", "question": "Who?"}
    {"id": "a7", "path": "reports/a7.txt", "questions": ["Who?", "When?"], "temperature": 0.7}

    id          string or integer, given back with the answers (optional)
    text, path  exactly one: the document, or a UTF-8 file, relative to the folder of the input file
    question, questions   exactly one: a string, or a list of strings
    temperature, top_p, top_k, seed, max_new_tokens, logprobs   in place of the job's (optional)

Blank lines are skipped and counted. A line that breaks a rule raises RequestError; other lines are
not affected.
"""

import dataclasses
import difflib
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from v4jax.config.json_keys import parse_json
from v4jax.errors import RequestError
from v4jax.inference.document_files import DocumentFiles, explained, open_path
from v4jax.inference.request import (
    Document,
    FileIdentity,
    Question,
    SamplingOptions,
    Text,
    describe,
)

MAX_LINE_BYTES = 1 << 30  # a longer line is not kept in memory
_BLOCK_BYTES, _KEPT_BYTES = 1 << 24, 1 << 16  # read at once of what is too long; kept of it
_SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingOptions))
FIELDS = ("id", "text", "path", "question", "questions", *_SAMPLING_FIELDS)
SCORE_FIELDS = ("id", "text", "path", "context")


@dataclass(frozen=True)
class InputLine:
    """A line of the input, unread.

    Attributes:
      number: counted from 1.
      data: its bytes, without the end of the line.
      excess: bytes of a line of more than `MAX_LINE_BYTES`, of which `data` is the beginning.
    """

    number: int
    data: bytes
    excess: int = 0

    @property
    def digest(self) -> str:
        """Identifies the content: shows whether the input changed while a job was interrupted."""
        digest = hashlib.sha256(self.data)
        digest.update(str(self.excess or "").encode())
        return digest.hexdigest()[:16]


def read_lines(path: str) -> Iterator[InputLine]:
    """Yields the lines of the input file that are not blank.

    Raises:
      RequestError: the file cannot be read.
    """
    with open_path(path) as file:
        for number in itertools.count(1):
            with explained(path):
                data, size = _read_line(file)
            if not size:
                return
            data = data.rstrip(b"\r\n")
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is no content
            if size > MAX_LINE_BYTES:
                yield InputLine(number, data, size)
            elif data.strip():
                yield InputLine(number, data)


def _read_line(file: BinaryIO) -> tuple[bytes, int]:
    """Returns the next line and its bytes; only the beginning of one that is too long."""
    data = file.readline(MAX_LINE_BYTES + 1)
    size = len(data)
    if size <= MAX_LINE_BYTES:
        return data, size
    while not data.endswith(b"\n") and (more := file.readline(_BLOCK_BYTES)):
        size += len(more)
        data = data[:_KEPT_BYTES] + more[-1:]
    return data[:_KEPT_BYTES], size


def parse_line(line: InputLine, known: tuple[str, ...] = FIELDS) -> dict[str, Any]:
    """Returns the JSON object of a line, with field names checked."""
    if line.excess:
        raise RequestError(
            f"the line has {line.excess:,} bytes, and at most {MAX_LINE_BYTES:,} are read; put the "
            "document into a file and name it with path"
        )
    text = decode_utf8(line.data, "the line")
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise RequestError(f"the line is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the line must be a JSON object, got {describe(fields)}")
    for name in fields:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
            raise RequestError(f"unknown field {describe(name)}; {hint}")
    return fields


def find_id(fields: dict[str, Any]) -> str | int | None:
    """Returns the document's id.

    Raises:
      RequestError: it is neither a string nor an integer.
    """
    value = fields.get("id")
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise RequestError(f"id must be a string or an integer, got {describe(value)}")
    return value


def build_document(
    fields: dict[str, Any], files: DocumentFiles, defaults: SamplingOptions, max_bytes: int
) -> Document:
    """Returns the document that a line describes; reads its file.

    Args:
      fields: the object that `parse_line` returned.
      files: reads the files that lines name.
      defaults: sampling options that the line does not state.
      max_bytes: bytes that the context can hold at most; a longer file is not read.
    """
    sampling = defaults.replace(**{n: fields[n] for n in _SAMPLING_FIELDS if n in fields})
    questions = read_questions(fields)
    asked, name = tuple(Question(q, sampling) for q in questions), find_id(fields)
    text, identity = _read_text(fields, files, max_bytes)
    return Document(text, asked, name, identity)


def build_text(fields: dict[str, Any], files: DocumentFiles, max_bytes: int) -> Text:
    """Returns the text to be scored that a line describes; as `build_document`."""
    text, identity = _read_text(fields, files, max_bytes)
    return Text(text, fields.get("context", ""), find_id(fields), identity)


def _read_text(
    fields: dict[str, Any], files: DocumentFiles, max_bytes: int
) -> tuple[str, FileIdentity | None]:
    if _only_one(fields, "text", "path") == "text":
        return fields["text"], None
    data, identity = files.read(fields["path"], max_bytes)
    path = files.resolve(fields["path"])
    text = decode_utf8(data.removeprefix(b"\xef\xbb\xbf"), path)
    if not text.strip():
        raise RequestError(f"{path} is empty")
    return text, identity


def read_questions(fields: dict[str, Any]) -> list[Any]:
    """Returns the questions of a line, given as one or as a list."""
    if _only_one(fields, "question", "questions") == "question":
        return [fields["question"]]
    if not isinstance(fields["questions"], list):
        raise RequestError(
            f"questions must be a list of strings, got {describe(fields['questions'])}"
        )
    return fields["questions"]


def decode_utf8(data: bytes, what: str) -> str:
    """Returns the text of UTF-8 bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}"
        ) from error


def _only_one(fields: dict[str, Any], first: str, second: str) -> str:
    given = [name for name in (first, second) if name in fields]
    if len(given) != 1:
        raise RequestError(
            f'the line needs either "{first}" or "{second}", got {"both" if given else "neither"}'
        )
    return given[0]
