"""From the ids a model writes to an answer: pieces of text while they arrive, then the whole."""

from dataclasses import dataclass, field

from v4jax.errors import CompletionError
from v4jax.tokenizer import ContentText, ReasoningText, StreamDecoder, StreamSplitter, assemble

Piece = ContentText | ReasoningText  # of the text that is shown while it is written


@dataclass(frozen=True)
class Answer:
    """What the model answered.

    Attributes:
      text: the answer itself.
      finish_reason: `"stop"` when the model ended it, `"length"` when max_new_tokens did.
      reasoning: what was thought before; empty without thinking.
      tool_calls: calls the model made, as in a chat message; usually none.
      prompt_tokens: tokens of the prompt, without those of the shared document.
      answer_tokens: tokens written, EOS included.
      warning: how the model's output left the wire format; empty if it did not. `text` then holds
        all that was written, without control tokens.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int
    reasoning: str = ""
    tool_calls: tuple[dict, ...] = ()
    warning: str = ""


@dataclass
class AnswerReader:
    """Collects one answer from its tokens.

    The wire format is read tolerantly. Output that leaves it even so (models with random weights
    write control tokens anywhere) is text without its control tokens from there on.
    """

    tokenizer: object
    mode: str
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self):
        self._splitter = StreamSplitter(self.mode, tolerant=True)
        self._decoder = StreamDecoder(self.tokenizer)
        self._events, self._shown, self._warning = [], "", ""

    def push(self, token: int) -> list[Piece]:
        """Takes the next token, EOS included; returns the pieces of text to show."""
        self.tokens.append(token)
        return self._read(self._decoder.push(token))

    def finish(self) -> tuple[list[Piece], Answer]:
        """Ends the answer; returns the last pieces of text and the whole."""
        pieces = self._read(self._decoder.finish(), last=True)
        message = assemble(self._events)
        stopped = bool(self.tokens) and self.tokens[-1] == self.tokenizer.eos_id
        return pieces, Answer(
            text=message["content"],
            finish_reason="stop" if stopped else "length",
            prompt_tokens=self.prompt_tokens,
            answer_tokens=len(self.tokens),
            reasoning=message["reasoning_content"],
            tool_calls=tuple(message["tool_calls"]),
            warning=self._warning,
        )

    def _read(self, text: str, last: bool = False) -> list[Piece]:
        if self._warning:
            events = [ContentText(text)]
        else:
            try:
                events = self._splitter.push(text)
                events += self._splitter.finish() if last else []
            except CompletionError as error:
                self._warning = str(error)
                events = [ContentText(self._reread(last))]
        self._events += events
        pieces = [event for event in events if isinstance(event, Piece) and event.text]
        self._shown += "".join(piece.text for piece in pieces)
        return pieces

    def _reread(self, last: bool) -> str:
        """Returns the plain text not yet shown, and leaves control tokens out from now on."""
        self._decoder = StreamDecoder(self.tokenizer, specials=False)
        plain = "".join(map(self._decoder.push, self.tokens))
        plain += self._decoder.finish() if last else ""
        return plain.removeprefix(self._shown) if plain.startswith(self._shown) else ""
