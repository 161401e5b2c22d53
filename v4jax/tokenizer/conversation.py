"""From messages to turns: a conversation is checked, merged and put into the order of rendering.

A turn is the text between two role tokens. Neighbouring messages of users and tools become one user
turn of several blocks; every other message is a turn of its own.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from v4jax.config.json_keys import brief_name
from v4jax.errors import ConversationError
from v4jax.tokenizer.tools import ToolCall, to_json
from v4jax.tokenizer.vocabulary import TASKS

# The fields of each role. Null and an empty text, list or object count as absent, whatever the
# field's name; 0 and false are values.
FIELDS = {
    "system": ("content", "tools", "response_format"),
    "developer": ("content", "tools", "response_format"),
    "user": ("content", "task"),
    "assistant": ("content", "reasoning_content", "tool_calls", "task", "wo_eos"),
    "tool": ("content", "tool_call_id"),
    "latest_reminder": ("content",),
}
_NOT_RENDERED = ("role", "name")
# Fields that say how much an assistant's turn counts in training: `weight` from 0 to 1; the others
# 1 or true, 0 or false. A true `mask` leaves the turn out.
LEARNED = ("weight", "loss", "loss_mask", "train", "trainable", "training", "mask")


@dataclass(frozen=True)
class Block:
    """A part of a user turn: text, or a tool's result with the id of the call it answers."""

    text: str
    is_result: bool = False
    call_id: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn, with the fields of its message.

    Attributes:
      place: where the turn came from, for error messages.
      encoded: whether the prompt already holds it.
      blocks: what a user turn has in place of content.
      weight: how much the turn counts in training.
    """

    place: str
    encoded: bool
    role: str
    content: str = ""
    blocks: tuple[Block, ...] = ()
    tools: tuple[Mapping, ...] = ()
    response_format: Mapping | None = None
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    task: str | None = None
    wo_eos: bool = False
    weight: float = 1.0


def read_turns(messages: Any, name: str, *, before: Sequence[Turn] = ()) -> list[Turn]:
    """Returns a turn for each of `messages`.

    Args:
      name: what to call `messages` in errors.
      before: the turns of the context, whose tool calls `messages` may answer.

    Raises:
      ConversationError: a message breaks a rule; the error names `messages[i].field`.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        _fail(
            name,
            "must be a list of at least one message",
            messages,
            "give dicts with role, content",
        )
    turns: list[Turn] = []
    called = any(turn.tool_calls for turn in before)
    for i, message in enumerate(messages):
        turn = _read_message(message, f"{name}[{i}]", encoded=name == "context")
        if turn.role == "tool" and not called:
            remedy = "put the assistant message with tool_calls before it"
            _fail(f"{turn.place}.role", "must follow an assistant's tool call", "tool", remedy)
        called = called or bool(turn.tool_calls)
        turns.append(turn)
    return turns


def join_users(turns: Sequence[Turn]) -> list[Turn]:
    """Returns `turns` with neighbouring turns of users and tools merged into one user turn.

    Raises:
      ConversationError: a turn with a task would be merged.
    """
    joined: list[Turn] = []
    for turn in turns:
        if joined and _joins(turn, joined[-1]):
            blocks = [*joined[-1].blocks, *turn.blocks]  # an empty text beside others is left out
            blocks = [block for block in blocks if block.text or block.is_result] or blocks[:1]
            joined[-1] = dataclasses.replace(joined[-1], blocks=tuple(blocks))
        else:
            joined.append(dataclasses.replace(turn, role="user") if turn.role == "tool" else turn)
    return joined


def sort_tool_results(turns: Sequence[Turn]) -> list[Turn]:
    """Returns `turns` with the results of each user turn in the order of the latest calls.

    Texts keep their places. A result with an unknown id counts as an answer to the first call.
    """
    order: dict[str, int] = {}
    sorted_turns = []
    for turn in turns:
        if turn.tool_calls:
            order = {call.id: i for i, call in enumerate(turn.tool_calls) if call.id}
        results = sorted(
            (block for block in turn.blocks if block.is_result),
            key=lambda block: order.get(block.call_id, 0),
        )
        if len(results) > 1 and order:
            following = iter(results)
            blocks = (next(following) if block.is_result else block for block in turn.blocks)
            turn = dataclasses.replace(turn, blocks=tuple(blocks))
        sorted_turns.append(turn)
    return sorted_turns


def hoist_system(turns: Sequence[Turn]) -> list[Turn]:
    """Returns `turns` with all system turns merged into one, the first.

    Raises:
      ConversationError: a system message follows a context, whose prompt has already begun.
    """
    system = [turn for turn in turns if turn.role == "system"]
    if not system or (system == [turns[0]]):
        return list(turns)
    late = next((turn for turn in system if not turn.encoded), None)
    if late and turns[0].encoded:
        _fail(f"{late.place}.role", "must not be system behind a context", "system", "put it there")
    formats = [turn.response_format for turn in system if turn.response_format]
    if len(formats) > 1:
        _fail(f"{system[-1].place}.response_format", "is given twice", formats[1], "keep one")
    whole = dataclasses.replace(
        system[0],
        content="\n\n".join(turn.content for turn in system if turn.content),
        tools=tuple(tool for turn in system for tool in turn.tools),
        response_format=formats[0] if formats else None,
    )
    return [whole, *(turn for turn in turns if turn.role != "system")]


def check_tasks(turns: Sequence[Turn]) -> None:
    """Raises if anything but an assistant's turn follows a task.

    Raises:
      ConversationError: this is so for a turn that is to be rendered.
    """
    spoken = [turn for turn in turns if turn.role != "latest_reminder"]
    for turn, following in itertools.pairwise(spoken):
        if turn.task is not None and following.role != "assistant" and not turn.encoded:
            rule = "must be answered by an assistant"
            got = f"{turn.task!r} before a {following.role} message"
            remedy = "remove the task or add its answer"
            raise ConversationError(f"{turn.place}.task {rule}, got {got}; {remedy}")


def find_task(turns: Sequence[Turn]) -> str | None:
    """Returns the task that the turn after `turns` answers; None for an ordinary answer."""
    asking = next((turn for turn in reversed(turns) if turn.role != "latest_reminder"), None)
    return None if asking is None else asking.task


def find_last_user(turns: Sequence[Turn]) -> int:
    """Returns the index of the last user or developer turn, -1 if there is none."""
    return max(
        (i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1
    )


def drop_earlier_thinking(turns: Sequence[Turn]) -> list[Turn]:
    """Returns `turns` without the developer turns and reasoning before the last user turn."""
    last_user = find_last_user(turns)
    earlier = (
        dataclasses.replace(turn, reasoning_content="")
        for turn in turns[: max(last_user, 0)]
        if turn.role != "developer"
    )
    return [*earlier, *turns[max(last_user, 0) :]]


def _joins(turn: Turn, previous: Turn) -> bool:
    if previous.role != "user" or turn.role not in ("user", "tool"):
        return False
    if previous.encoded != turn.encoded:
        return False
    if turn.role == "user" and previous.task is not None:
        return False
    if turn.task is not None:
        remedy = f"join its content into {previous.place}, or put an assistant message between"
        _fail(f"{turn.place}.task", "needs a turn of its own", turn.task, remedy)
    return True


def _read_message(message: Any, place: str, *, encoded: bool) -> Turn:
    if not isinstance(message, Mapping):
        _fail(place, "must be a dict", message, 'write {"role": "user", "content": "…"}')
    role = message.get("role")
    if role not in tuple(FIELDS):  # not a dict lookup: a role may be unhashable
        _fail(
            f"{place}.role",
            f"must be one of {', '.join(FIELDS)}",
            role,
            "rename or drop the message",
        )
    for field, value in message.items():
        if not _is_absent(value) and field not in (*FIELDS[role], *_NOT_RENDERED, *LEARNED):
            rule = f"is no field of role {role} (it has {', '.join(FIELDS[role])})"
            _fail(f"{place}.{field}", rule, value, "remove it")
    read = {
        field: reader(message[field], f"{place}.{field}")
        for field, reader in _READERS.items()
        if field in FIELDS[role] and not _is_absent(message.get(field))
    }
    turn = Turn(place, encoded, role, weight=_read_weight(message, role, place), **read)
    if role in ("user", "tool"):
        return dataclasses.replace(turn, blocks=_read_blocks(message, role, place))
    content = _read_text(message.get("content"), f"{place}.content")
    if content is None and not any(read.values()):
        _fail(f"{place}.content", "is missing", None, 'give a string; "" is allowed')
    if role == "developer" and not content:
        _fail(
            f"{place}.content", "of a developer must not be empty", content, "give the instruction"
        )
    return dataclasses.replace(turn, content=content or "")


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _read_weight(message: Mapping, role: str, place: str) -> float:
    """Returns how much a turn counts in training."""
    weights = {}
    for field in LEARNED:
        value = message.get(field)
        if value is None:
            continue
        number = isinstance(value, int | float) and not (field != "weight" and value not in (0, 1))
        if not number or not 0 <= value <= 1:
            rule = "must be a number from 0 to 1" if field == "weight" else "must be true or false"
            _fail(f"{place}.{field}", rule, value, "leave it out to learn what the assistant wrote")
        weights[field] = 1.0 - value if field == "mask" else float(value)
        if role != "assistant" and weights[field]:
            rule = f"cannot make training learn a message of role {role}"
            _fail(f"{place}.{field}", rule, value, "remove it: only the assistant's are learned")
    if len(set(weights.values())) > 1:
        fields = " and ".join(weights)
        _fail(place, f"says different things by {fields}", dict(message), "keep one of them")
    return next(iter(weights.values()), 1.0)


def _read_blocks(message: Mapping, role: str, where: str) -> tuple[Block, ...]:
    content, place = message.get("content"), f"{where}.content"
    if role == "tool":
        if isinstance(content, list):
            content = "\n\n".join(
                _read_part(part, f"{place}[{i}]") for i, part in enumerate(content)
            )
        text = _read_text(content, place) or ""
        call_id = _read_id(message.get("tool_call_id"), f"{where}.tool_call_id")
        return (Block(text, is_result=True, call_id=call_id),)
    if isinstance(content, list) and content:
        return tuple(Block(_read_part(part, f"{place}[{i}]")) for i, part in enumerate(content))
    text = _read_text(content, place)
    if text is None:
        _fail(place, "is missing", None, 'give a string; "" is allowed')
    return (Block(text),)


def _read_part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        _fail(place, "must be a dict with a type", part, 'write {"type": "text", "text": "…"}')
    if part["type"] != "text":
        return f"[Unsupported {part['type']}]"
    return _read_text(part.get("text"), f"{place}.text") or ""


def _read_text(value: Any, place: str) -> str | None:
    if value is not None and not isinstance(value, str):
        _fail(
            place, "must be a string", value, "give text; only user and tool messages take a list"
        )
    return value


def _read_id(value: Any, place: str) -> str:
    if value is not None and not isinstance(value, str):
        _fail(place, "must be a string", value, "give a call and its result the same one")
    return value or ""


def _read_flag(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        _fail(place, "must be true or false", value, "leave it out to end the turn with EOS")
    return value


def _read_task(value: Any, place: str) -> str:
    if value not in tuple(TASKS):
        _fail(
            place, f"must be one of {', '.join(TASKS)}", value, "leave it out for an ordinary turn"
        )
    return value


def _read_format(value: Any, place: str) -> Mapping:
    if not isinstance(value, Mapping):
        _fail(place, "must be a dict", value, 'for instance {"type": "json_object"}')
    return _check_json(value, place)


def _read_tools(value: Any, place: str) -> tuple[Mapping, ...]:
    form = '{"type": "function", "function": {"name": "…"}}'
    if not isinstance(value, list):
        _fail(place, "must be a list", value, f"write [{form}]")
    for i, tool in enumerate(value):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _fail(f"{place}[{i}]", "must describe a function by name", tool, f"write {form}")
    return tuple(_check_json(tool["function"], f"{place}[{i}]") for i, tool in enumerate(value))


def _read_calls(value: Any, place: str) -> tuple[ToolCall, ...]:
    form = '{"id": "…", "function": {"name": "…", "arguments": "{}"}}'
    if not isinstance(value, list):
        _fail(place, "must be a list", value, f"write [{form}]")
    calls = []
    for i, call in enumerate(value):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            _fail(f"{place}[{i}]", "must call a function by name", call, f"write {form}")
        arguments, where = function.get("arguments"), f"{place}[{i}].function.arguments"
        if isinstance(arguments, Mapping):
            arguments = to_json(_check_json(arguments, where))
        if not isinstance(arguments, str):
            _fail(where, "must be an object, or a string of JSON", arguments, 'write "{}" for none')
        call_id = _read_id(call.get("id"), f"{place}[{i}].id")
        calls.append(ToolCall(function["name"], arguments, call_id))
    return tuple(calls)


def _check_json(value: Mapping, place: str) -> Mapping:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        _fail(
            place, f"must be JSON ({error})", value, "use dicts, lists, strings, numbers, booleans"
        )
    return value


def _fail(place: str, rule: str, value: Any, remedy: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise ConversationError(f"{brief_name(place)} {rule}, got {shown}; {remedy}")


_READERS = {
    "tools": _read_tools,
    "response_format": _read_format,
    "reasoning_content": _read_text,
    "tool_calls": _read_calls,
    "task": _read_task,
    "wo_eos": _read_flag,
}
