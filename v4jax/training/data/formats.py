"""The fields of chat records as other tools write them, turned into messages.

{"messages": [{"role": "user", "content": "…"}, …]}                    OpenAI, TRL, axolotl
{"conversations": [{"from": "human", "value": "…"}, …], "system": "…"}  ShareGPT
{"instruction": "…", "input": "…", "output": "…"}                      Alpaca; also with history
{"prompt": "…", "completion": "…"}                                     texts, or lists of messages
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from v4jax.config.json_keys import brief, brief_name
from v4jax.errors import DataError

_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


def read_messages(fields: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """Returns the messages of a record, and the names of the fields that they are from.

    Raises:
      DataError: the record is of no known format or of several, or a field is of the wrong kind.
    """
    found = [name for name in _FORMATS if fields.get(name) is not None]
    if len(found) != 1:
        got = " and ".join(found) or brief_name(", ".join(fields)) or "no field"
        raise DataError(f"needs one of the fields {', '.join(_FORMATS)}, got {got}")
    read, used = _FORMATS[found[0]]
    return read(fields), set(used)


def _read_sharegpt(fields: Mapping[str, Any]) -> list:
    turns = fields["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"conversations must be a list, got {brief(turns)}")
    return [*_system(fields), *(_read_sharegpt_turn(turn, i) for i, turn in enumerate(turns))]


def _read_sharegpt_turn(turn: Any, number: int) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # a message as it is, or none, which is reported by its place
    message = {name: value for name, value in turn.items() if name not in ("from", "value")}
    message |= {"role": _ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}
    if turn["from"] == "function_call":
        place = f"conversations[{number}].value"
        calls = _parse(turn.get("value"), place)
        calls = calls if isinstance(calls, list) else [calls]
        message |= {"content": "", "tool_calls": [{"function": call} for call in calls]}
    return message


def _parse(text: Any, place: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{place} must be the JSON of a call, got {brief(text)}") from error


def _read_alpaca(fields: Mapping[str, Any]) -> list:
    messages = _system(fields)
    history = fields.get("history") or []
    if not (
        isinstance(history, list) and all(isinstance(h, list) and len(h) == 2 for h in history)
    ):
        raise DataError(f"history must be a list of [question, answer], got {brief(history)}")
    question = fields["instruction"]
    if given := fields.get("input"):
        question = f"{question}\n\n{given}"
    for asked, answer in [*history, (question, fields.get("output"))]:
        messages += [_message("user", asked), _message("assistant", answer)]
    return messages


def _read_pair(fields: Mapping[str, Any]) -> list:
    messages = _system(fields)
    for role, name in (("user", "prompt"), ("assistant", "completion")):
        value = fields.get(name)
        messages += value if isinstance(value, list) else [_message(role, value)]
    return messages


def _system(fields: Mapping[str, Any]) -> list[dict]:
    return [_message("system", fields["system"])] if fields.get("system") else []


def _message(role: str, content: Any) -> dict:
    return {"role": role, "content": content}


# The field that tells the format: (its reader, the fields it reads).
_FORMATS: dict[str, tuple[Callable[[Mapping[str, Any]], Any], tuple[str, ...]]] = {
    "messages": (lambda fields: fields["messages"], ("messages",)),
    "conversations": (_read_sharegpt, ("conversations", "system")),
    "instruction": (_read_alpaca, ("instruction", "input", "output", "system", "history")),
    "prompt": (_read_pair, ("prompt", "completion", "system")),
}
