"""The events of a completion, in the order in which they become known."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningText:
    """A piece of the text before `</think>`."""

    text: str


@dataclass(frozen=True)
class ContentText:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The name of tool call `index`. Calls have no ids in the model's text: a server makes them."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of the JSON text of the arguments; the pieces joined are `arguments`."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """Tool call `index` is complete. A call that the length limit cut off has no such event."""

    index: int


@dataclass(frozen=True)
class Departure:
    """The completion leaves the format here; `text` says what was expected and what came."""

    text: str


@dataclass(frozen=True)
class Done:
    """The completion is over.

    Attributes:
      reason: `"stop"`, `"tool_calls"`, or `"length"` when the text ended before EOS.
    """

    reason: str


Event = (
    ReasoningText | ContentText | ToolCallStart | ToolCallArguments | ToolCallEnd | Departure | Done
)


def assemble(events: Iterable[Event]) -> dict:
    """Returns the assistant message that `events` make up."""
    reasoning, content, calls = [], [], []
    for event in events:
        match event:
            case ReasoningText(text):
                reasoning.append(text)
            case ContentText(text):
                content.append(text)
            case ToolCallStart(_, name):
                calls.append((name, []))
            case ToolCallArguments(index, text):
                calls[index][1].append(text)
    return {
        "role": "assistant",
        "content": "".join(content),
        "reasoning_content": "".join(reasoning),
        "tool_calls": [
            {"type": "function", "function": {"name": name, "arguments": "".join(arguments)}}
            for name, arguments in calls
        ],
    }
