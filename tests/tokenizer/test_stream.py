"""Completions read whole and in pieces: the tables are run both ways."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from v4jax.errors import CompletionError, ConversationError
from v4jax.tokenizer import (
    ContentText,
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

EOS = "<｜end▁of▁sentence｜>"
CALL = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)
TWO_CALLS = (
    "\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="s" string="true">a "b"\n</p</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="o" string="false">{"k": [1]}</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="g">\n'
    "\n"
    "</｜DSML｜invoke>\n"
    "</｜DSML｜tool_calls>"
)
TWO_READ = [("f", r'{"s": "a \"b\"\n</p", "o": {"k": [1]}}'), ("g", "{}")]


@dataclass
class Case:
    text: str
    content: str = ""
    reasoning: str = ""
    calls: list = field(default_factory=list)
    mode: str = "chat"

    def message(self):
        functions = [{"name": name, "arguments": arguments} for name, arguments in self.calls]
        return {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning,
            "tool_calls": [{"type": "function", "function": f} for f in functions],
        }


STRICT = {
    "content": Case(f"x{EOS}", "x"),
    "nothing": Case(EOS),
    "reasoning": Case(f"r</think>x{EOS}", "x", "r", mode="thinking"),
    "empty reasoning": Case(f"</think>x{EOS}", "x", mode="thinking"),
    "call": Case(f"x{CALL}{EOS}", "x", calls=[("f", '{"x": 1}')]),
    "two calls": Case(f"x{TWO_CALLS}{EOS}", "x", calls=TWO_READ),
    "reasoning and call": Case(
        f"r</think>{CALL}{EOS}", reasoning="r", calls=[("f", '{"x": 1}')], mode="thinking"
    ),
    "newlines before the envelope are content": Case(
        f"x\n\n{CALL}{EOS}", "x\n\n", calls=[("f", '{"x": 1}')]
    ),
    "text that nearly is a tag": Case(
        f"a </thin \n\n<｜DS \n\n\n< ｜ <｜end{EOS}", "a </thin \n\n<｜DS \n\n\n< ｜ <｜end"
    ),
    "call without the empty line": Case(
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="g">\n</｜DSML｜invoke>\n'
        f"</｜DSML｜tool_calls>{EOS}",
        calls=[("g", "{}")],
    ),
    "value with tags inside": Case(
        f"{CALL}{EOS}".replace(">1<", "><｜DSML｜invoke></｜DSML｜invoke><"),
        calls=[("f", '{"x": <｜DSML｜invoke></｜DSML｜invoke>}')],
    ),
}
TOLERANT = {
    "no EOS": Case("x", "x"),
    "no EOS, half a tag": Case("x\n\n</thi", "x\n\n</thi"),
    "no EOS, half an envelope": Case("x\n\n<｜DSML｜tool_ca", "x"),
    "no EOS inside the reasoning": Case("r", reasoning="r", mode="thinking"),
    "EOS inside the reasoning": Case(f"r{EOS}", reasoning="r", mode="thinking"),
    "no EOS after a call": Case(f"x{CALL}", "x", calls=[("f", '{"x": 1}')]),
    "no EOS inside a value": Case(f"x{CALL[:-50]}", "x", calls=[("f", '{"x": 1')]),
    "no EOS inside a header": Case('\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f'),
    "no blank line": Case(f"x{CALL[2:]}{EOS}", "x", calls=[("f", '{"x": 1}')]),
    "one newline": Case(f"x{CALL[1:]}{EOS}", "x", calls=[("f", '{"x": 1}')]),
    "calls inside the reasoning": Case(
        f"r{CALL}{EOS}", reasoning="r", calls=[("f", '{"x": 1}')], mode="thinking"
    ),
    "calls inside the reasoning, closed after": Case(
        f"r{CALL}\n</think>\n\n{EOS}", reasoning="r", calls=[("f", '{"x": 1}')], mode="thinking"
    ),
    "doubled bars": Case(
        f"x{TWO_CALLS}{EOS}".replace("｜DSML｜", "｜｜DSML｜｜"), "x", calls=TWO_READ
    ),
    "other whitespace": Case(
        f"x{TWO_CALLS}\n{EOS}".replace(">\n<", ">  \n\n<").replace(">\n\n<", "><"),
        "x",
        calls=TWO_READ,
    ),
}
TOLERANT_CASES = {**STRICT, **TOLERANT}


@pytest.mark.parametrize("case", STRICT.values(), ids=STRICT.keys())
def test_parse(case):
    assert parse_completion(case.text, case.mode) == case.message()


@pytest.mark.parametrize("case", TOLERANT_CASES.values(), ids=TOLERANT_CASES.keys())
def test_parse_tolerant(case):
    assert parse_completion(case.text, case.mode, tolerant=True) == case.message()


@pytest.mark.parametrize("case", TOLERANT.values(), ids=TOLERANT.keys())
def test_strict_refuses(case):
    with pytest.raises(CompletionError):
        parse_completion(case.text, case.mode)


MALFORMED = {
    "no EOS": (
        "abc",
        "content: the completion ends without <｜end▁of▁sentence｜>; "
        "tolerant=True accepts a completion cut off by the length limit",
    ),
    "no EOS among the calls": (
        f"x{CALL[:60]}",
        "tool call 0 (f): the completion ends without <｜end▁of▁sentence｜>; "
        "tolerant=True accepts a completion cut off by the length limit",
    ),
    "BOS in the content": (
        f"ab<｜begin▁of▁sentence｜>{EOS}",
        "content, character 2: expected text and then <｜end▁of▁sentence｜>, "
        'got "<｜begin▁of▁sentence｜>"',
    ),
    "think in the content": (
        f"ab<think>c{EOS}",
        'content, character 2: expected text and then <｜end▁of▁sentence｜>, got "<think>"',
    ),
    "end of thinking in the content": (
        f"ab</think>c{EOS}",
        'content, character 2: expected text and then <｜end▁of▁sentence｜>, got "</think>"',
    ),
    "calls without the blank line": (
        f"ab{CALL[1:]}{EOS}",
        'content, character 4: expected text and then <｜end▁of▁sentence｜>, got "｜DSML｜"',
    ),
    "text behind EOS": (
        f"a{EOS}b",
        "end of the completion, character 20: expected nothing behind <｜end▁of▁sentence｜>, "
        'got "b"',
    ),
    "text behind the calls": (
        f"{CALL}\n{EOS}",
        'end of the tool calls, character 141: expected "<｜end▁of▁sentence｜>", got "\\n"',
    ),
    "no newline behind the opening tag": (
        f"{CALL}{EOS}".replace("tool_calls>\n", "tool_calls> "),
        'tool calls, character 19: expected ">\\n", got "> "',
    ),
    "text between the calls": (
        f"{CALL}{EOS}".replace("invoke>\n", "invoke>\nso "),
        'tool call 0 (f), character 122: expected "<｜DSML｜invoke" or "</｜DSML｜tool_calls>", '
        'got "s"',
    ),
    "call without name": (
        f"{CALL}{EOS}".replace(' name="f"', ""),
        'tool call 0, character 34: expected name="NAME"> in the opening tag, got ">\\n"',
    ),
    "text behind the name": (
        f"{CALL}{EOS}".replace('"f">', '"f" >'),
        'tool call 0, character 34: expected name="NAME"> in the opening tag, got " name="f" >\\n"',
    ),
    "text behind the header": (
        f"{CALL}{EOS}".replace('"f">\n', '"f">\nx'),
        'tool call 0 (f), character 45: expected "<｜DSML｜parameter" or "</｜DSML｜invoke" or '
        '"\\n<｜DSML｜parameter" or "\\n</｜DSML｜invoke", got "x"',
    ),
    "parameter without its kind": (
        f"{CALL}{EOS}".replace(' string="false"', ""),
        'tool call 0 (f), character 61: expected name="NAME" string="true|false"> in the opening '
        'tag, got " name="x">1"',
    ),
    "kind that is no boolean": (
        f"{CALL}{EOS}".replace("false", "no"),
        'tool call 0 (f), character 61: expected name="NAME" string="true|false"> in the opening '
        'tag, got " name="x" string="no">1"',
    ),
    "parameter twice": (
        f"{TWO_CALLS}{EOS}".replace('"o"', '"s"'),
        'tool call 0 (f), character 154: parameter "s" is given twice',
    ),
    "closing tag without <": (
        f"{CALL}{EOS}".replace("1</", "1/"),
        'tool call 0 (f), character 87: expected </｜DSML｜parameter> behind parameter "x", '
        'got "/｜DSML｜parameter"',
    ),
    "EOS inside a value": (
        f"{CALL[:88]}{EOS}",
        'tool call 0 (f), character 88: expected </｜DSML｜parameter> behind parameter "x", '
        'got "<｜end▁of▁sentence｜>"',
    ),
    "EOS instead of a closing tag": (
        f"{CALL.removesuffix('</｜DSML｜tool_calls>')}{EOS}",
        'tool call 0 (f), character 122: expected "<｜DSML｜invoke" or "</｜DSML｜tool_calls>", '
        'got "<｜e"',
    ),
}
MALFORMED_THINKING = {
    "no end of thinking": (
        "abc",
        "reasoning: the completion ends without </think>; "
        "tolerant=True accepts a completion cut off by the length limit",
    ),
    "EOS before the end of thinking": (
        f"abc{EOS}",
        'reasoning, character 3: expected text and then </think>, got "<｜end▁of▁sentence｜>"',
    ),
    "thinking opened again": (
        f"<think>abc</think>x{EOS}",
        'reasoning, character 0: expected text and then </think>, got "<think>"',
    ),
    "thinking closed twice": (
        f"abc</think></think>x{EOS}",
        'content, character 11: expected text and then <｜end▁of▁sentence｜>, got "</think>"',
    ),
    "calls inside the reasoning": (
        f"abc{CALL}{EOS}",
        'reasoning, character 3: expected text and then </think>, got "\\n\\n<｜DSML｜tool_calls"',
    ),
}


def table(malformed, mode):
    return [pytest.param(*case, mode, id=f"{mode}: {name}") for name, case in malformed.items()]


@pytest.mark.parametrize(
    "text, expected, mode", table(MALFORMED, "chat") + table(MALFORMED_THINKING, "thinking")
)
def test_malformed(text, expected, mode):
    with pytest.raises(CompletionError) as error:
        parse_completion(text, mode)
    assert str(error.value) == expected
    if "ends without" in expected:  # a splitter takes this for the length limit
        return
    with pytest.raises(CompletionError) as error:
        split([*text], mode)
    assert str(error.value) == expected


def split(pieces, mode, *, tolerant=False):
    splitter = StreamSplitter(mode, tolerant=tolerant)
    events = [event for piece in pieces for event in splitter.push(piece)]
    return events + splitter.finish()


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
    "end": ("chat", ["a<｜end▁", "of▁sentence｜>"], [[ContentText("a")], [Done("stop")]]),
}


@pytest.mark.parametrize("mode, pieces, expected", HELD_BACK.values(), ids=HELD_BACK.keys())
def test_held_back(mode, pieces, expected):
    splitter = StreamSplitter(mode)
    assert [splitter.push(piece) for piece in pieces] == expected


FINISHED = {
    "in the content": ("x\n\n</thi", [ContentText("</thi"), Done("length")]),
    "in the envelope": ("x\n\n<｜DSML｜tool", [Done("length", "\n\n<｜DSML｜tool")]),
    "in a header": (CALL[:42], [Done("length", ' name="f')]),
    "in a closing tag": (CALL[:95], [Done("length", "</｜DSML｜")]),
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
