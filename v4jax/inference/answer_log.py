"""The output of a batch job: JSON lines, appended so that no crash loses or doubles an answer.

An answer, and a document that failed:

    {"line": 3, "id": "a7", "question_index": 0, "question": "Who?", "answer": "…",
     "finish_reason": "stop", "tokens": {"document": 64000, "question": 9, "answer": 40},
     "input": "5e88…", "job": "9f2b…"}
    {"line": 4, "id": null, "error": {"kind": "RequestError", "message": "…"},
     "input": "0c41…", "job": "9f2b…"}

    line            of the input, counted from 1, and `question_index` within it from 0
    finish_reason   "stop": the model ended the answer; "length": max_new_tokens did
    tokens.answer   EOS included
    reasoning, tool_calls, warning   only where there are any
    input, job      digests of the input line and of the job's settings

Lines are written in one piece and forced to disk before the job goes on. What a crash can leave is
an incomplete last line; it is cut off when the job is started again. While a job runs it holds a
lock on the file, which ends with the process. In a bucket all this is done by numbered parts:
`answer_parts.py`.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from v4jax.errors import V4JaxError
from v4jax.files import is_remote
from v4jax.inference.answer_parts import Parts

_ERROR_INDEX = -1  # stands for the question index of a line that says why a document failed


class AnswerLog:
    """An output opened for one job.

    Args:
      path: created if it does not exist.
      job: digest of the settings that determine the answers.
      overwrite: begin with an empty file.

    Attributes:
      records: (line, question index) → its record, without the texts.

    Raises:
      V4JaxError: another job holds the file, or it was not written by this job.
    """

    def __init__(self, path: str, job: str, *, overwrite: bool = False):
        self.path, self.job = path, job
        self.records: dict[tuple[int, int], dict[str, Any]] = {}
        self._output = (Parts if is_remote(path) else _File)(path, overwrite=overwrite)
        try:
            for place, data in self._output.lines():
                record = self._parse(place, data)
                if _key(record) in self.records:
                    raise V4JaxError(
                        f"{place} repeats an answer; overwrite the file or choose another output"
                    )
                self.records[_key(record)] = _without_texts(record)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the output and so gives up the lock."""
        self._output.close()

    def has(self, line: int, question_index: int) -> bool:
        """Says whether the answer stands in the file."""
        return (line, question_index) in self.records

    def has_failed(self, line: int) -> bool:
        """Says whether the document is marked as failed."""
        return (line, _ERROR_INDEX) in self.records

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes records as one piece, and returns when they are safe."""
        records = [dict(record) | {"job": self.job} for record in records]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._output.append(text.encode("utf-8", errors="backslashreplace"))
        self.records |= {_key(record): _without_texts(record) for record in records}

    def finish(self) -> None:
        """Makes the output what it is to be when every question is answered."""
        self._output.finish()

    def _parse(self, place: str, data: bytes) -> dict[str, Any]:
        try:
            record = json.loads(data)
            _key(record), record["input"], record["job"]
        except (ValueError, KeyError, TypeError) as error:
            raise V4JaxError(
                f"{place} was not written by v4jax batch; overwrite the file or "
                "choose another output"
            ) from error
        if record["job"] != self.job:
            raise V4JaxError(
                f"{self.path} was written with another model or other settings; start with the "
                "same ones to continue, overwrite the file, or choose another output"
            )
        return record


class _File:
    """An output on a disk of this machine, opened, locked and appended to."""

    def __init__(self, path: str, *, overwrite: bool):
        self.path = path
        try:
            if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
                raise V4JaxError(
                    f"cannot write {path}: it is not a regular file, and a job continues from what "
                    "stands in one; copy the answers on when it has ended"
                )
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
            reason = getattr(error, "strerror", None) or error
            raise V4JaxError(f"cannot write {path}: {reason}") from error
        try:
            self._lock()
            if overwrite:
                os.ftruncate(self.descriptor, 0)
            _sync_folder(path)
        except BaseException:
            self.close()
            raise

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """Yields every line, with its place for messages; cuts off one that is not complete."""
        end = 0
        with open(self.path, "rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.endswith(b"\n"):
                    os.ftruncate(self.descriptor, end)
                    break
                end += len(data)
                yield f"{self.path} line {number}", data

    def append(self, data: bytes) -> None:
        """Writes lines as one piece, and returns when they are on disk."""
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
            os.fsync(self.descriptor)
        except OSError as error:
            raise V4JaxError(
                f"cannot write {self.path}: {error.strerror}; start the job again when that is "
                "repaired, and it will continue"
            ) from error

    def finish(self) -> None:
        """Does nothing: all answers stand in the file."""

    def close(self) -> None:
        """Closes the file and so gives up the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise V4JaxError(
                f"another job is writing {self.path}; wait for it, or choose another output"
            ) from error
        except OSError as error:
            raise V4JaxError(f"cannot lock {self.path}: {error.strerror}") from error


def _key(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["line"], _ERROR_INDEX if "error" in record else record["question_index"]


def _without_texts(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("line", "input", "tokens", "error") if name in record}


def _sync_folder(path: str) -> None:
    """Makes the file's name survive a crash of the machine."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
