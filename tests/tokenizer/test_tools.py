import json

import pytest

from v4jax.tokenizer import ToolCall, parse_completion, render_tool_calls
from v4jax.tokenizer.markup import join_pieces

EOS = "<｜end▁of▁sentence｜>"

PARAMETERS = {
    "string": (
        '{"city": "Oslo"}',
        '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>',
    ),
    "string that looks like JSON": (
        '{"n": "1"}',
        '<｜DSML｜parameter name="n" string="true">1</｜DSML｜parameter>',
    ),
    "string unescaped": (
        r'{"code": "a < \"b\"\n\té"}',
        '<｜DSML｜parameter name="code" string="true">a < "b"\n\té</｜DSML｜parameter>',
    ),
    "null, boolean, number": (
        '{"a":null,"b":true,"c":1.5}',
        '<｜DSML｜parameter name="a" string="false">null</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="b" string="false">true</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="c" string="false">1.5</｜DSML｜parameter>',
    ),
    "object": (
        '{"o":{"ü":[1,{"k":"v"}]}}',
        '<｜DSML｜parameter name="o" string="false">{"ü": [1, {"k": "v"}]}</｜DSML｜parameter>',
    ),
    "empty object": ("{}", ""),
    "no JSON": (
        "{oops",
        '<｜DSML｜parameter name="arguments" string="true">{oops</｜DSML｜parameter>',
    ),
    "JSON, but no object": (
        "[1, 2]",
        '<｜DSML｜parameter name="arguments" string="true">[1, 2]</｜DSML｜parameter>',
    ),
}


@pytest.mark.parametrize("arguments, rendered", PARAMETERS.values(), ids=PARAMETERS.keys())
def test_render(arguments, rendered):
    assert join_pieces(render_tool_calls([ToolCall("f", arguments)])) == (
        "<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n'
        f"{rendered}\n"
        "</｜DSML｜invoke>\n"
        "</｜DSML｜tool_calls>"
    )


@pytest.mark.parametrize("arguments", [a for a, _ in PARAMETERS.values() if a.endswith("}")])
def test_rendered_calls_are_read_back(arguments):
    calls = [ToolCall("f", arguments), ToolCall("g", "{}"), ToolCall("f", arguments)]
    message = parse_completion(f"\n\n{join_pieces(render_tool_calls(calls))}{EOS}", "chat")
    read = [call["function"] for call in message["tool_calls"]]
    assert [call["name"] for call in read] == ["f", "g", "f"]
    assert [json.loads(call["arguments"]) for call in read] == [
        json.loads(arguments),
        {},
        json.loads(arguments),
    ]
