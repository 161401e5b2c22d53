"""The input of a batch job: each line is a JSON object with a document and its questions.

    {"text": "It was …", "question": "Who?"}
    {"id": "a7", "path": "reports/a7.txt", "questions": ["Who?", "When?"], "temperature": 0.7}

    id          string or integer, given back with the answers (optional)
    text, path  exactly one: the document, or a UTF-8 file, relative to the folder of the input file
    question, questions   exactly one: a string, or a list of strings
    temperature, top_p, top_k, seed, max_new_tokens   in place of the job's (optional)

Blank lines are skipped and counted. A line that breaks a rule raises RequestError; other lines are
not affected.
"""

import dataclasses
import difflib
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from v4jax.config.json_keys import parse_json
from v4jax.errors import RequestError
from v4jax.files import is_remote, to_path
from v4jax.inference.request import Document, Question, SamplingOptions, describe

_SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingOptions))
_FIELDS = ("id", "text", "path", "question", "questions", *_SAMPLING_FIELDS)


@dataclass(frozen=True)
class InputLine:
    """A line of the input, unread.

    Attributes:
      number: counted from 1.
      data: its bytes, without the end of the line.
    """

    number: int
    data: bytes

    @property
    def digest(self) -> str:
        """Identifies the content: shows whether the input changed while a job was interrupted."""
        return hashlib.sha256(self.data).hexdigest()[:16]


def open_path(path: str) -> BinaryIO:
    """Opens a file for reading bytes.

    Raises:
      UnsupportedError: the path names a bucket, and the library for it is not installed.
      RequestError: there is no such file, or it cannot be read.
    """
    try:
        if is_remote(path):
            return to_path(path).open()
        regular = stat.S_ISREG(os.stat(path).st_mode)  # opening a pipe would wait for a writer
        if regular:
            return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read {path}: {reason}") from error
    raise RequestError(f"cannot read {path}: it is not a regular file")


def read_lines(path: str) -> Iterator[InputLine]:
    """Yields the lines of the input file that are not blank."""
    with open_path(path) as file:
        for number, data in enumerate(file, start=1):
            data = data.rstrip(b"\r\n")
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")  # a byte-order mark is no content
            if data.strip():
                yield InputLine(number, data)


def parse_line(line: InputLine) -> dict[str, Any]:
    """Returns the JSON object of a line, with field names checked."""
    text = decode_utf8(line.data, "the line")
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise RequestError(f"the line is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f"the line must be a JSON object, got {describe(fields)}")
    for name in fields:
        if name not in _FIELDS:
            nearest = difflib.get_close_matches(name, _FIELDS, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(_FIELDS)}"
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


def build_document(fields: dict[str, Any], folder: str, defaults: SamplingOptions) -> Document:
    """Returns the document that a line describes; reads its file.

    Args:
      fields: the object that `parse_line` returned.
      folder: folder at which relative paths start.
      defaults: sampling options that the line does not state.
    """
    sampling = defaults.replace(**{n: fields[n] for n in _SAMPLING_FIELDS if n in fields})
    questions = read_questions(fields)
    source = _only_one(fields, "text", "path")
    text = fields["text"] if source == "text" else _read_document(fields["path"], folder)
    return Document(text, tuple(Question(q, sampling) for q in questions), find_id(fields))


def read_questions(fields: dict[str, Any]) -> list[Any]:
    """Returns the questions of a line, given as one or as a list."""
    if _only_one(fields, "question", "questions") == "question":
        return [fields["question"]]
    if not isinstance(fields["questions"], list):
        raise RequestError(
            f"questions must be a list of strings, got {describe(fields['questions'])}"
        )
    return fields["questions"]


def resolve_path(path: Any, folder: str) -> str:
    """Returns the path of a document's file."""
    if not isinstance(path, str) or not path:
        raise RequestError(f"path must be a string, got {describe(path)}")
    return path if is_remote(path) else os.path.join(folder, path)


def decode_utf8(data: bytes, what: str) -> str:
    """Returns the text of UTF-8 bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{what} is not UTF-8: byte 0x{data[error.start]:02x} at position {error.start}"
        ) from error


def _read_document(path: Any, folder: str) -> str:
    path = resolve_path(path, folder)
    with open_path(path) as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    text = decode_utf8(data, path)
    if not text.strip():
        raise RequestError(f"{path} is empty")
    return text


def _only_one(fields: dict[str, Any], first: str, second: str) -> str:
    given = [name for name in (first, second) if name in fields]
    if len(given) != 1:
        raise RequestError(
            f'the line needs either "{first}" or "{second}", got {"both" if given else "neither"}'
        )
    return given[0]
