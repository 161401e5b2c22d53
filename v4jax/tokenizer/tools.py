"""Tools on the wire: the block that declares them, the calls as text, and the calls read back.

A call looks like this, without any escaping of names or values:

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>
"""

import json
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from v4jax.tokenizer.events import ToolCallArguments, ToolCallEnd, ToolCallStart
from v4jax.tokenizer.scanner import NEED_MORE, Markers, Scanner, quote
from v4jax.tokenizer.vocabulary import DSML, EOS, THINK_END, THINK_START

# Opening and closing tags as far as they are fixed; what follows them is checked separately.
CALLS_OPEN, CALLS_CLOSE = f"<{DSML}tool_calls", f"</{DSML}tool_calls>"
INVOKE_OPEN, INVOKE_CLOSE = f"<{DSML}invoke", f"</{DSML}invoke"
PARAMETER_OPEN, PARAMETER_CLOSE = f"<{DSML}parameter", f"</{DSML}parameter"

_TOOLS_BLOCK = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by \
writing a "{CALLS_OPEN}>" block like the following:

{CALLS_OPEN}>
{INVOKE_OPEN} name="$TOOL_NAME">
{PARAMETER_OPEN} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{PARAMETER_CLOSE}>
...
{INVOKE_CLOSE}>
{INVOKE_OPEN} name="$TOOL_NAME2">
...
{INVOKE_CLOSE}>
{CALLS_CLOSE}

String parameters should be specified as is and set `string="true"`. For all other types (numbers, \
booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), you MUST output your complete reasoning \
inside {THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

%s

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


@dataclass(frozen=True)
class ToolCall:
    """One call of an assistant: `arguments` is JSON text; `id` pairs it with its result."""

    name: str
    arguments: str
    id: str = ""


def to_json(value: Any) -> str:
    """Returns JSON as the model was trained to see it: `", "` and `": "`, non-ASCII as it is."""
    return json.dumps(value, ensure_ascii=False)


def render_tools(functions: Iterable[Mapping]) -> str:
    """Returns the block that declares tools, given the inner `function` object of each."""
    return _TOOLS_BLOCK % "\n".join(map(to_json, functions))


def render_tool_calls(calls: Iterable[ToolCall]) -> str:
    """Returns the `tool_calls` element of an assistant message, without the blank line before it.

    Values are written unescaped: a string that holds the closing parameter tag cannot be read back.
    """
    invokes = (
        f'{INVOKE_OPEN} name="{call.name}">\n{_render_parameters(call.arguments)}\n{INVOKE_CLOSE}>'
        for call in calls
    )
    return "\n".join((f"{CALLS_OPEN}>", *invokes, CALLS_CLOSE))


def _render_parameters(arguments: str) -> str:
    try:
        values = json.loads(arguments)
    except json.JSONDecodeError:
        values = None
    if not isinstance(values, dict):  # not an object: the text as it is, under a name of its own
        values = {"arguments": arguments}
    return "\n".join(
        f'{PARAMETER_OPEN} name="{name}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else to_json(value)}{PARAMETER_CLOSE}>"
        for name, value in values.items()
    )


def read_tool_calls(scanner: Scanner) -> Generator[object, None, None]:
    """Reads from behind `CALLS_OPEN` through `CALLS_CLOSE`, yielding the events of every call.

    Values are passed on as they arrive: a string escaped piece by piece, any other verbatim.

    Raises:
      CompletionError: the text leaves the format; the message says where and what was expected.
    """
    index = 0
    scanner.place = "tool calls"
    yield from _end_tag(scanner)
    while (yield from scanner.expect(INVOKE_OPEN, CALLS_CLOSE)) == INVOKE_OPEN:
        yield from _read_call(scanner, index)
        yield from _end_tag(scanner)
        index += 1


def _read_call(scanner: Scanner, index: int) -> Generator[object, None, None]:
    scanner.place = f"tool call {index}"
    (name,) = yield from _read_header(scanner, _INVOKE_HEADER, 'name="NAME">')
    scanner.place = f"tool call {index} ({name})"
    yield ToolCallStart(index, name)
    yield from _end_tag(scanner)
    # A call without parameters has an empty line in their place.
    after_header = (PARAMETER_OPEN, INVOKE_CLOSE, "\n" + PARAMETER_OPEN, "\n" + INVOKE_CLOSE)
    tag = yield from scanner.expect(*after_header)
    seen: set[str] = set()
    while tag.endswith(PARAMETER_OPEN):
        key, is_string = yield from _read_header(
            scanner, _PARAMETER_HEADER, 'name="NAME" string="true|false">'
        )
        if key in seen:
            scanner.fail(f"parameter {quote(key)} is given twice")
        yield ToolCallArguments(index, (", " if seen else "{") + to_json(key) + ": ")
        seen.add(key)
        yield from _read_value(scanner, index, key, is_string == "true")
        yield from _end_tag(scanner)
        tag = yield from scanner.expect(PARAMETER_OPEN, INVOKE_CLOSE)
    yield ToolCallArguments(index, "}" if seen else "{}")
    yield ToolCallEnd(index)


def _read_header(
    scanner: Scanner, header: re.Pattern, form: str
) -> Generator[object, None, tuple[str, ...]]:
    while True:
        attributes, dsml, _ = scanner.pending.partition(DSML)  # no name spans a tag
        if found := header.match(attributes):
            scanner.take(found.end())
            return found.groups()
        if dsml:
            got = quote(attributes.rstrip("</"))
            scanner.fail(f"expected {form} in the opening tag, got {got}")
        yield NEED_MORE


def _read_value(
    scanner: Scanner, index: int, key: str, is_string: bool
) -> Generator[object, None, None]:
    if is_string:
        yield ToolCallArguments(index, '"')
    while True:
        text, marker = scanner.take_until(_VALUE_MARKERS)
        if text:
            yield ToolCallArguments(index, to_json(text)[1:-1] if is_string else text)
        if marker == PARAMETER_CLOSE:
            break
        if marker:
            rule = f"expected {PARAMETER_CLOSE}> behind parameter {quote(key)}, got {quote(marker)}"
            scanner.fail(rule, back=len(marker))
        yield NEED_MORE
    if is_string:
        yield ToolCallArguments(index, '"')


def _end_tag(scanner: Scanner) -> Generator[object, None, None]:
    """Consumes the end of a tag and its newline; a tolerant scanner takes any whitespace for it."""
    if scanner.tolerant:
        yield from scanner.expect(">")
        yield from scanner.skip_space()
    else:
        yield from scanner.expect(">\n")


_INVOKE_HEADER = re.compile(r'\s*name="(.*?)"(?=>)', re.DOTALL)
_PARAMETER_HEADER = re.compile(r' name="(.*?)" string="(true|false)">', re.DOTALL)
_VALUE_MARKERS = Markers(PARAMETER_CLOSE, PARAMETER_CLOSE[1:], EOS)
