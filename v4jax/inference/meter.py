"""Tokens and seconds of a job: its speed, what is left, and a summary at the end."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from v4jax import log


class Meter:
    """Counts the work of a job and estimates what is left.

    A document's tokens are known once it is encoded. Until then they are estimated from its bytes,
    at the ratio of the documents so far. Answers are estimated to be as long as those so far.

    Args:
      document_bytes: bytes of all documents to be read.
      questions: number of questions to be answered.
      max_new_tokens: assumed length of an answer before the first one.
    """

    def __init__(self, document_bytes: int, questions: int, max_new_tokens: int):
        self.reading, self.writing = log.Rate(), log.Rate()
        self.cache_bytes = 0
        self._bytes_left, self._questions_left = document_bytes, questions
        self._answer_tokens, self._answers = max_new_tokens, 1
        self._encoded_bytes = self._encoded_tokens = self._tokens_left = 0

    def begin_document(self, document_bytes: int, tokens: int) -> None:
        """Records that a document is about to be read."""
        self._bytes_left -= document_bytes
        self._encoded_bytes += document_bytes
        self._encoded_tokens += tokens
        self._tokens_left = tokens

    def give_up(self, document_bytes: int, questions: int) -> None:
        """Records that a document failed, with what will not be read and not be answered."""
        self._bytes_left -= document_bytes
        self._questions_left -= questions
        self._tokens_left = 0

    def read(self, tokens: int) -> None:
        """Counts tokens of the current document."""
        self.reading.add(tokens)
        self._tokens_left -= tokens

    def answered(self, questions: int, tokens: int) -> None:
        """Counts answers that are complete."""
        if self._answers == 1:  # the first answers replace the assumption
            self._answer_tokens = self._answers = 0
        self._answers += questions
        self._answer_tokens += tokens
        self._questions_left -= questions

    @property
    def done(self) -> int:
        """Tokens read and written."""
        return self.reading.units + self.writing.units

    @property
    def total(self) -> float:
        """Estimated number of tokens to be read and written by the whole job."""
        return self.done + self._reading_left() + self._writing_left()

    @property
    def seconds_left(self) -> float | None:
        """Estimated time left; None before anything was read."""
        if self.reading.per_second is None:
            return None
        seconds = self._reading_left() / self.reading.per_second
        if self.writing.per_second is not None:
            seconds += self._writing_left() / self.writing.per_second
        return seconds

    def _reading_left(self) -> float:
        per_byte = self._encoded_tokens / self._encoded_bytes if self._encoded_bytes else 0.25
        return max(self._tokens_left, 0) + max(self._bytes_left, 0) * per_byte

    def _writing_left(self) -> float:
        return max(self._questions_left, 0) * self._answer_tokens / max(self._answers, 1)


@dataclass(frozen=True)
class Summary:
    """What a job did.

    Counts describe the output file, whichever run wrote it. Seconds, rates and cache describe this
    run.

    Attributes:
      tokens_read: tokens of documents, each counted once, and of questions.
      read_seconds: time of reading documents; `write_seconds`: time of questions and answers.
        Neither includes compilation.
      cache_bytes: size of the largest document's cache.
    """

    documents: int
    failed: int
    questions: int
    questions_before: int
    tokens_read: int
    tokens_written: int
    read_seconds: float
    write_seconds: float
    compile_seconds: float
    read_tokens_per_second: float | None
    write_tokens_per_second: float | None
    cache_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Returns the fields for a JSON file."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Returns the summary as lines of text."""
        before = f" ({self.questions_before:,} before this run)" if self.questions_before else ""
        return [
            f"documents  {self.documents:,}, of them failed {self.failed:,}",
            f"questions  {self.questions:,} answered{before}",
            f"read       {self.tokens_read:,} tokens{_speed(self.read_tokens_per_second)}",
            f"written    {self.tokens_written:,} tokens{_speed(self.write_tokens_per_second)}",
            f"cache      {log.format_bytes(self.cache_bytes)} for the largest document",
            f"time       reading {log.format_seconds(self.read_seconds)}, writing "
            f"{log.format_seconds(self.write_seconds)}, compiling "
            f"{log.format_seconds(self.compile_seconds)}",
        ]


def summarize(
    records: Mapping[tuple[int, int], Mapping[str, Any]],
    meter: Meter,
    *,
    questions_before: int,
    compile_seconds: float,
) -> Summary:
    """Returns the summary of a job: the records of its output, and the meter of this run."""
    answers = [record for record in records.values() if "error" not in record]
    document_tokens = {record["line"]: record["tokens"]["document"] for record in answers}
    return Summary(
        documents=len({record["line"] for record in records.values()}),
        failed=len({record["line"] for record in records.values() if "error" in record}),
        questions=len(answers),
        questions_before=questions_before,
        tokens_read=sum(document_tokens.values()) + sum(a["tokens"]["question"] for a in answers),
        tokens_written=sum(answer["tokens"]["answer"] for answer in answers),
        read_seconds=meter.reading.seconds,
        write_seconds=meter.writing.seconds,
        compile_seconds=compile_seconds,
        read_tokens_per_second=meter.reading.per_second,
        write_tokens_per_second=meter.writing.per_second,
        cache_bytes=meter.cache_bytes,
    )


def _speed(per_second: float | None) -> str:
    return "" if per_second is None else f", {per_second:,.1f} tokens/s in this run"
