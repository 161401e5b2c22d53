"""From the ids that a model writes to an answer: pieces while they arrive, then the whole."""

from dataclasses import dataclass, field

from v4jax.inference.sampling import NOT_FINITE
from v4jax.tokenizer import (
    COMPLETION_CONTROLS,
    ContentText,
    Departure,
    ReasoningText,
    StreamDecoder,
    StreamSplitter,
    assemble,
)

Piece = ContentText | ReasoningText  # a piece of text, shown while the answer is written


@dataclass(frozen=True)
class Answer:
    """What the model answered.

    Attributes:
      text: the answer itself.
      finish_reason: `"stop"` if the model ended it, `"length"` if max_new_tokens did, `"error"` if
        it had to be given up.
      reasoning: the text before the answer; empty without thinking.
      tool_calls: the model's calls, as in a chat message; usually none.
      prompt_tokens: tokens of the prompt, without those of the shared document.
      answer_tokens: tokens written, EOS included.
      passes: steps of the model that wrote all of them but the first, which reading gave.
      warning: how the model's output left the format and was read nevertheless; empty if it did
        not.
      error: why the answer was given up; `text` is what the model wrote until then.
      tokens: ids of what was written, the end token included.
      logprobs: {"id", "token", "logprob"} of each token, where the question's sampling asks for it.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int
    passes: int = 0
    reasoning: str = ""
    tool_calls: tuple[dict, ...] = ()
    warning: str = ""
    error: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[dict, ...] = ()


def explain_not_finite(where: str) -> str:
    """Returns the message about numbers that are not finite, with what to do."""
    return (
        f"the model computed NaN or infinity {where}: its weights are damaged, or too large for "
        "these numerics; fetch the checkpoint again, or compare with --numerics=float32"
    )


@dataclass
class AnswerReader:
    """Collects one answer from its tokens.

    The format is read tolerantly. Control tokens that do not belong in an answer are left out;
    models with random weights write them anywhere.
    """

    tokenizer: object
    mode: str
    prompt_tokens: int
    end_tokens: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self):
        self._splitter = StreamSplitter(self.mode, tolerant=True)
        self._decoder = StreamDecoder(self.tokenizer, keep=COMPLETION_CONTROLS)
        self._events = []
        self._error = ""

    def push(self, *tokens: int) -> list[Piece]:
        """Takes a step's tokens, the end token or `NOT_FINITE` included; returns text to show."""
        self.steps += 1
        return [piece for token in tokens for piece in self._push(token)]

    def _push(self, token: int) -> list[Piece]:
        if token == NOT_FINITE:
            self._error = explain_not_finite(f"for token {len(self.tokens) + 1:,} of the answer")
            return []
        self.tokens.append(token)
        if token in self.end_tokens:  # whatever its literal, it ends a turn as EOS does
            token = self.tokenizer.eos_id
        return self._read(self._decoder.push(token))

    def finish(self) -> tuple[list[Piece], Answer]:
        """Ends the answer; returns the last pieces of text and the whole."""
        pieces = self._read(self._decoder.finish(), last=True)
        message = assemble(self._events)
        stopped = bool(self.tokens) and self.tokens[-1] in self.end_tokens
        return pieces, Answer(
            text=message["content"],
            finish_reason="error" if self._error else "stop" if stopped else "length",
            prompt_tokens=self.prompt_tokens,
            answer_tokens=len(self.tokens),
            passes=max(self.steps - 1, 0),
            reasoning=message["reasoning_content"],
            tool_calls=tuple(message["tool_calls"]),
            warning=self._describe_departures(),
            error=self._error,
            tokens=tuple(self.tokens),
        )

    def _read(self, text: str, last: bool = False) -> list[Piece]:
        events = self._splitter.push(text)
        events += self._splitter.finish() if last else []
        self._events += events
        return [event for event in events if isinstance(event, Piece) and event.text]

    def _describe_departures(self) -> str:
        """Returns the first departures from the wire format, and how many more there were."""
        found = [event.text for event in self._events if isinstance(event, Departure)]
        left_out = dict.fromkeys(self._decoder.left_out)
        if left_out:
            found.append(f"control tokens were left out: {', '.join(left_out)}")
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        return "; ".join(found[:3]) + more
