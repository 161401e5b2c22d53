"""Completions read whole and in pieces: the tables are run both ways."""

from itertools import pairwise

import pytest

from v4jax.errors import CompletionError, ConversationError
from v4jax.tokenizer import (
    ContentText,
    Departure,
    Done,
    ReasoningText,
    StreamSplitter,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    assemble,
    encode_messages,
    parse_completion,
)

from .completions import CALL, DEPARTED, EOS, STRICT, TOLERANT, TOLERANT_CASES, Case, split


@pytest.mark.parametrize("case", STRICT.values(), ids=STRICT.keys())
def test_parse(case):
    assert parse_completion(case.text, case.mode) == case.message()


@pytest.mark.parametrize("case", TOLERANT_CASES.values(), ids=TOLERANT_CASES.keys())
def test_parse_tolerant(case):
    assert parse_completion(case.text, case.mode, tolerant=True) == case.message()


@pytest.mark.parametrize("name", TOLERANT_CASES)
def test_departures_are_told(name):
    case = TOLERANT_CASES[name]
    events = split([case.text], case.mode, tolerant=True)
    departs = any(isinstance(event, Departure) for event in events)
    assert departs == (name in DEPARTED and name != "no call among the calls")


@pytest.mark.parametrize("name", [*TOLERANT, *DEPARTED])
def test_strict_refuses(name):
    if name == "no call among the calls":  # strange, and within the format
        return
    case = TOLERANT_CASES[name]
    with pytest.raises(CompletionError):
        parse_completion(case.text, case.mode)


def joined(events):
    """The events, neighbouring pieces of one text made one: what no way of cutting may change."""
    result = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, ReasoningText | ContentText) and type(last) is type(event):
            result[-1] = type(event)(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            result[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            result.append(event)
    return result


def test_events():
    assert joined(split([f"r</think>x{CALL}{EOS}"], "thinking")) == [
        ReasoningText("r"),
        ContentText("x"),
        ToolCallStart(0, "f"),
        ToolCallArguments(0, '{"x": 1}'),
        ToolCallEnd(0),
        Done("tool_calls"),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("case", TOLERANT_CASES.values(), ids=TOLERANT_CASES.keys())
def test_pieces_of_a_size(case, size):
    pieces = [case.text[i : i + size] for i in range(0, len(case.text), size)]
    events = split(pieces, case.mode, tolerant=True)
    assert joined(events) == joined(split([case.text], case.mode, tolerant=True))
    assert assemble(events) == case.message()


EVERY_CUT = ["reasoning and call", "text that nearly is a tag", "no EOS, half a tag", "one newline"]


@pytest.mark.parametrize("name", EVERY_CUT)
def test_every_two_cuts(name):
    case = TOLERANT_CASES[name]
    text, strict = case.text, name in STRICT
    whole = joined(split([text], case.mode, tolerant=not strict))
    for i in range(len(text) + 1):
        for j in range(i, len(text) + 1):
            pieces = (text[:i], text[i:j], text[j:])
            assert joined(split(pieces, case.mode, tolerant=not strict)) == whole, pieces


@pytest.mark.parametrize("case", TOLERANT_CASES.values(), ids=TOLERANT_CASES.keys())
def test_nothing_is_taken_back(case):
    # What was said so far is the beginning of the final message, after every character.
    splitter = StreamSplitter(case.mode, tolerant=True)
    events = []
    for character in case.text:
        events += splitter.push(character)
        so_far = assemble(events)
        assert case.content.startswith(so_far["content"])
        assert case.reasoning.startswith(so_far["reasoning_content"])
        calls = [call["function"] for call in so_far["tool_calls"]]
        for call, (name, arguments) in zip(calls, case.calls, strict=False):
            assert call["name"] == name
            assert arguments.startswith(call["arguments"])


HELD_BACK = {
    "end of thinking": ("thinking", ["ab</thi"], [[ReasoningText("ab")]]),
    "decided: text": (
        "thinking",
        ["ab</thi", "n "],
        [[ReasoningText("ab")], [ReasoningText("</thin ")]],
    ),
    "decided: tag": ("thinking", ["</think", ">a"], [[], [ContentText("a")]]),
    "newlines": ("chat", ["a\n", "\n", "\n"], [[ContentText("a")], [], [ContentText("\n")]]),
    "envelope": ("chat", ["a\n\n<", "｜DSML｜", "tool"], [[ContentText("a")], [], []]),
    "value that may be no JSON": (
        "chat",
        [CALL[:86], "1", "</｜DSML｜parameter>"],
        [
            [ToolCallStart(0, "f"), ToolCallArguments(0, '{"x": ')],
            [],
            [ToolCallArguments(0, "1")],
        ],
    ),
    "end": ("chat", ["a<｜end▁", "of▁sentence｜>"], [[ContentText("a")], [Done("stop")]]),
}


@pytest.mark.parametrize("mode, pieces, expected", HELD_BACK.values(), ids=HELD_BACK.keys())
def test_held_back(mode, pieces, expected):
    splitter = StreamSplitter(mode)
    assert [splitter.push(piece) for piece in pieces] == expected


FINISHED = {
    "in the content": ("x\n\n</thi", [ContentText("</thi"), Done("length")]),
    "in the envelope": ("x\n\n<｜DSML｜tool", [Done("length")]),
    "in a header": (CALL[:42], [Done("length")]),
    "in a closing tag": (CALL[:95], [Done("length")]),
    "behind EOS": (f"x{EOS}", []),
}


@pytest.mark.parametrize("text, expected", FINISHED.values(), ids=FINISHED.keys())
def test_finish(text, expected):
    splitter = StreamSplitter("chat")
    splitter.push(text)
    assert splitter.finish() == expected
    assert splitter.finish() == []


def test_a_call_cut_off_has_no_end():
    events = split([CALL[:88]], "chat")
    assert ToolCallStart(0, "f") in events
    assert ToolCallEnd(0) not in events


def test_values_are_streamed():
    splitter = StreamSplitter("chat")
    splitter.push(CALL[:61] + ' name="s" string="true">')
    assert splitter.push('a "quoted" word') == [ToolCallArguments(0, r"a \"quoted\" word")]


def test_a_failed_splitter_stays_failed():
    splitter = StreamSplitter("chat")
    for act in (lambda: splitter.push("<think>"), lambda: splitter.push("a"), splitter.finish):
        with pytest.raises(CompletionError, match='got "<think>"'):
            act()


def test_unknown_mode():
    with pytest.raises(ConversationError, match="mode must be one of chat, thinking, got 'max'"):
        parse_completion("", "max")


ROUND_TRIP = [
    {"content": "answer"},
    {"content": "", "reasoning_content": "thought"},
    {"content": "two\n\nlines", "reasoning_content": "a\n\nb"},
    {"content": "x", "tool_calls": [("f", '{"a": "b", "n": [1, {"k": null}]}'), ("g", "{}")]},
    {"content": "", "reasoning_content": "r", "tool_calls": [("f", '{"s": "<a href=\\"x\\">"}')]},
]


@pytest.mark.parametrize("mode", ["chat", "thinking"])
@pytest.mark.parametrize("turn", ROUND_TRIP)
def test_an_encoded_turn_is_read_back(turn, mode):
    reasoning = turn.get("reasoning_content", "") if mode == "thinking" else ""
    case = Case("", turn["content"], reasoning, turn.get("tool_calls", []))
    message = case.message()
    user = {"role": "user", "content": "q"}
    prompt = encode_messages([user], mode=mode)
    completion = encode_messages([user, message], mode=mode).removeprefix(prompt)
    assert parse_completion(completion, mode) == message


def test_pairs_of_completions_share_no_state():
    cases = [case for case in STRICT.values() if case.mode == "chat"]
    for first, second in pairwise(cases):
        parse_completion(first.text, "chat")
        assert parse_completion(second.text, "chat") == second.message()
