"""Requests to the engine: a document, its questions, and how an answer's tokens are chosen.

Every value is checked when it is made: the code below this file gets valid requests only.
"""

import dataclasses
import math
from dataclasses import dataclass, field

from v4jax.config.inference import SamplingConfig
from v4jax.config.ranges import MAX_SEED, MOST_TOKENS
from v4jax.errors import RequestError


@dataclass(frozen=True)
class SamplingOptions(SamplingConfig):
    """A checked `SamplingConfig`."""

    def __post_init__(self):
        _check_number("temperature", self.temperature, "at least 0", lambda t: t >= 0)
        _check_number("top_p", self.top_p, "greater than 0 and at most 1", lambda p: 0 < p <= 1)
        _check_integer("top_k", self.top_k, 0, "0 keeps every token", 1 << 24)
        _check_integer("seed", self.seed, 0, "choose another", MAX_SEED)
        _check_integer("max_new_tokens", self.max_new_tokens, 1, "an answer ends", MOST_TOKENS)
        if not isinstance(self.logprobs, bool):
            raise RequestError(f"logprobs must be true or false, got {describe(self.logprobs)}")

    def replace(self, **overrides: float) -> "SamplingOptions":
        """Returns the options with some fields changed; the result is checked again."""
        return dataclasses.replace(self, **overrides)


@dataclass(frozen=True)
class FileIdentity:
    """What a file held: its size, and half of the SHA-256 of its bytes."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Question:
    """One question to a document: `text`, and how its answer is chosen."""

    text: str
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def __post_init__(self):
        _check_text("question", self.text)


@dataclass(frozen=True)
class Document:
    """A text and the questions to it.

    Attributes:
      text: the document; it is read once, and its state serves every question.
      questions: at least one question.
      id: the caller's name for the document, given back with each answer.
      file: what the file was from which the text was read.
    """

    text: str
    questions: tuple[Question, ...]
    id: str | int | None = None
    file: FileIdentity | None = None

    def __post_init__(self):
        _check_text("text", self.text)
        if not self.questions:
            raise RequestError("questions must hold at least one question, got none")


@dataclass(frozen=True)
class Text:
    """A text to be scored, and what precedes it; `id` and `file` as of a `Document`."""

    text: str
    context: str = ""
    id: str | int | None = None
    file: FileIdentity | None = None

    def __post_init__(self):
        _check_text("text", self.text)
        if self.context != "":
            _check_text("context", self.context)


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} must be a string, got {describe(text)}")
    if not text.strip():
        raise RequestError(f"{name} must not be empty, got {text[:20]!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} must be valid Unicode, got the lone surrogate {text[error.start]!r} at "
            f"character {error.start}"
        ) from error


def _check_number(name: str, value: object, rule: str, holds) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and _is_finite(value) and holds(value)):
        raise RequestError(f"{name} must be a number {rule}, got {describe(value)}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits is no float
        return False


def _check_integer(
    name: str, value: object, low: int, remedy: str, high: int | None = None
) -> None:
    integer = isinstance(value, int) and not isinstance(value, bool)
    if not (integer and low <= value and (high is None or value <= high)):
        rule = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be an integer {rule}, got {describe(value)}; {remedy}")


def describe(value: object) -> str:
    """Returns a received value for an error message, shortened."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
