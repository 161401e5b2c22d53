"""Conversations as prompts: the text that the V4 models were trained to continue.

    BOS [effort prefix] [system text] <｜User｜>question<｜Assistant｜><think>

Every answer of the assistant follows the assistant's token and a tag, or the token of a task. If
the last message is not the assistant's, the prompt ends with these and thereby asks for an answer.
The tag is `<think>` in thinking mode, `</think>` in chat mode and before a turn without reasoning.
`drop_thinking` and the tools decide which earlier reasoning is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from v4jax.config.json_keys import brief
from v4jax.errors import ConversationError
from v4jax.tokenizer.conversation import (
    Turn,
    check_tasks,
    drop_earlier_thinking,
    find_last_user,
    find_task,
    hoist_system,
    join_users,
    read_turns,
    sort_tool_results,
)
from v4jax.tokenizer.markup import SLOT, Piece, join_pieces, markup
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
    """How one generation of checkpoints is asked for effort.

    Attributes:
      effort_prefixes: effort → text that begins the prompt in thinking mode.
      default_effort: the effort if none is given.
      api_efforts: further names that the hosted service accepts → the effort it takes them for.
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


def encode_messages(messages: Sequence[Mapping], **options) -> str:
    """Returns the prompt for `messages`; `options` are those of `render_messages`."""
    return join_pieces(render_messages(messages, **options))


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
    """Returns the prompt for `messages` in pieces.

    The texts of all system messages come first, joined by blank lines. A message may say how much
    it counts in training (`conversation.LEARNED`).

    Args:
      messages: dicts with `role` and the fields that `conversation.FIELDS` lists for it.
      mode: `"chat"` answers at once, `"thinking"` reasons first.
      effort: a key of the profile's `effort_prefixes`; matters in thinking mode only.
      drop_thinking: leaves out the reasoning before the last user turn, unless there are tools.
      add_bos: begins with BOS, unless there is a context.
      context: earlier messages, already rendered by this function: they are read and not rendered
        again.
      profile: a key of `PROFILES`, or a profile.

    Raises:
      ConversationError: a message or an argument breaks a rule; the error names it.

    Source: the prompt encoder published with the V4 checkpoints; the order of roles follows the
    vendor's package deepseek-recipe.
    """
    if mode not in MODES:
        raise ConversationError(f"mode must be one of {', '.join(MODES)}, got {brief(mode)}")
    thinking = mode == "thinking"
    prefix = _effort_prefix(effort, profile)
    turns = read_turns(context, "context") if context else []
    asked = bool(turns) and turns[-1].role != "assistant"  # the context already asks for the answer
    turns += read_turns(messages, "messages", before=turns)
    asks = turns[-1].role != "assistant" or turns[-1].task is not None
    turns = sort_tool_results(join_users(hoist_system(turns)))
    check_tasks(turns)
    keep_reasoning = not drop_thinking or any(turn.tools for turn in turns)
    if thinking and not keep_reasoning:
        turns = drop_earlier_thinking(turns)

    first_open = len(turns)  # the first turn that may have reasoning; counts the requested answer
    if thinking and keep_reasoning:
        first_open = 0
    elif thinking and not asks:
        first_open = find_last_user(turns)
    pieces = markup(BOS) if add_bos and not context else []
    if thinking and not (turns and turns[0].encoded):
        pieces.append(Piece(prefix))
    for i, turn in enumerate(turns):
        if turn.encoded:
            continue
        if turn.role != "assistant":
            pieces, asked = [*pieces, *_render_turn(turn)], False
            continue
        opened, task = thinking and i >= first_open, find_task(turns[:i])
        if not asked:
            pieces += _render_opening(thinking, opened=opened, task=task)
        asked = False
        # The answer to a task has no reasoning, because no <think> precedes it.
        answer = _render_answer(turn, reasons=opened and task is None)
        pieces += [replace(piece, weight=turn.weight) for piece in answer]
    if asks:
        pieces += _render_opening(thinking, opened=thinking, task=find_task(turns))
    return [piece for piece in pieces if piece.text]


def _effort_prefix(effort: str | None, profile: str | PromptProfile) -> str:
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ConversationError(
                f"profile must be one of {', '.join(PROFILES)}, got {brief(profile)}"
            )
        profile = PROFILES[profile]
    effort = effort or profile.default_effort
    if effort not in tuple(profile.effort_prefixes):
        known = ", ".join(profile.effort_prefixes)
        meant = profile.api_efforts.get(str(effort), profile.default_effort)
        raise ConversationError(
            f"effort must be one of {known}, got {brief(effort)}; try {meant!r}"
        )
    return profile.effort_prefixes[effort]


def _render_turn(turn: Turn) -> list[Piece]:
    match turn.role:
        case "system":
            return [Piece(turn.content), *_render_instructions(turn)]
        case "developer":
            return [*markup(USER), Piece(turn.content), *_render_instructions(turn)]
        case "latest_reminder":
            return markup(f"{LATEST_REMINDER}{SLOT}", turn.content)
        case "user":
            texts = (
                f"<tool_result>{block.text}</tool_result>" if block.is_result else block.text
                for block in turn.blocks
            )
            return markup(f"{USER}{SLOT}", "\n\n".join(texts))
    raise AssertionError(f"role {turn.role!r} was let through")


def _render_instructions(turn: Turn) -> list[Piece]:
    pieces = [Piece("\n\n"), *render_tools(turn.tools)] if turn.tools else []
    if turn.response_format:
        pieces.append(
            Piece(
                "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to "
                f"reply:\n{to_json(turn.response_format)}"
            )
        )
    return pieces


def _render_opening(thinking: bool, *, opened: bool, task: str | None) -> list[Piece]:
    """Returns what precedes an answer: the assistant's token and a tag, or a task's token."""
    if task == "action":
        return markup(ASSISTANT + (THINK_START if thinking else THINK_END) + TASKS[task])
    if task is not None:
        return markup(TASKS[task])
    return markup(ASSISTANT + (THINK_START if opened else THINK_END))


def _render_answer(turn: Turn, *, reasons: bool) -> list[Piece]:
    """Returns what the assistant wrote in a turn."""
    pieces = [Piece(turn.reasoning_content), *markup(THINK_END)] if reasons else []
    pieces.append(Piece(turn.content))
    if turn.tool_calls:
        pieces += [Piece("\n\n"), *render_tool_calls(turn.tool_calls)]
    return pieces if turn.wo_eos else [*pieces, *markup(EOS)]
