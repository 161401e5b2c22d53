"""Effort prefixes and the other arguments of `encode_messages`."""

import pytest

from v4jax.errors import ConversationError
from v4jax.tokenizer import encode_messages

SYSTEM, USER = {"role": "system", "content": "S"}, {"role": "user", "content": "a"}

ABSOLUTE = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
BEYOND = (
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n"
    "You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: "
    "exhaustively decompose the problem into its most fundamental components, trace every causal "
    "chain to its root, and resolve the underlying cause rather than any surface symptom.\n"
    "Do not stop reasoning until you have independently verified the solution from multiple angles "
    "and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n"
)
EFFORTS = {
    "preview default": ("preview", None, ""),
    "preview high": ("preview", "high", ""),
    "preview max": ("preview", "max", ABSOLUTE),
    "0731 default": ("0731", None, ""),
    "0731 low": ("0731", "low", ""),
    "0731 high": ("0731", "high", ABSOLUTE),
    "0731 max": ("0731", "max", BEYOND),
}


@pytest.mark.parametrize("profile, effort, prefix", EFFORTS.values(), ids=EFFORTS.keys())
def test_effort(profile, effort, prefix):
    options = {"effort": effort, "profile": profile}
    messages = [SYSTEM, USER]
    thinking = encode_messages(messages, mode="thinking", **options)
    assert thinking == f"<｜begin▁of▁sentence｜>{prefix}S<｜User｜>a<｜Assistant｜><think>"
    assert encode_messages(messages, mode="chat", **options) == encode_messages(messages)


def test_effort_is_not_repeated_behind_a_context():
    prompt = encode_messages([USER], mode="thinking", effort="max", context=[SYSTEM])
    assert prompt == "<｜User｜>a<｜Assistant｜><think>"


BAD_ARGUMENTS = {
    "mode": (
        {"mode": "think"},
        "mode must be one of chat, thinking, got 'think'",
    ),
    "effort": (
        {"effort": "low"},
        "effort must be one of high, max, got 'low'; try 'high'",
    ),
    "effort of the other profile": (
        {"effort": "ultra", "profile": "0731"},
        "effort must be one of low, high, max, got 'ultra'; try 'max'",
    ),
    "profile": (
        {"profile": "v3"},
        "profile must be one of preview, 0731, got 'v3'",
    ),
}


@pytest.mark.parametrize("options, message", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_bad_argument(options, message):
    with pytest.raises(ConversationError) as error:
        encode_messages([USER], **options)
    assert str(error.value) == message
