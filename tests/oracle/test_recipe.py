"""Prompts and completions beside the vendor's own package, deepseek-recipe.

Two differences are meant. A call without arguments has an empty line in their place, as in the
prompt encoder published with the checkpoints; deepseek-recipe writes none. And a conversation that
ends with an answer is whole for us, while deepseek-recipe asks for another: the tests ask, too.
"""

import itertools
import json
import random

import pytest
from tokenizer.completions import DEPARTED, TOLERANT_CASES

from v4jax.tokenizer import encode_messages, parse_completion

pytestmark = pytest.mark.oracle
recipe = pytest.importorskip("deepseek_recipe")

ENCODING = recipe.DeepseekV4Encoding()
EOS = "<｜end▁of▁sentence｜>"
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
    }
]
EFFORTS = {"low": "low", "high": "high", "max": "max"}


def render_theirs(messages, *, thinking, effort="low", tools=()):
    if not thinking:  # as its conversion of a request does
        messages = [{**message, "reasoning_content": None} for message in messages]
    made = [MAKERS[message["role"]](message) for message in messages]
    functions = [tool["function"] for tool in tools]
    conversation = recipe.Conversation(
        made,
        thinking_mode=thinking,
        reasoning_effort=EFFORTS[effort],
        tools=[recipe.ToolDefinition(**function) for function in functions],
    )
    return ENCODING.render_conversation(conversation).prompt


MAKERS = {
    "system": lambda m: recipe.SystemMessage(m["content"]),
    "user": lambda m: recipe.UserMessage(m["content"]),
    "assistant": lambda m: recipe.AssistantMessage(
        m["content"],
        m.get("reasoning_content"),
        [
            recipe.ToolCall(c["id"], c["function"]["name"], c["function"]["arguments"])
            for c in m.get("tool_calls", [])
        ]
        or None,
    ),
    "tool": lambda m: recipe.ToolMessage(m["content"], m["tool_call_id"]),
    "latest_reminder": lambda m: recipe.LatestReminderMessage(m["content"]),
}


def render_ours(messages, *, thinking, effort="low", tools=()):
    if tools:
        messages = [{"role": "system", "content": "", "tools": list(tools)}, *messages]
    options = {"mode": "thinking" if thinking else "chat", "effort": effort, "profile": "0731"}
    return encode_messages(messages, **options)


LETTERS = {
    "s": lambda i: {"role": "system", "content": f"s{i}"},
    "u": lambda i: {"role": "user", "content": f"u{i}"},
    "a": lambda i: {"role": "assistant", "content": f"a{i}", "reasoning_content": f"r{i}"},
    "l": lambda i: {"role": "latest_reminder", "content": f"l{i}"},
}
# Every order of up to four messages that does not end with an answer.
ORDERS = [
    "".join(order)
    for length in range(1, 5)
    for order in itertools.product(LETTERS, repeat=length)
    if order[-1] != "a"
]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("tools", [(), TOOLS], ids=["", "tools"])
def test_every_order_of_roles(thinking, tools):
    for order in ORDERS:
        messages = [LETTERS[letter](i) for i, letter in enumerate(order)]
        options = {"thinking": thinking, "tools": tools}
        assert render_ours(messages, **options) == render_theirs(messages, **options), order


def draw_conversation(draw: random.Random) -> list[dict]:
    messages = [{"role": "system", "content": "S <b>&\n"}] * draw.randrange(2)
    for turn in range(draw.randrange(1, 4)):
        messages += [{"role": "user", "content": f"ü {turn}\n\n"}] * draw.randrange(1, 3)
        calls = [
            {
                "id": f"{turn}.{i}",
                "function": {"name": f"f{i}", "arguments": draw.choice(ARGUMENTS)},
            }
            for i in range(draw.randrange(3))
        ]
        answer = {"role": "assistant", "content": draw.choice(["", "a"]), "tool_calls": calls}
        messages.append(answer | {"reasoning_content": draw.choice(["", "r\n"])})
        results = [
            {"role": "tool", "content": f"R{c['id']}", "tool_call_id": c["id"]} for c in calls
        ]
        messages += draw.sample(results, len(results))
    return [*messages, {"role": "user", "content": "last"}]


ARGUMENTS = [
    '{"s": "a \\"b\\" <c>", "n": 1.5, "o": {"k": [1, null, "x"]}}',
    '{"x": true}',
    '{"ü": "\\u00fc", "long": "1\\n2"}',
    "no JSON",
    "[1, 2]",
]


@pytest.mark.parametrize("seed", range(40))
def test_conversations(seed):
    draw = random.Random(seed)
    messages = draw_conversation(draw)
    options = {
        "thinking": draw.random() < 0.5,
        "effort": draw.choice([*EFFORTS]),
        "tools": draw.choice([(), TOOLS]),
    }
    assert render_ours(messages, **options) == render_theirs(messages, **options)


def read_theirs(text: str, mode: str, size: int | None = None) -> dict:
    body = {
        "model": "DeepSeek-V4-Pro",
        "stream": True,
        "messages": [{"role": "user", "content": "x"}],
        "thinking": {"type": "enabled" if mode == "thinking" else "disabled"},
        "tools": TOOLS,
    }
    request = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    generator = recipe.ChatCompletionRequest.chunk_generator(request, "id", "model")
    processor = recipe.StreamProcessor(generator, request.parsing_options)
    chunks = processor.push(recipe.InferenceChunk.ready())
    size = size or max(len(text), 1)
    for i in range(0, len(text), size):
        chunks += processor.push(recipe.InferenceChunk.text(text[i : i + size]))
    finish = recipe.InferenceChunk.finish(recipe.InferenceFinishReason.Stop)
    chunks += processor.push(finish) + processor.finish()
    content, reasoning, calls = "", "", []
    for chunk in chunks:
        for choice in json.loads(chunk.to_json())["choices"]:
            delta = choice["delta"]
            content += delta.get("content") or ""
            reasoning += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or []:
                if call["index"] == len(calls):
                    calls.append(["", ""])
                function = call.get("function") or {}
                calls[call["index"]][0] += function.get("name") or ""
                calls[call["index"]][1] += function.get("arguments") or ""
    return {"content": content, "reasoning": reasoning, "calls": calls}


# Ours reads these better; `completions.DEPARTED` says how deepseek-recipe reads them.
OURS = {
    "closer missing, then a parameter",
    "closer without <",
    "value closed by its call",
    "value closed by the calls",
    "call not closed",
    "call closed by EOS",
    "calls twice",
    "parameter twice",
    "no kind",
    "no name",
    "closing tag of nothing",
    "thinking opened again",
    "text behind EOS",
    *(name for name in DEPARTED if name.startswith("value '") or name.startswith('value "')),
}
# Whitespace before calls is trimmed there; tags with doubled bars are text; a value that was cut
# off is passed on, half its closing tag included.
OTHER = {"newlines before the envelope are content", "doubled bars", "no EOS inside a value"}
READ = {k: v for k, v in TOLERANT_CASES.items() if k not in OURS | OTHER}


@pytest.mark.parametrize("case", READ.values(), ids=READ.keys())
def test_completions(case):
    text = case.text.removesuffix(EOS)
    theirs = read_theirs(text, case.mode)
    ours = parse_completion(case.text, case.mode, tolerant=True)
    calls = [[c["function"]["name"], c["function"]["arguments"]] for c in ours["tool_calls"]]
    assert calls == theirs["calls"]
    assert (ours["content"], ours["reasoning_content"]) == (theirs["content"], theirs["reasoning"])
