import pytest

from v4jax.errors import ConversationError
from v4jax.tokenizer import encode_messages

USER = {"role": "user", "content": "q"}
CALL = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
ROLES = "system, developer, user, assistant, tool, latest_reminder"
TASKS = "action, query, authority, domain, title, read_url"
TOOL_FORM = '{"type": "function", "function": {"name": "…"}}'
CALL_FORM = '{"id": "…", "function": {"name": "…", "arguments": "{}"}}'


def assistant(**fields):
    return [USER, {"role": "assistant", **fields}]


BAD_MESSAGES = {
    "no messages": (
        [],
        "messages must be a list of at least one message, got []; give dicts with role, content",
    ),
    "a string": (
        "hi",
        "messages must be a list of at least one message, got 'hi'; give dicts with role, content",
    ),
    "not a dict": (
        [USER, "hi"],
        """messages[1] must be a dict, got 'hi'; write {"role": "user", "content": "…"}""",
    ),
    "unknown role": (
        [{"role": "bot", "content": "q"}],
        f"messages[0].role must be one of {ROLES}, got 'bot'; rename or drop the message",
    ),
    "no role": (
        [{"content": "q"}],
        f"messages[0].role must be one of {ROLES}, got None; rename or drop the message",
    ),
    "role that is no string": (
        [{"role": ["user"], "content": "q"}],
        f"messages[0].role must be one of {ROLES}, got ['user']; rename or drop the message",
    ),
    "user without content": (
        [{"role": "user"}],
        'messages[0].content is missing, got None; give a string; "" is allowed',
    ),
    "assistant without anything": (
        assistant(content=None),
        'messages[1].content is missing, got None; give a string; "" is allowed',
    ),
    "empty developer": (
        [{"role": "developer", "content": ""}],
        "messages[0].content of a developer must not be empty, got ''; give the instruction",
    ),
    "content that is no text": (
        [{"role": "user", "content": 7}],
        "messages[0].content must be a string, got 7; "
        "give text; only user and tool messages take a list",
    ),
    "part without type": (
        [{"role": "user", "content": ["q"]}],
        "messages[0].content[0] must be a dict with a type, got 'q'; "
        'write {"type": "text", "text": "…"}',
    ),
    "tool message first": (
        [{"role": "tool", "content": "A", "tool_call_id": "1"}],
        "messages[0].role must follow an assistant's tool call, got 'tool'; "
        "put the assistant message with tool_calls before it",
    ),
    "tool_call_id that is no text": (
        [*assistant(tool_calls=[CALL]), {"role": "tool", "content": "A", "tool_call_id": [1]}],
        "messages[2].tool_call_id must be a string, got [1]; "
        "give a call and its result the same one",
    ),
    "tool_calls no list": (
        assistant(tool_calls=CALL),
        f"messages[1].tool_calls must be a list, got {CALL!r}; write [{CALL_FORM}]",
    ),
    "call without name": (
        assistant(tool_calls=[{"function": {"arguments": "{}"}}]),
        "messages[1].tool_calls[0] must call a function by name, "
        f"got {{'function': {{'arguments': '{{}}'}}}}; write {CALL_FORM}",
    ),
    "call with a list of arguments": (
        assistant(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
        "messages[1].tool_calls[0].function.arguments must be an object, or a string of JSON, "
        'got [1]; write "{}" for none',
    ),
    "two response formats": (
        [{"role": "system", "content": "s", "response_format": {"type": "text"}}] * 2,
        "messages[1].response_format is given twice, got {'type': 'text'}; keep one",
    ),
    "call with an id that is no text": (
        assistant(tool_calls=[{**CALL, "id": 1}]),
        "messages[1].tool_calls[0].id must be a string, got 1; "
        "give a call and its result the same one",
    ),
    "tools no list": (
        [{"role": "system", "content": "s", "tools": "f"}],
        f"messages[0].tools must be a list, got 'f'; write [{TOOL_FORM}]",
    ),
    "tool without function": (
        [{"role": "system", "content": "s", "tools": [{"name": "f"}]}],
        "messages[0].tools[0] must describe a function by name, got {'name': 'f'}; "
        f"write {TOOL_FORM}",
    ),
    "tools on a user": (
        [{**USER, "tools": [{"function": {"name": "f"}}]}],
        "messages[0].tools is no field of role user (it has content, task), "
        "got [{'function': {'name': 'f'}}]; remove it",
    ),
    "response_format no dict": (
        [{"role": "system", "content": "s", "response_format": "json"}],
        "messages[0].response_format must be a dict, got 'json'; "
        'for instance {"type": "json_object"}',
    ),
    "response_format no JSON": (
        [{"role": "system", "content": "s", "response_format": {"type": {1}}}],
        "messages[0].response_format must be JSON (Object of type set is not JSON serializable), "
        "got {'type': {1}}; use dicts, lists, strings, numbers, booleans",
    ),
    "misspelled field": (
        assistant(content="a", reasoning="r"),
        "messages[1].reasoning is no field of role assistant (it has content, "
        "reasoning_content, tool_calls, task, wo_eos), got 'r'; remove it",
    ),
    "unknown field that is 0": (
        assistant(content="a", los=0),
        "messages[1].los is no field of role assistant (it has content, reasoning_content, "
        "tool_calls, task, wo_eos), got 0; remove it",
    ),
    "flag that is text": (
        assistant(content="a", mask="false"),
        "messages[1].mask must be true or false, got 'false'; "
        "leave it out to learn what the assistant wrote",
    ),
    "flag that is a number": (
        assistant(content="a", train=0.5),
        "messages[1].train must be true or false, got 0.5; "
        "leave it out to learn what the assistant wrote",
    ),
    "weight beyond 1": (
        assistant(content="a", weight=2),
        "messages[1].weight must be a number from 0 to 1, got 2; "
        "leave it out to learn what the assistant wrote",
    ),
    "weight NaN": (
        assistant(content="a", weight=float("nan")),
        "messages[1].weight must be a number from 0 to 1, got nan; "
        "leave it out to learn what the assistant wrote",
    ),
    "learning what the user wrote": (
        [{**USER, "train": True}],
        "messages[0].train cannot make training learn a message of role user, got True; "
        "remove it: only the assistant's are learned",
    ),
    "flags that differ": (
        [USER, {"role": "assistant", "weight": 1, "loss": False}],
        "messages[1] says different things by weight and loss, "
        "got {'role': 'assistant', 'weight': 1, 'loss': False}; keep one of them",
    ),
    "wo_eos no flag": (
        assistant(content="a", wo_eos="yes"),
        "messages[1].wo_eos must be true or false, got 'yes'; "
        "leave it out to end the turn with EOS",
    ),
    "unknown task": (
        [{**USER, "task": "sing"}],
        f"messages[0].task must be one of {TASKS}, got 'sing'; leave it out for an ordinary turn",
    ),
    "task on a user that joins another": (
        [USER, {**USER, "task": "query"}],
        "messages[1].task needs a turn of its own, got 'query'; "
        "join its content into messages[0], or put an assistant message between",
    ),
    "task without answer": (
        [{**USER, "task": "query"}, USER],
        "messages[0].task must be answered by an assistant, got 'query' before a user message; "
        "remove the task or add its answer",
    ),
}


@pytest.mark.parametrize("messages, expected", BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_bad_message(messages, expected):
    with pytest.raises(ConversationError) as error:
        encode_messages(messages)
    assert str(error.value) == expected


def test_context_is_named():
    with pytest.raises(ConversationError, match=r"context\[0\]\.content is missing"):
        encode_messages([USER], context=[{"role": "user"}])


def test_long_value_is_cut():
    with pytest.raises(ConversationError) as error:
        encode_messages([{"role": "user", "content": {"text": "x" * 5000}}])
    assert len(str(error.value)) < 200


def test_empty_fields_of_other_libraries_are_absent():
    dumped = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "audio": None,
        "annotations": [],
        "weight": None,
    }
    plain = {"role": "assistant", "content": "a"}
    assert encode_messages([USER, dumped]) == encode_messages([USER, plain])


def test_messages_are_left_as_they_were():
    messages = [
        *assistant(tool_calls=[CALL, {**CALL, "id": "2"}]),
        {"role": "tool", "content": "B", "tool_call_id": "2"},
        {"role": "tool", "content": "A", "tool_call_id": "1"},
    ]
    before = repr(messages)
    encode_messages(messages, mode="thinking")
    assert repr(messages) == before


def test_arguments_may_be_an_object():
    def prompt(arguments):
        return encode_messages(
            assistant(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
        )

    assert prompt({"x": "ü", "y": [1]}) == prompt('{"x": "ü", "y": [1]}')
