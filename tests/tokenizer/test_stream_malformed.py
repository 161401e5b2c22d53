"""Malformed completions, and what each is told; the same whole and character by character."""

import pytest

from v4jax.errors import CompletionError
from v4jax.tokenizer import parse_completion

from .completions import CALL, EOS, TWO_CALLS, split

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
        'end of the tool calls, character 141: expected nothing before "<｜end▁of▁sentence｜>", '
        'got "\\n"',
    ),
    "no newline behind the opening tag": (
        f"{CALL}{EOS}".replace("tool_calls>\n", "tool_calls> "),
        'tool calls, character 20: expected "\\n" before "<｜DSML｜", got " "',
    ),
    "text between the calls": (
        f"{CALL}{EOS}".replace("invoke>\n", "invoke>\nso "),
        'tool call 0 (f), character 121: expected "\\n" before "</｜DSML｜", got "\\nso "',
    ),
    "call without name": (
        f"{CALL}{EOS}".replace(' name="f"', ""),
        'tool calls, character 34: expected name="NAME"> in "<｜DSML｜invoke", got ">\\n"',
    ),
    "text behind the name": (
        f"{CALL}{EOS}".replace('"f">', '"f" >'),
        'tool calls, character 34: expected name="NAME"> in "<｜DSML｜invoke", '
        'got " name="f" >\\n"',
    ),
    "text behind the header": (
        f"{CALL}{EOS}".replace('"f">\n', '"f">\nx'),
        'tool call 0 (f), character 44: expected "\\n" or "\\n\\n" before "<｜DSML｜", got "\\nx"',
    ),
    "parameter without its kind": (
        f"{CALL}{EOS}".replace(' string="false"', ""),
        'tool call 0 (f), character 61: expected name="NAME" string="true|false"> in '
        '"<｜DSML｜parameter", got " name="x">1"',
    ),
    "kind that is no boolean": (
        f"{CALL}{EOS}".replace("false", "no"),
        'tool call 0 (f), character 61: expected name="NAME" string="true|false"> in '
        '"<｜DSML｜parameter", got " name="x" string="no">1"',
    ),
    "parameter twice": (
        f"{TWO_CALLS}{EOS}".replace('"o"', '"s"'),
        'tool call 0 (f), character 154: parameter "s" is given twice',
    ),
    "closing tag without <": (
        f"{CALL}{EOS}".replace("1</", "1/"),
        'tool call 0 (f), character 87: expected "</｜DSML｜parameter" behind parameter "x", '
        'got "/｜DSML｜parameter"',
    ),
    "EOS inside a value": (
        f"{CALL[:88]}{EOS}",
        'tool call 0 (f), character 88: expected "</｜DSML｜parameter" behind parameter "x", '
        'got "<｜end▁of▁sentence｜>"',
    ),
    "EOS instead of a closing tag": (
        f"{CALL.removesuffix('</｜DSML｜tool_calls>')}{EOS}",
        'tool call 0 (f), character 122: expected "</｜DSML｜tool_calls>", '
        'got "<｜end▁of▁sentence｜>"',
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
        'reasoning, character 3: expected text and then </think>, got "\\n\\n<｜DSML｜"',
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
