"""Conversations as prompts: the text the V4 models were trained to continue.

    BOS [effort prefix] [system text] <｜User｜>question<｜Assistant｜><think>

Thinking mode leaves `<think>` open at the end; chat mode closes it at once with `</think>`. No
newline stands around role tokens. Which earlier reasoning stays is decided by
`drop_thinking` and the tools.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from v4jax.errors import ConversationError
from v4jax.tokenizer.conversation import (
    Turn,
    drop_earlier_thinking,
    find_last_user,
    read_turns,
    sort_tool_results,
)
from v4jax.tokenizer.stream import MODES
from v4jax.tokenizer.tools import render_tool_calls, render_tools, to_json
from v4jax.tokenizer.vocabulary import (
    ASSISTANT,
    BOS,
    EOS,
    LATEST_REMINDER,
    TASKS,
    THINK_END,
    THINK_START,
    USER,
)

_ABSOLUTE_MAXIMUM = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve \
the root cause, rigorously stress-testing your logic against all potential paths, edge cases, and \
adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, \
considered alternative, and rejected hypothesis to ensure absolutely no assumption is left \
unchecked.

"""
_BEYOND_MAXIMUM = """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: \
exhaustively decompose the problem into its most fundamental components, trace every causal chain \
to its root, and resolve the underlying cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and \
are certain that no assumption remains unchecked and no error remains undiscovered.

"""


@dataclass(frozen=True)
class PromptProfile:
    """How one generation of checkpoints wants to be asked.

    Attributes:
      effort_prefixes: effort → text before everything else, in thinking mode.
      default_effort: what no effort means.
      api_efforts: names that the hosted service accepts beyond these, and what it takes them for.
    """

    effort_prefixes: Mapping[str, str]
    default_effort: str
    api_efforts: Mapping[str, str]


PROFILES = {
    "preview": PromptProfile(
        effort_prefixes={"high": "", "max": _ABSOLUTE_MAXIMUM},
        default_effort="high",
        api_efforts={"low": "high", "medium": "high", "xhigh": "max"},
    ),
    # V4-Flash-0731 and V4-Pro-0813
    "0731": PromptProfile(
        effort_prefixes={"low": "", "high": _ABSOLUTE_MAXIMUM, "max": _BEYOND_MAXIMUM},
        default_effort="low",
        api_efforts={"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"},
    ),
}


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt.

    Attributes:
      text: the stretch.
      written: the assistant wrote it (reasoning, content, calls, EOS): what training teaches.
    """

    text: str
    written: bool = False


def encode_messages(messages: Sequence[Mapping], **options) -> str:
    """Returns the prompt for `messages`; `options` are those of `render_messages`."""
    return "".join(piece.text for piece in render_messages(messages, **options))


def render_messages(
    messages: Sequence[Mapping],
    *,
    mode: str = "chat",
    effort: str | None = None,
    drop_thinking: bool = True,
    add_bos: bool = True,
    context: Sequence[Mapping] | None = None,
    profile: str | PromptProfile = "preview",
) -> list[Piece]:
    """Returns the prompt for `messages` in pieces that say which of it the assistant wrote.

    A turn whose message has a true `mask` counts as not written.

    Args:
      messages: dicts with `role` and the fields that `conversation.FIELDS` lists for it.
      mode: `"chat"` answers at once, `"thinking"` reasons first.
      effort: a key of the profile's `effort_prefixes`; has an effect in thinking mode only.
      drop_thinking: leave out the reasoning of turns before the last user's; any tools keep it in.
      add_bos: begin with BOS, unless there is a context.
      context: earlier messages that the prompt already holds: they are heeded but not rendered.
      profile: a key of `PROFILES`, or a profile.

    Raises:
      ConversationError: a message or an argument breaks a rule; the error names it.

    Source: the prompt encoder published with the V4 checkpoints.
    """
    if mode not in MODES:
        raise ConversationError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    thinking = mode == "thinking"
    prefix = _effort_prefix(effort, profile)
    turns = read_turns(context, "context") if context else []
    turns = sort_tool_results([*turns, *read_turns(messages, "messages", before=turns)])
    keep_reasoning = not drop_thinking or any(turn.tools for turn in turns)
    if thinking and not keep_reasoning:
        turns = drop_earlier_thinking(turns)

    # Reasoning may stand from this turn on; in chat mode, nowhere.
    first_open = len(turns)
    if thinking:
        first_open = 0 if keep_reasoning else find_last_user(turns)
    pieces = [Piece(BOS)] if add_bos and not context else []
    if thinking and not turns[0].encoded:
        pieces.append(Piece(prefix))
    for i, turn in enumerate(turns):
        if not turn.encoded:
            opened, written = i >= first_open, turn.role == "assistant" and not turn.masked
            pieces.append(Piece(_render_turn(turns, i, opened=opened), written))
            pieces.append(Piece(_render_transition(turns, i, thinking, opened=opened)))
    return [piece for piece in pieces if piece.text]


def _effort_prefix(effort: str | None, profile: str | PromptProfile) -> str:
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ConversationError(
                f"profile must be one of {', '.join(PROFILES)}, got {profile!r}"
            )
        profile = PROFILES[profile]
    effort = effort or profile.default_effort
    if effort not in tuple(profile.effort_prefixes):
        known = ", ".join(profile.effort_prefixes)
        meant = profile.api_efforts.get(str(effort), profile.default_effort)
        raise ConversationError(f"effort must be one of {known}, got {effort!r}; try {meant!r}")
    return profile.effort_prefixes[effort]


def _render_turn(turns: Sequence[Turn], i: int, *, opened: bool) -> str:
    turn = turns[i]
    match turn.role:
        case "system":
            return turn.content + _render_instructions(turn)
        case "developer":
            return USER + turn.content + _render_instructions(turn)
        case "user":
            return USER + "\n\n".join(
                f"<tool_result>{block.text}</tool_result>" if block.is_result else block.text
                for block in turn.blocks
            )
        case "latest_reminder":
            return LATEST_REMINDER + turn.content
        case "assistant":
            # The answer to a task has no reasoning: its tag was not preceded by <think>.
            answers_task = i > 0 and turns[i - 1].task is not None
            reasoning = turn.reasoning_content + THINK_END if opened and not answers_task else ""
            calls = "\n\n" + render_tool_calls(turn.tool_calls) if turn.tool_calls else ""
            return reasoning + turn.content + calls + ("" if turn.wo_eos else EOS)
    raise AssertionError(f"role {turn.role!r} was let through")


def _render_instructions(turn: Turn) -> str:
    text = "\n\n" + render_tools(turn.tools) if turn.tools else ""
    if turn.response_format:
        schema = to_json(turn.response_format)
        text += (
            "\n\n## Response Format:\n\n"
            f"You MUST strictly adhere to the following schema to reply:\n{schema}"
        )
    return text


def _render_transition(turns: Sequence[Turn], i: int, thinking: bool, *, opened: bool) -> str:
    """Returns what asks for the next turn: the assistant token and a tag, or a task's token."""
    turn = turns[i]
    next_role = turns[i + 1].role if i + 1 < len(turns) else "assistant"
    if next_role not in ("assistant", "latest_reminder"):
        if turn.task is not None:
            raise ConversationError(
                f"{turn.place}.task must be answered by an assistant, got {turn.task!r} before a "
                f"{next_role} message; remove the task or add its answer"
            )
        return ""
    if turn.task == "action":
        return ASSISTANT + (THINK_START if thinking else THINK_END) + TASKS["action"]
    if turn.task is not None:
        return TASKS[turn.task]
    if turn.role in ("user", "developer"):
        return ASSISTANT + (THINK_START if opened else THINK_END)
    return ""
