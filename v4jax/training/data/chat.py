"""Conversations as training examples: rendered like prompts; what the assistant wrote counts.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

    messages      with the fields of `tokenizer.conversation.FIELDS`; on a message of the assistant,
                  `weight` (or a flag of `LEARNED`) says how much its turn counts, 0 to 1
    tools         of the whole conversation, a list or its JSON (optional; or `tools` on the system
                  message)
    mode, effort  override those of the source (optional)

Records of other tools are read as well (`formats.py`). Other fields are ignored; the log names them
once.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from v4jax import log
from v4jax.config.data import SourceConfig
from v4jax.config.json_keys import brief_name
from v4jax.errors import ConfigError, ConversationError, DataError
from v4jax.tokenizer import Piece, Vocabulary, encode_pieces, render_messages
from v4jax.tokenizer.conversation import LEARNED, Turn, read_turns
from v4jax.tokenizer.markup import join_pieces
from v4jax.tokenizer.tools import read_arguments
from v4jax.training.data.example import Example
from v4jax.training.data.files import LINES, Lines, parse_object
from v4jax.training.data.formats import read_messages

SUFFIXES = LINES
_FIELDS = ("tools", "mode", "effort")  # beside those of the formats


class ChatRecords:
    """The conversations of JSONL files."""

    def __init__(self, files: Sequence[Path], config: SourceConfig, tokenizer: Vocabulary):
        try:  # reports a bad effort now instead of at every record
            self._profile = {} if config.profile is None else {"profile": config.profile}
            options = dict(mode="thinking", effort=config.effort) | self._profile
            render_messages([{"role": "user", "content": ""}], **options)
        except ConversationError as error:
            raise ConfigError(f"data.sources: {error}") from error
        self._lines, self._config, self._tokenizer = Lines(files), config, tokenizer

    def __len__(self) -> int:
        return len(self._lines)

    def place(self, index: int) -> str:
        """Returns the place of record `index` for messages."""
        return self._lines.place(index)

    def read(self, index: int) -> list[Example]:
        """Returns the examples of record `index`.

        Raises:
          DataError, ConversationError: the record cannot be used.
        """
        fields = parse_object(self._lines[index])
        messages, used = read_messages(fields)
        unused = sorted(set(fields) - {*_FIELDS} - used)
        if unused:
            log.once(
                f"data: chat records have fields that are not used: {brief_name(', '.join(unused))}"
            )
        if isinstance(fields.get("tools"), str):
            fields["tools"] = parse_list(fields["tools"], "tools")
        return encode_conversation(
            add_tools(messages, fields.get("tools")),
            self._tokenizer,
            mode=fields.get("mode") or self._config.mode,
            effort=fields.get("effort") or self._config.effort,
            turns=self._config.turns,
            drop_thinking=self._config.drop_thinking,
            **self._profile,
        )


def encode_conversation(
    messages: Sequence[dict],
    tokenizer: Vocabulary,
    *,
    mode: str = "auto",
    turns: str = "all",
    **options,
) -> list[Example]:
    """Returns a conversation as Examples; only what the assistant wrote has weight.

    What precedes an answer is what inference would give the model to answer. Where a later question
    changes that, as thinking mode leaves earlier reasoning out, the answers before it are an
    example of their own, and history without weight in the next. Otherwise all answers are in one
    example. Prompts and answers are encoded separately, as in inference. No token spans both.

    Args:
      mode: `chat`, `thinking`, or `auto`: thinking where a message has `reasoning_content`.
      turns: `last` learns what follows the last answered question only.
      options: of `tokenizer.render_messages`.

    Raises:
      DataError: the assistant wrote nothing, an empty answer or arguments that are no JSON object,
        or a message holds a control token's literal.
      ConversationError: a message breaks a rule.
    """
    if mode == "auto":
        dicts = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
        mode = "thinking" if any(m.get("reasoning_content") for m in dicts) else "chat"
    render_messages(messages, mode=mode, **options)  # reports what breaks a rule, by its place
    _check_targets(read_turns(messages, "messages"))
    prompts = [render_messages(messages[:end], mode=mode, **options) for end in _ends(messages)]
    examples, first = [], 0  # of the messages that are in no example yet
    for i, end in enumerate(_ends(messages)):
        following = prompts[i + 1] if i + 1 < len(prompts) else None
        if following and join_pieces(following).startswith(join_pieces(prompts[i])):
            continue
        learned, first = first, end
        if turns == "last":
            if following:
                continue
            learned = 1 + max(k for k in range(-1, end) if k < 0 or _asks(messages[k]))
        history = [_without_weight(message) for message in messages[:learned]]
        pieces = render_messages([*history, *messages[learned:end]], mode=mode, **options)
        _check_literals(pieces, tokenizer)
        if any(piece.weight for piece in pieces):
            examples.append(_encode(pieces, tokenizer))
    if not examples:
        raise DataError(
            "has no assistant turn that counts; add the answer, or remove the conversation"
        )
    return examples


def _encode(pieces: Sequence[Piece], tokenizer: Vocabulary) -> Example:
    tokens, weights = [], []
    for weight, group in groupby(pieces, key=lambda piece: piece.weight):
        ids = encode_pieces(group, tokenizer)
        tokens += ids
        weights += [weight] * len(ids)
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32))


def _ends(messages: Sequence[dict]) -> list[int]:
    """Returns how many messages end with each answer; of answers in a row with the last."""
    roles = [message["role"] for message in messages]
    return [i + 1 for i, role in enumerate(roles) if role == "assistant" != (*roles, "")[i + 1]]


def _asks(message: dict) -> bool:
    return message["role"] in ("user", "developer")


def _without_weight(message: dict) -> dict:
    kept = {field: value for field, value in message.items() if field not in LEARNED}
    return kept | {"weight": 0} if message["role"] == "assistant" else kept


def parse_list(text: str, name: str) -> list:
    """Returns the list that a text of JSON holds.

    Raises:
      DataError: it holds none.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is text, and no JSON: {error}") from error
    if not isinstance(values, list):
        raise DataError(f"{name} must be a list, got {text[:60]!r}")
    return values


def _check_targets(turns: Sequence[Turn]) -> None:
    """Raises if a turn that is learned is nothing to learn; a prompt may hold it."""
    for turn in turns:
        if turn.role != "assistant" or not turn.weight:
            continue
        if not (turn.content or turn.tool_calls):
            raise DataError(
                f"{turn.place} is empty, and would teach the model to answer nothing; write the "
                'answer, or set "weight": 0'
            )
        for i, call in enumerate(turn.tool_calls):
            if read_arguments(call.arguments) is None:
                raise DataError(
                    f"{turn.place}.tool_calls[{i}].function.arguments must be a JSON object, got "
                    f'{call.arguments[:60]!r}; mend it, or set "weight": 0'
                )


def add_tools(messages: Any, tools: Any) -> Any:
    """Returns `messages` with `tools` on the system message, which is added if missing."""
    if not tools or not isinstance(messages, list):
        return messages
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if first.get("role") != "system":
        return [{"role": "system", "content": "", "tools": tools}, *messages]
    if first.get("tools"):
        raise DataError("has tools twice, in the record and in messages[0]; remove one of them")
    return [{**first, "tools": tools}, *messages[1:]]


def _check_literals(pieces: Sequence[Piece], tokenizer: Vocabulary) -> None:
    """Raises if a text spells a control token, which would be learned letter by letter."""
    for piece in pieces:
        found = None if piece.control else tokenizer.find_control(piece.text)
        if found is not None:
            shown = piece.text[found : found + 24]
            raise DataError(
                f"a message holds a control token's literal, {shown!r}; reasoning belongs into "
                "reasoning_content, calls into tool_calls, and other text must not look like a "
                "token"
            )
