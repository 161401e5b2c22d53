"""The records of a batch job's output: JSON lines that say which question each of them answers.

An answer, and a document that failed:

    {"line": 3, "id": "a7", "question_index": 0, "question": "Who?", "answer": "…",
     "finish_reason": "stop", "tokens": {"document": 64000, "question": 9, "answer": 40},
     "input": "5e88…", "job": "9f2b…"}
    {"line": 4, "id": null, "error": {"kind": "RequestError", "message": "…"},
     "input": "0c41…", "job": "9f2b…"}

    line            line of the input, counted from 1; `question_index` counts within it from 0
    finish_reason   "stop": the model ended the answer; "length": max_new_tokens did
    tokens.answer   EOS included
    reasoning, tool_calls, warning   only where there are any
    input, job      digests of the input line and of the job's settings
    file            size and digest of the file that the line names

No crash loses or doubles an answer: `answer_output.py`.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from v4jax.errors import V4JaxError
from v4jax.inference.answer_output import open_output

_ERROR_INDEX = -1  # question index of a line that says why a document failed


class AnswerLog:
    """An output opened for one job.

    Args:
      path: file on a disk or in a bucket; created if it does not exist.
      job: digest of the settings that determine the answers.
      overwrite: begin with an empty output.
      retry_failed: take the lines of documents that failed out of the output.

    Attributes:
      records: (line, question index) → its record, without the texts.

    Raises:
      V4JaxError: another job holds the output, or another job or program wrote it.
    """

    def __init__(self, path: str, job: str, *, overwrite: bool = False, retry_failed: bool = False):
        self.path, self.job = path, job
        self.records: dict[tuple[int, int], dict[str, Any]] = {}
        self._output = open_output(path, overwrite=overwrite)
        try:
            for place, data in self._output.lines():
                record = self._parse(place, data)
                if _key(record) in self.records:
                    raise V4JaxError(
                        f"{place} repeats an answer; overwrite the file or choose another output"
                    )
                self.records[_key(record)] = _without_texts(record)
            if retry_failed and any(index == _ERROR_INDEX for _, index in self.records):
                self._output.drop(lambda data: "error" in json.loads(data))
                self.records = {
                    key: record for key, record in self.records.items() if key[1] != _ERROR_INDEX
                }
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the output, which another job may open then."""
        self._output.close()

    def has(self, line: int, question_index: int) -> bool:
        """Says whether the output holds the answer."""
        return (line, question_index) in self.records

    def has_failed(self, line: int) -> bool:
        """Says whether the output marks the document as failed."""
        return (line, _ERROR_INDEX) in self.records

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes records as one piece, and returns when they are safe."""
        records = [dict(record) | {"job": self.job} for record in records]
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._output.append(text.encode("utf-8", errors="backslashreplace"))
        self.records |= {_key(record): _without_texts(record) for record in records}

    def finish(self) -> None:
        """Completes the output when every question is answered."""
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


def _key(record: Mapping[str, Any]) -> tuple[int, int]:
    return record["line"], _ERROR_INDEX if "error" in record else record.get("question_index", 0)


def _without_texts(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: record[name]
        for name in ("line", "input", "file", "tokens", "bytes", "logprob", "error")
        if name in record
    }
