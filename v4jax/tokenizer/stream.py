"""Completions: the model's text as a message, whole or while it is generated.

A completion is what follows the prompt, EOS included:

    [reasoning </think>] content ["\\n\\n" tool calls] EOS

Only thinking mode has reasoning. `StreamSplitter._read` is this grammar; `parse_completion` runs it
over a whole text.
"""

from collections.abc import Generator

from v4jax.errors import CompletionError, ConversationError
from v4jax.tokenizer.events import ContentText, Done, Event, ReasoningText, assemble
from v4jax.tokenizer.scanner import NEED_MORE, Markers, Scanner, quote
from v4jax.tokenizer.tools import TAG_CLOSE, TAG_OPEN, CallReader
from v4jax.tokenizer.vocabulary import BOS, DSML, EOS, THINK_END, THINK_START

MODES = ("chat", "thinking")

# The blank line before the calls belongs to the calls, not to the text.
_STRICT_CALLS = ("\n\n" + TAG_OPEN,)
_TOLERANT_CALLS = (*_STRICT_CALLS, "\n" + TAG_OPEN, TAG_OPEN)
# Control tokens that a completion may contain; no other belongs there.
COMPLETION_CONTROLS = (BOS, EOS, THINK_START, THINK_END, DSML)
_STRICT_MARKERS = Markers(*COMPLETION_CONTROLS, *_STRICT_CALLS)
_TOLERANT_MARKERS = Markers(*COMPLETION_CONTROLS, TAG_CLOSE, *_TOLERANT_CALLS)


def parse_completion(text: str, mode: str, *, tolerant: bool = False) -> dict:
    """Returns the assistant message that the model wrote.

    Args:
      text: the completion, EOS included.
      mode: `"chat"` or `"thinking"`, as the prompt was encoded.
      tolerant: accepts what models do unfinished or by mistake. These are accepted silently: no EOS
        (the length limit), no blank line before the tool calls or other whitespace between their
        tags, tool calls inside the reasoning, reasoning that ends with EOS, tags with doubled bars.
        An event (`Departure`) says how anything else was read: tags that are missing, misspelt or
        not closed, values that are not JSON, stray control tokens. A call that was cut off keeps
        the arguments that arrived, which are then not valid JSON.

    Returns:
      `role`, `content`, `reasoning_content` and `tool_calls`, whose entries have no ids.

    Raises:
      CompletionError: the text leaves the format; the message says where and what was expected.

    Source: the parser published with the V4 checkpoints.
    """
    splitter = StreamSplitter(mode, tolerant=tolerant)
    events = splitter.push(text) + splitter.finish()
    if not tolerant and events[-1].reason == "length":
        raise CompletionError(
            f"{splitter.place}: the completion ends without {splitter.missing}; "
            "tolerant=True accepts a completion cut off by the length limit"
        )
    return assemble(events)


class StreamSplitter:
    """Splits a completion into events while it arrives in pieces of any size.

    Text is passed on as soon as it cannot be part of a tag; no event holds half a tag. The joined
    text of the events is the same for every way of cutting the completion.

    Args:
      mode: `"chat"` or `"thinking"`, as the prompt was encoded.
      tolerant: as for `parse_completion`.
    """

    def __init__(self, mode: str, *, tolerant: bool = False):
        if mode not in MODES:
            raise ConversationError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self._thinking = mode == "thinking"
        self._scanner = Scanner(tolerant=tolerant)
        self._text_type: type[ReasoningText | ContentText] | None = None  # None among tool calls
        self._calls = False
        self._done = False
        self._error: CompletionError | None = None
        self.missing = EOS
        self._events = self._read()

    @property
    def place(self) -> str:
        """What is being read, in the words of error messages."""
        return self._scanner.place

    def push(self, text: str) -> list[Event]:
        """Returns the events that are certain once `text` has arrived.

        Raises:
          CompletionError: the completion leaves the format.
        """
        self._scanner.push(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """Returns the remaining events when no more text comes; without EOS `Done` says `"length"`.

        If generation stopped at EOS and the text lacks it, push `EOS` first.
        """
        self._scanner.release()
        events = self._advance()
        if self._done:
            return events
        rest = self._scanner.pending
        if self._text_type and rest and DSML not in rest:  # no tag came of it: it is text
            events.append(self._text_type(rest))
        self._done = True
        return [*events, Done("length")]

    def _advance(self) -> list[Event]:
        if self._error:
            raise self._error
        events = []
        try:
            for event in self._events:  # resumes where the last piece ended
                if event is NEED_MORE:
                    break
                events.append(event)
        except CompletionError as error:
            self._error = error  # a splitter that has failed stays failed
            raise
        return events

    def _read(self) -> Generator[object, None, None]:
        marker = ""
        if self._thinking:
            self.missing = THINK_END
            marker = yield from self._read_text(ReasoningText, "reasoning", stops=(THINK_END,))
        if marker in ("", THINK_END):
            self.missing = EOS
            marker = yield from self._read_text(ContentText, "content", stops=(EOS,))
        if marker.endswith(TAG_OPEN):
            reader = CallReader(self._scanner)
            yield from reader.read()
            self._calls = reader.found
        self._scanner.place = "end of the completion"
        self._done = True
        yield Done("tool_calls" if self._calls else "stop")
        while True:
            while not self._scanner.pending:
                yield NEED_MORE
            got = quote(self._scanner.pending[0])
            yield self._scanner.depart(f"expected nothing behind {EOS}, got {got}")
            self._scanner.take(len(self._scanner.pending))

    def _read_text(
        self, event: type[ReasoningText | ContentText], place: str, stops: tuple[str, ...]
    ) -> Generator[object, None, str]:
        scanner = self._scanner
        scanner.place, self._text_type = place, event
        if scanner.tolerant:
            stops = (*stops, EOS, *_TOLERANT_CALLS)
        elif event is ContentText:
            stops = (*stops, *_STRICT_CALLS)
        while True:
            text, marker = scanner.take_until(
                _TOLERANT_MARKERS if scanner.tolerant else _STRICT_MARKERS
            )
            if text:
                yield event(text)
            if marker in stops:
                self._text_type = None
                return marker
            if marker:
                rule = f"expected text and then {stops[0]}, got {quote(marker)}"
                yield scanner.depart(rule, back=len(marker))
                if marker == TAG_CLOSE:  # of nothing; its name is dropped with it
                    marker = yield from scanner.hold_until(_TAG_END)
                    scanner.take_held()
                    if marker == EOS:
                        return EOS
                continue
            yield NEED_MORE


_TAG_END = Markers(">", EOS)
