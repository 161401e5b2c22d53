"""Conversations as documents: the prompt's own tokens, weights on what the assistant wrote."""

import json
import re

import numpy as np
import pytest

from v4jax.config import SourceConfig
from v4jax.errors import ConfigError, ConversationError, DataError
from v4jax.tokenizer import encode_messages, load_tokenizer
from v4jax.training.data.chat import ChatRecords, add_tools, encode_conversation

BYTE = load_tokenizer("byte")
EOS = "<｜end▁of▁sentence｜>"
TOOLS = [{"type": "function", "function": {"name": "f", "description": "für"}}]
ESCAPED = r'{"x": "\u003cthink>"}'
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


LONG = [
    {"role": "system", "content": "S", "tools": TOOLS},
    user("Grüße?"),
    assistant("", reasoning_content="hm", tool_calls=[CALL]),
    {"role": "tool", "content": "17 °C", "tool_call_id": "1"},
    assistant("It is 17 °C."),
    user("Sure?"),
    assistant("Yes."),
]

# {what: (messages, options, the texts that count)}
CASES = {
    "one answer": ([user("a"), assistant("b")], {}, ["b" + EOS]),
    "all answers": (
        [user("a"), assistant("b"), user("c"), assistant("d")],
        {},
        ["b" + EOS, "d" + EOS],
    ),
    "reasoning makes it thinking": (
        [user("a"), assistant("b", reasoning_content="r")],
        {},
        ["r</think>b" + EOS],
    ),
    "chat leaves reasoning out": (
        [user("a"), assistant("b", reasoning_content="r")],
        {"mode": "chat"},
        ["b" + EOS],
    ),
    "an answer first, and two in a row": (
        [assistant("a"), user("b"), assistant("c"), assistant("d")],
        {},
        ["a" + EOS, "c" + EOS, "d" + EOS],
    ),
    "a masked turn": (
        [user("a"), assistant("b", mask=True), user("c"), assistant("d")],
        {},
        ["d" + EOS],
    ),
    "tools": (
        LONG,
        {},
        [
            'hm</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
            '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>\n'
            f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}",
            f"</think>It is 17 °C.{EOS}",
            f"</think>Yes.{EOS}",
        ],
    ),
}


@pytest.mark.parametrize(("messages", "options", "counted"), CASES.values(), ids=CASES.keys())
def test_what_counts(messages, options, counted):
    (document,) = encode_conversation(messages, BYTE, **options)
    mode = options.get("mode") or ("thinking" if "</think>" in counted[0] else "chat")
    assert BYTE.decode(document.tokens) == encode_messages(messages, mode=mode)
    assert set(document.weights.tolist()) == {0.0, 1.0}
    edges = np.flatnonzero(np.diff(document.weights, prepend=0, append=0))
    runs = [document.tokens[a:b] for a, b in edges.reshape(-1, 2)]
    assert [BYTE.decode(run) for run in runs] == counted


THOUGHT = [
    user("p"),
    assistant("a", reasoning_content="r"),
    user("q"),
    assistant("b", reasoning_content="s"),
    assistant("c"),
    user("unanswered"),
]
INSTRUCTED = [user("p"), assistant("a"), {"role": "system", "content": "S"}, user("q")]

# {what: (messages, options, (how many messages ask, what counts) of each example)}
QUESTIONS = {
    "reasoning is left out": (
        THOUGHT, {}, [(1, f"r</think>a{EOS}"), (3, f"s</think>b{EOS}</think>c{EOS}")],
    ),
    "the last turn only": (
        THOUGHT, {"turns": "last"}, [(3, f"s</think>b{EOS}</think>c{EOS}")],
    ),
    "reasoning stays": (
        THOUGHT, {"drop_thinking": False},
        [(1, f"r</think>a{EOS}s</think>b{EOS}</think>c{EOS}")],
    ),
    "reasoning stays, the last turn only": (
        THOUGHT, {"drop_thinking": False, "turns": "last"},
        [(3, f"s</think>b{EOS}</think>c{EOS}")],
    ),
    "answers without reasoning": (
        THOUGHT, {"mode": "chat"}, [(1, f"a{EOS}b{EOS}c{EOS}")],
    ),
    "a masked answer is history": (
        [user("p"), assistant("a", reasoning_content="r", train=False), *THOUGHT[2:]], {},
        [(3, f"s</think>b{EOS}</think>c{EOS}")],
    ),
    "a system message that came later": (
        [*INSTRUCTED, assistant("b")], {}, [(1, f"a{EOS}"), (4, f"b{EOS}")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("messages", "options", "expected"), QUESTIONS.values(), ids=QUESTIONS.keys()
)
def test_every_answer_follows_the_prompt_of_inference(messages, options, expected):
    found = encode_conversation(messages, BYTE, **options)
    rendering = {name: value for name, value in options.items() if name != "turns"}
    thinking = any(message.get("reasoning_content") for message in messages)
    rendering = {"mode": "thinking" if thinking else "chat"} | rendering
    assert len(found) == len(expected)
    for document, (asking, counted) in zip(found, expected, strict=True):
        first = int(np.argmax(document.weights > 0))
        prompt = encode_messages(messages[:asking], **rendering)
        assert BYTE.decode(document.tokens[:first]) == prompt
        assert (
            "".join(
                BYTE.decode([token]) if token > 255 else chr(token)
                for token, weight in zip(document.tokens, document.weights, strict=True)
                if weight
            )
            == counted
        )


def test_the_same_ids_as_the_prompt_of_a_published_tokenizer():
    v4 = load_tokenizer("v4")
    (document,) = encode_conversation(LONG, v4)
    assert document.tokens.tolist() == v4.encode(encode_messages(LONG, mode="thinking"))
    # What the model reads before its first answer is what inference would give it.
    prompt = v4.encode(encode_messages(LONG[:2], mode="thinking"))
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert not document.weights[: len(prompt)].any() and document.weights[len(prompt)] == 1


def test_a_turn_that_counts_in_part():
    talk = [user("a"), assistant("b", weight=0.25), user("c"), assistant("d", train=False)]
    (document,) = encode_conversation(talk, BYTE)
    counted = document.tokens[document.weights > 0]
    assert BYTE.decode(counted) == "b" + EOS
    assert set(document.weights.tolist()) == {0.0, 0.25}


def write(folder, *records):
    file = folder / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    return [file]


def test_records_of_a_file(tmp_path):
    talk = [user("a"), assistant("b")]
    files = write(
        tmp_path,
        {"messages": talk, "id": 7},
        {"messages": talk, "mode": "thinking", "effort": "max"},
        {"messages": talk, "tools": TOOLS},
        {"messages": talk, "tools": json.dumps(TOOLS)},
    )
    records = ChatRecords(files, SourceConfig("chat", ("x",)), BYTE)
    texts = [BYTE.decode(records.read(i)[0].tokens) for i in range(len(records))]
    assert texts == [
        encode_messages(talk),
        encode_messages(talk, mode="thinking", effort="max"),
        *[encode_messages([{"role": "system", "content": "", "tools": TOOLS}, *talk])] * 2,
    ]
    assert records.place(1) == f"{files[0]}, line 2"


def test_tools_join_the_system_message():
    system = {"role": "system", "content": "S"}
    assert add_tools([system, user("a")], TOOLS) == [{**system, "tools": TOOLS}, user("a")]
    with pytest.raises(DataError, match=r"has tools twice, in the record and in messages\[0\]"):
        add_tools([{**system, "tools": TOOLS}], TOOLS)


# {what is wrong: (a record, the error, what the message must say)}
BROKEN = {
    "no messages": (
        {"text": "a"},
        DataError,
        "needs one of the fields messages, conversations, instruction, prompt, got text",
    ),
    "nothing to learn": (
        {"messages": [user("a")]},
        DataError,
        "has no assistant turn that counts; add the answer",
    ),
    "no list": ({"messages": 5}, ConversationError, "messages must be a list"),
    "bad role": ({"messages": [{"role": "bot"}]}, ConversationError, "messages[0].role must be"),
    "bad mode": (
        {"messages": [user("a"), assistant("b")], "mode": "think"},
        ConversationError,
        "mode must be one of chat, thinking, got 'think'",
    ),
    "an empty answer": (
        {"messages": [user("a"), assistant("b"), user("c"), assistant("")]},
        DataError,
        "messages[3] is empty, and would teach the model to answer nothing",
    ),
    "arguments that are no JSON": (
        {
            "messages": [
                user("a"),
                assistant("", tool_calls=[{"function": {"name": "f", "arguments": "{x: 1}"}}]),
            ]
        },
        DataError,
        "messages[1].tool_calls[0].function.arguments must be a JSON object, got '{x: 1}'",
    ),
    "a flag that is text": (
        {"messages": [user("a"), assistant("b", mask="false")]},
        ConversationError,
        "messages[1].mask must be true or false, got 'false'",
    ),
    "tools that are no JSON": (
        {"messages": [user("a"), assistant("b")], "tools": "f"},
        DataError,
        "tools is text, and no JSON",
    ),
    "a control token": (
        {"messages": [user("a"), assistant("<think>b</think>c")]},
        DataError,
        "a message holds a control token's literal, '<think>b</think>c'; reasoning belongs into "
        "reasoning_content",
    ),
    "a control token, escaped in an argument": (
        {
            "messages": [
                user("a"),
                assistant("", tool_calls=[{"function": {"name": "f", "arguments": ESCAPED}}]),
            ]
        },
        DataError,
        "a message holds a control token's literal, '<think>'",
    ),
}


@pytest.mark.parametrize(("record", "error", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_records(tmp_path, record, error, message):
    records = ChatRecords(write(tmp_path, record), SourceConfig("chat", ("x",)), BYTE)
    with pytest.raises(error, match=re.escape(message)):
        records.read(0)


def test_a_bad_effort_is_complained_about_at_once(tmp_path):
    config = SourceConfig("chat", ("x",), effort="huge")
    with pytest.raises(ConfigError, match=r"data\.sources: effort must be one of high, max"):
        ChatRecords(write(tmp_path, {}), config, BYTE)
