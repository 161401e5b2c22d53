"""Conversations as training examples: rendered like prompts; what the assistant wrote counts.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

    messages      with the fields of `tokenizer.conversation.FIELDS`; on a message of the assistant,
                  `weight` (or a flag of `LEARNED`) says how much its turn counts, 0 to 1
    tools         of the whole conversation, a list or its JSON (optional; or `tools` on the system
                  message)
    mode, effort  override those of the source (optional)

Other fields of a record are ignored; the log names them once.
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
from v4jax.tokenizer.conversation import Turn, read_turns
from v4jax.tokenizer.tools import read_arguments
from v4jax.training.data.example import Example
from v4jax.training.data.files import Lines, parse_object

SUFFIXES = (".jsonl",)
_FIELDS = ("messages", "tools", "mode", "effort")


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

    def read(self, index: int) -> Example:
        """Returns record `index`.

        Raises:
          DataError, ConversationError: the record cannot be used.
        """
        fields = parse_object(self._lines[index])
        unused = sorted(set(fields) - {*_FIELDS})
        if unused:
            log.once(
                f"data: chat records have fields that are not used: {brief_name(', '.join(unused))}"
            )
        if isinstance(fields.get("tools"), str):
            fields["tools"] = parse_list(fields["tools"], "tools")
        if "messages" not in fields:
            raise DataError(
                f"needs the field messages, got {brief_name(', '.join(fields)) or 'no field'}"
            )
        return encode_conversation(
            add_tools(fields["messages"], fields.get("tools")),
            self._tokenizer,
            mode=fields.get("mode") or self._config.mode,
            effort=fields.get("effort") or self._config.effort,
            drop_thinking=self._config.drop_thinking,
            **self._profile,
        )


def encode_conversation(
    messages: Sequence[dict], tokenizer: Vocabulary, *, mode: str = "auto", **options
) -> Example:
    """Returns a conversation as an Example; only what the assistant wrote has weight.

    Prompts and answers are encoded separately, as in inference. No token spans both.

    Args:
      mode: `chat`, `thinking`, or `auto`: thinking where a message has `reasoning_content`.
      options: of `tokenizer.render_messages`.

    Raises:
      DataError: the assistant wrote nothing, an empty answer or arguments that are no JSON object,
        or a message holds a control token's literal.
      ConversationError: a message breaks a rule.
    """
    if mode == "auto":
        dicts = [m for m in messages if isinstance(m, dict)] if isinstance(messages, list) else []
        mode = "thinking" if any(m.get("reasoning_content") for m in dicts) else "chat"
    pieces = render_messages(messages, mode=mode, **options)
    _check_literals(pieces, tokenizer)
    _check_targets(read_turns(messages, "messages"))
    tokens, weights = [], []
    for weight, group in groupby(pieces, key=lambda piece: piece.weight):
        ids = encode_pieces(group, tokenizer)
        tokens += ids
        weights += [weight] * len(ids)
    if not any(weights):
        raise DataError(
            "has no assistant turn that counts; add the answer, or remove the conversation"
        )
    return Example(np.array(tokens, np.int32), np.array(weights, np.float32))


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
