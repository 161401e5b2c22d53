"""Completions beside the messages they are: well-formed ones, and those only tolerance accepts."""

from dataclasses import dataclass, field

from v4jax.tokenizer import StreamSplitter

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


def split(pieces, mode, *, tolerant=False):
    splitter = StreamSplitter(mode, tolerant=tolerant)
    events = [event for piece in pieces for event in splitter.push(piece)]
    return events + splitter.finish()
