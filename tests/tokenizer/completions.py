"""Completions beside the messages they are: well-formed ones, and those only tolerance accepts."""

from dataclasses import dataclass, field

from v4jax.tokenizer import StreamSplitter
from v4jax.tokenizer.tools import to_json

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
}
TOLERANT = {
    "no EOS": Case("x", "x"),
    "no EOS, half a tag": Case("x\n\n</thi", "x\n\n</thi"),
    "no EOS, half an envelope": Case("x\n\n<｜DSML｜tool_ca", "x"),
    "no EOS inside the reasoning": Case("r", reasoning="r", mode="thinking"),
    "EOS inside the reasoning": Case(f"r{EOS}", reasoning="r", mode="thinking"),
    "no EOS after a call": Case(f"x{CALL}", "x", calls=[("f", '{"x": 1}')]),
    "no EOS inside a value": Case(f"x{CALL[:-50]}", "x", calls=[("f", '{"x": ')]),
    "no EOS inside a string": Case(TWO_CALLS.partition("b")[0], calls=[("f", r'{"s": "a \"')]),
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


def call(*parameters, name="f", end="</｜DSML｜invoke>\n"):
    return f'<｜DSML｜invoke name="{name}">\n{"".join(parameters)}{end}'


def parameter(name, value, *, string, end="</｜DSML｜parameter>\n"):
    kind = str(string).lower()
    return f'<｜DSML｜parameter name="{name}" string="{kind}">{value}{end}'


OPEN, CLOSE = "\n\n<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"
A, B = parameter("a", "x", string=True), parameter("b", "y", string=True)
OPEN_A = parameter("a", "x", string=True, end="\n")
ONE, BOTH = [("f", '{"a": "x"}')], [("f", '{"a": "x", "b": "y"}')]
# Outside the format and read all the same, with a departure each. R: deepseek-recipe 0.2.0 reads it
# so; a comment says where R does otherwise.
DEPARTED = {
    "closer missing, then a parameter": Case(  # R: the value holds the next parameter's tag
        f"{OPEN}{call(OPEN_A, B)}{CLOSE}{EOS}", calls=[("f", r'{"a": "x\n", "b": "y"}')]
    ),
    "closer misspelt": Case(  # R
        f"{OPEN}{call(A.replace('/｜DSML｜parameter', '/｜DSML｜param'), B)}{CLOSE}{EOS}",
        calls=BOTH,
    ),
    "closer without <": Case(f"{OPEN}{call(A.replace('</', '/'))}{CLOSE}{EOS}", calls=ONE),
    "value closed by its call": Case(  # R: the next call's parameter joins this call
        f"{OPEN}{call(OPEN_A)}{call(B, name='g')}{CLOSE}{EOS}",
        calls=[("f", r'{"a": "x\n"}'), ("g", '{"b": "y"}')],
    ),
    "value closed by the calls": Case(  # R: arguments without their brace
        f"{OPEN}{call(OPEN_A, end='')}{CLOSE}{EOS}", calls=[("f", r'{"a": "x\n"}')]
    ),
    "call not closed": Case(  # R: one call with both parameters
        f"{OPEN}{call(A, end='')}{call(B, name='g')}{CLOSE}{EOS}",
        calls=[("f", '{"a": "x"}'), ("g", '{"b": "y"}')],
    ),
    "calls not closed": Case(f"{OPEN}{call(A)}{EOS}", calls=ONE),  # R
    "call closed by EOS": Case(f"{OPEN}{call(A, end='')}{EOS}", calls=ONE),
    "value cut by EOS": Case(f"{OPEN}{call(OPEN_A, end='')}{EOS}", calls=[("f", r'{"a": "x\n')]),
    "no opening tag": Case(f"\n\n{call(A)}{CLOSE}{EOS}", calls=ONE),  # R
    "opening tag misspelt": Case(  # R
        f"{OPEN.replace('calls', 'call')}{call(A)}{CLOSE}{EOS}", calls=ONE
    ),
    "other names for the calls": Case(  # R
        f"{OPEN}{call(A)}{CLOSE}{EOS}".replace("tool_calls", "function_calls"), calls=ONE
    ),
    "text between": Case(f"{OPEN}so {call(A)}and{CLOSE}{EOS}", calls=ONE),  # R
    "text behind": Case(f"{OPEN}{call(A)}{CLOSE} more{EOS}", calls=ONE),  # R
    "calls twice": Case(  # R: the first element's calls only
        f"{OPEN}{call(A)}{CLOSE}{OPEN}{call(B, name='g')}{CLOSE}{EOS}",
        calls=[("f", '{"a": "x"}'), ("g", '{"b": "y"}')],
    ),
    "no call among the calls": Case(f"t{OPEN}{CLOSE}{EOS}", "t"),  # R, without a word
    "parameter twice": Case(f"{OPEN}{call(A, A)}{CLOSE}{EOS}", calls=ONE),  # R: the key twice
    "no kind": Case(  # R: the rest of the completion is the parameter's name
        f"{OPEN}{call(A.replace(' string=', ' x='))}{CLOSE}{EOS}", calls=ONE
    ),
    "no name": Case(
        f"{OPEN}{call(A.replace(' name=', ' x='))}{CLOSE}{EOS}", calls=[("f", '{"": "x"}')]
    ),
    "closing tag of nothing": Case(f"a{CLOSE}b{EOS}", "ab"),
    "thinking closed again": Case(f"r</think>c</think>d{EOS}", "cd", "r", mode="thinking"),  # R
    "thinking closed in chat": Case(f"a</think>b{EOS}", "ab"),  # R
    "thinking opened again": Case(f"<think>r</think>c{EOS}", "c", "r", mode="thinking"),
    "text behind EOS": Case(f"a{EOS}b", "a"),
} | {
    # R: the text as it is, which makes the arguments no JSON, or another object.
    f"value {value!r}": Case(
        f"{OPEN}{call(parameter('a', value, string=False), B)}{CLOSE}{EOS}",
        calls=[("f", f'{{"a": {to_json(value)}, "b": "y"}}')],
    )
    for value in ("True", "", '1, "admin": true', "NaN", "-Infinity", "hello", "{'x': 1}", "[1")
}
TOLERANT_CASES = {**STRICT, **TOLERANT, **DEPARTED}


def split(pieces, mode, *, tolerant=False):
    splitter = StreamSplitter(mode, tolerant=tolerant)
    events = [event for piece in pieces for event in splitter.push(piece)]
    return events + splitter.finish()
