"""Tokens and seconds of a job: its speed, what is left, and a summary at the end."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from v4jax import log

_PRIOR = 0.01  # of what was timed, for the guess that both kinds of work have one speed


class Meter:
    """Counts the work of a job and estimates what is left.

    A document's tokens are known once it is encoded. Until then they are estimated from its bytes,
    at the ratio of the documents so far. Answers are estimated to be as long as those so far.

    The seconds of reading are not proportional to tokens: a token further back sees more. They are
    the work with weights and the work by length, each at the speed that the chunks so far had.

    Args:
      document_bytes: bytes of each document to be read.
      questions: number of questions to be answered.
      max_new_tokens: assumed length of an answer before the first one.

    Attributes:
      work: (first, end) → operations of reading the tokens from `first` to before `end`: with
        weights, and with what the tokens see. An engine's `reading_work`; until there is one,
        reading costs the same everywhere.
    """

    def __init__(self, document_bytes: Iterable[int], questions: int, max_new_tokens: int):
        self.reading, self.writing = log.Rate(), log.Rate()
        self.cache_bytes = 0
        self.passes = self.pass_tokens = 0  # steps of writing, and the tokens that they wrote
        self.work: Callable[[int, int], tuple[float, float]] = lambda first, end: (end - first, 0.0)
        sizes = list(document_bytes)
        self._unread, self._bytes_left = collections.Counter(map(_round_size, sizes)), sum(sizes)
        self._questions_left = questions
        self._answer_tokens, self._answers = max_new_tokens, 1
        self._encoded_bytes = self._encoded_tokens = 0
        self._position = self._tokens_left = 0  # in the current document
        self._speed = _TwoSpeeds()
        self._unread_work: tuple[float, float] | None = None  # computed once for each document

    def begin_document(self, document_bytes: int, tokens: int) -> None:
        """Records that a document is about to be read."""
        self._leave(document_bytes)
        self._encoded_bytes += document_bytes
        self._encoded_tokens += tokens
        self._position, self._tokens_left = 0, tokens

    def give_up(self, document_bytes: int | None, questions: int) -> None:
        """Records that a document failed.

        Args:
          document_bytes: of a document that was not begun.
          questions: those that will not be answered.
        """
        if document_bytes is not None:
            self._leave(document_bytes)
        self._questions_left -= questions
        self._tokens_left = 0

    def read(self, tokens: int) -> None:
        """Counts a chunk of the current document."""
        seconds = self.reading.seconds
        self.reading.add(tokens)
        end = self._position + tokens
        self._speed.add(self.work(self._position, end), self.reading.seconds - seconds)
        self._position = end
        self._tokens_left -= tokens

    def wrote(self, tokens: int, passes: int) -> None:
        """Counts an answer's tokens, of which reading gave the first, and the passes behind it."""
        self.pass_tokens += max(tokens - 1, 0)
        self.passes += passes

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
        unread = max(self._bytes_left, 0) * self._tokens_per_byte
        return self.done + max(self._tokens_left, 0) + unread + self._writing_left()

    @property
    def seconds_left(self) -> float | None:
        """Estimated time left; None before anything was read."""
        if self.reading.per_second is None:
            return None
        left = max(self._tokens_left, 0)
        own = self.work(self._position, self._position + left) if left else (0.0, 0.0)
        seconds = self._speed.seconds(own) + self._speed.seconds(self._work_unread())
        if self.writing.per_second is not None:
            seconds += self._writing_left() / self.writing.per_second
        return seconds

    @property
    def _tokens_per_byte(self) -> float:
        return self._encoded_tokens / self._encoded_bytes if self._encoded_bytes else 0.25

    def _leave(self, document_bytes: int) -> None:
        self._unread[_round_size(document_bytes)] -= 1
        self._bytes_left -= document_bytes
        self._unread_work = None

    def _work_unread(self) -> tuple[float, float]:
        """Returns the work of all documents that were not begun."""
        if self._unread_work is None:
            found = [
                (count, self.work(0, max(round(size * self._tokens_per_byte), 1)))
                for size, count in self._unread.items()
                if count > 0 and size
            ]
            self._unread_work = tuple(sum(n * work[i] for n, work in found) for i in range(2))
        return self._unread_work

    def _writing_left(self) -> float:
        return max(self._questions_left, 0) * self._answer_tokens / max(self._answers, 1)


def _round_size(document_bytes: int) -> int:
    """Returns a size to 3 %: a million documents then have some two hundred sizes."""
    shift = max(document_bytes.bit_length() - 5, 0)
    return document_bytes >> shift << shift | (1 << shift >> 1)


class _TwoSpeeds:
    """Seconds of two kinds of work, by least squares over what was timed."""

    def __init__(self):
        self._products = [[0.0, 0.0], [0.0, 0.0]]  # Σ work_i · work_j
        self._timed = [0.0, 0.0]  # Σ work_i · seconds
        self._work, self._seconds = 0.0, 0.0

    def add(self, work: tuple[float, float], seconds: float) -> None:
        """Counts work that took some seconds."""
        for i in range(2):
            self._timed[i] += work[i] * seconds
            for j in range(2):
                self._products[i][j] += work[i] * work[j]
        self._work += sum(work)
        self._seconds += seconds

    def seconds(self, work: tuple[float, float]) -> float:
        """Returns how long work takes."""
        return sum(amount * cost for amount, cost in zip(work, self._costs(), strict=True))

    def _costs(self) -> tuple[float, float]:
        """Returns the seconds of one operation of each kind.

        As if some of each kind alone had been timed, at the speed of all: where the chunks hardly
        tell the two apart, both operations take the same.
        """
        if not self._work:
            return 0.0, 0.0
        same = self._seconds / self._work
        (aa, ab), (_, bb) = self._products
        a, b = (t + _PRIOR * x * same for t, x in zip(self._timed, (aa, bb), strict=True))
        aa, bb = aa * (1 + _PRIOR), bb * (1 + _PRIOR)
        if not (aa and bb):
            return same, same
        first, second = a * bb - b * ab, b * aa - a * ab
        if first < 0:
            return 0.0, b / bb
        if second < 0:
            return a / aa, 0.0
        determinant = aa * bb - ab * ab
        return first / determinant, second / determinant


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
      tokens_per_pass: tokens that a pass of the model wrote on average (the accepted length), for
        each sequence; None where tokens are not drafted.
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
    tokens_per_pass: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the fields for a JSON file."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Returns the summary as lines of text."""
        before = f" ({self.questions_before:,} before this run)" if self.questions_before else ""
        accepted = self.tokens_per_pass
        speculation = [f"drafts     {accepted:.2f} tokens written a pass"] if accepted else []
        return [
            f"documents  {self.documents:,}, of them failed {self.failed:,}",
            f"questions  {self.questions:,} answered{before}",
            f"read       {self.tokens_read:,} tokens{_speed(self.read_tokens_per_second)}",
            f"written    {self.tokens_written:,} tokens{_speed(self.write_tokens_per_second)}",
            *speculation,
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
    drafts: bool = False,
) -> Summary:
    """Returns the summary of a job: the records of its output, and the meter of this run.

    Args:
      drafts: whether tokens were drafted.
    """
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
        tokens_per_pass=meter.pass_tokens / meter.passes if drafts and meter.passes else None,
    )


def _speed(per_second: float | None) -> str:
    return "" if per_second is None else f", {per_second:,.1f} tokens/s in this run"


@dataclass(frozen=True)
class ScoreSummary:
    """What a job that scores texts found; counts describe the output file.

    Attributes:
      logprob: of all texts together; `perplexity` of a token and `bits_per_byte` follow from it,
        None without a text.
    """

    documents: int
    failed: int
    tokens: int
    bytes: int
    logprob: float
    perplexity: float | None
    bits_per_byte: float | None
    read_tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """Returns the fields for a JSON file."""
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        """Returns the summary as lines of text."""
        lines = [
            f"texts      {self.documents:,}, of them failed {self.failed:,}",
            f"scored     {self.tokens:,} tokens{_speed(self.read_tokens_per_second)}",
        ]
        if self.perplexity is not None:
            bits = f"{self.bits_per_byte:.4f} bits per byte"
            lines.append(f"perplexity {self.perplexity:.4f} a token, {bits}")
        return lines


def summarize_scores(records: Iterable[Mapping[str, Any]], meter: Meter) -> ScoreSummary:
    """Returns the summary of a job that scores texts: all tokens count alike."""
    records = list(records)
    scores = [record for record in records if "error" not in record]
    tokens, size = (sum(score[name] for score in scores) for name in ("tokens", "bytes"))
    logprob = math.fsum(score["logprob"] for score in scores)
    return ScoreSummary(
        documents=len(records),
        failed=len(records) - len(scores),
        tokens=tokens,
        bytes=size,
        logprob=logprob,
        perplexity=math.exp(-logprob / tokens) if tokens else None,
        bits_per_byte=-logprob / math.log(2) / size if tokens else None,
        read_tokens_per_second=meter.reading.per_second,
    )
