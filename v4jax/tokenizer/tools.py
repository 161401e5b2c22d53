"""Tools as text: the block that declares them, calls written, and calls read back.

A call looks like this; names and values are not escaped:

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>
"""

import dataclasses
import json
import re
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from v4jax.tokenizer.events import Departure, ToolCallArguments, ToolCallEnd, ToolCallStart
from v4jax.tokenizer.markup import SLOT, Piece, markup
from v4jax.tokenizer.scanner import NEED_MORE, Markers, Scanner, quote
from v4jax.tokenizer.vocabulary import DSML, EOS, THINK_END, THINK_START

# The fixed beginnings of opening and closing tags; what follows is checked separately.
TAG_OPEN, TAG_CLOSE = f"<{DSML}", f"</{DSML}"
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

{SLOT}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


@dataclass(frozen=True)
class ToolCall:
    """One call of an assistant: `arguments` is JSON text; `id` pairs it with its result."""

    name: str
    arguments: str
    id: str = ""


def to_json(value: Any) -> str:
    """Returns JSON in the form of the training data: `", "` and `": "`, non-ASCII as it is."""
    return json.dumps(value, ensure_ascii=False)


def render_tools(functions: Iterable[Mapping]) -> list[Piece]:
    """Returns the block that declares tools, given the inner `function` object of each."""
    return markup(_TOOLS_BLOCK, "\n".join(map(to_json, functions)))


def render_tool_calls(calls: Iterable[ToolCall]) -> list[Piece]:
    """Returns the `tool_calls` element of an assistant message, without the blank line before it.

    Values are not escaped: a string that holds a DSML tag cannot be read back.
    """
    pieces = markup(f"{CALLS_OPEN}>\n")
    for call in calls:
        pieces += markup(f'{INVOKE_OPEN} name="{SLOT}">\n', call.name)
        pieces += [*_render_parameters(call.arguments), *markup(f"\n{INVOKE_CLOSE}>\n")]
    return [*pieces, *markup(CALLS_CLOSE)]


def read_arguments(arguments: str) -> dict[str, Any] | None:
    """Returns name → argument of a call; None if the text is no JSON object."""
    try:
        values = json.loads(arguments)
    except (json.JSONDecodeError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _render_parameters(arguments: str) -> list[Piece]:
    values = read_arguments(arguments)
    if values is None:  # no object: the whole text as one parameter
        values = {"arguments": arguments}
    pieces = []
    for name, value in values.items():
        kind = str(isinstance(value, str)).lower()
        text = value if isinstance(value, str) else to_json(value)
        tag = f'{PARAMETER_OPEN} name="{SLOT}" string="{kind}">{SLOT}{PARAMETER_CLOSE}>'
        pieces += [*markup("\n" if pieces else ""), *markup(tag, name, text)]
    return pieces


@dataclass(frozen=True)
class _Tag:
    """A tag that has been read to its end.

    marker: its beginning, `TAG_OPEN` or `TAG_CLOSE`, possibly without the `<`.
    start: position of its first character.
    header: values of the attributes of an opening tag.
    """

    marker: str
    name: str
    start: int
    header: tuple[str, ...] = ()

    @property
    def closes(self) -> bool:
        return self.marker != TAG_OPEN

    def opens(self, name: str) -> bool:
        return self.name == name and not self.closes

    def __str__(self) -> str:
        return quote(self.marker + self.name)


class CallReader:
    """Reads the tool calls of one completion, tag by tag.

    A string is passed on as it arrives, escaped piece by piece; any other value once it is complete
    and known to be JSON. A tag that should have been closed is closed, and a `Departure` says so; a
    strict scanner raises CompletionError instead.
    """

    def __init__(self, scanner: Scanner):
        self._scanner = scanner
        self._index = -1
        self._keys: set[str] | None = None  # parameters of the open call; None outside one

    @property
    def found(self) -> bool:
        """Whether a call has begun."""
        return self._index >= 0

    def read(self) -> Generator[object, None, None]:
        """Reads from the end of the first `TAG_OPEN` through EOS; yields the calls' events."""
        scanner = self._scanner
        scanner.place = "tool calls"
        tag = yield from self._read_tag(TAG_OPEN)
        if tag.name != "tool_calls":
            yield self._depart(quote(CALLS_OPEN), tag)
        if not (tag.opens("invoke") or tag.opens("parameter")):
            tag = yield from self._next_tag("\n")
        while tag is not None:
            if tag.opens("parameter"):
                tag = yield from self._read_parameter(*tag.header)
            elif tag.opens("invoke"):
                if self._keys is not None:
                    yield self._depart(quote(INVOKE_CLOSE), tag)
                    yield from self._end_call()
                yield from self._begin_call(*tag.header)
                # A call without parameters has an empty line in place of them.
                tag = yield from self._next_tag("\n", "\n\n")
            elif tag.closes:  # it closes the tag that was opened last, whatever its name
                in_call = self._keys is not None
                wanted = "invoke" if in_call else "tool_calls"
                if tag.name != wanted:
                    yield self._depart(quote(f"</{DSML}{wanted}"), tag)
                if in_call:
                    yield from self._end_call()
                ends = not in_call or tag.name == "tool_calls"
                tag = yield from self._read_end() if ends else self._next_tag("\n")
            else:
                yield self._depart(quote(INVOKE_OPEN), tag)
                tag = yield from self._next_tag("\n")

    def _begin_call(self, name: str) -> Generator[object, None, None]:
        self._index, self._keys = self._index + 1, set()
        self._scanner.place = f"tool call {self._index} ({name})"
        yield ToolCallStart(self._index, name)

    def _end_call(self) -> Generator[object, None, None]:
        yield ToolCallArguments(self._index, "}" if self._keys else "{}")
        yield ToolCallEnd(self._index)
        self._keys = None

    def _read_parameter(self, key: str, kind: str) -> Generator[object, None, _Tag | None]:
        """Reads a value and the tag that ends it; returns the next tag to handle."""
        scanner, taken = self._scanner, self._keys is not None and key not in self._keys
        if self._keys is None:
            yield scanner.depart(f"parameter {quote(key)} is outside a call")
        elif not taken:
            yield scanner.depart(f"parameter {quote(key)} is given twice")
        else:
            yield self._arguments((", " if self._keys else "{") + to_json(key) + ": ")
            self._keys.add(key)
        marker = yield from self._read_value(key, is_string=kind == "true", taken=taken)
        wanted = f"{quote(PARAMETER_CLOSE)} behind parameter {quote(key)}"
        if marker == EOS:
            yield scanner.depart(f"expected {wanted}, got {quote(EOS)}", back=len(EOS))
            return None
        tag = yield from self._read_tag(marker)
        if marker != TAG_CLOSE or tag.name != "parameter":
            yield self._depart(wanted, tag)
        if tag.closes and tag.name not in ("invoke", "tool_calls"):
            return (yield from self._next_tag("\n"))
        return tag

    def _read_value(
        self, key: str, *, is_string: bool, taken: bool
    ) -> Generator[object, None, str]:
        """Reads a value and the marker that ends it, which it returns."""
        scanner, marker = self._scanner, None
        if not (is_string and taken):
            marker = yield from scanner.hold_until(_TAGS)
            text = scanner.take_held()
            if taken and not _is_json(text) and marker != EOS:
                yield scanner.depart(f"parameter {quote(key)} is no JSON, got {quote(text[:40])}")
                text = to_json(text)
            if taken:
                yield self._arguments(text)
            return marker
        yield self._arguments('"')
        while marker is None:
            text, marker = scanner.take_until(_TAGS)
            if text:
                yield self._arguments(to_json(text)[1:-1])
            if marker is None:
                yield NEED_MORE
        if marker != EOS:
            yield self._arguments('"')
        return marker

    def _depart(self, wanted: str, tag: _Tag) -> Departure:
        back = self._scanner.position - tag.start
        return self._scanner.depart(f"expected {wanted}, got {tag}", back=back)

    def _arguments(self, text: str) -> ToolCallArguments:
        return ToolCallArguments(self._index, text)

    def _next_tag(self, *gaps: str) -> Generator[object, None, _Tag | None]:
        """Returns the next tag; None if EOS comes in its place.

        Args:
          gaps: texts that may precede it; a tolerant scanner accepts any whitespace.
        """
        scanner = self._scanner
        marker = yield from self._skip(_TAGS, gaps)
        if marker != EOS:
            return (yield from self._read_tag(marker))
        wanted = CALLS_CLOSE if self._keys is None else INVOKE_CLOSE
        yield scanner.depart(f"expected {quote(wanted)}, got {quote(EOS)}", back=len(EOS))
        if self._keys is not None:
            yield from self._end_call()
        return None

    def _read_end(self) -> Generator[object, None, _Tag | None]:
        """Reads from the end of the last closing tag through EOS; returns a tag before EOS."""
        scanner = self._scanner
        scanner.place = "end of the tool calls"
        marker = yield from self._skip(_ENDS, ("",))
        while marker == THINK_END:  # closes reasoning that contained the calls
            scanner.insist(f"expected {quote(EOS)}, got {quote(marker)}", back=len(marker))
            marker = yield from self._skip(_ENDS, ("",))
        if marker == EOS:
            return None
        yield scanner.depart(f"expected {quote(EOS)}, got {quote(marker)}", back=len(marker))
        return (yield from self._read_tag(marker))

    def _skip(self, markers: Markers, gaps: tuple[str, ...]) -> Generator[object, None, str]:
        """Consumes what precedes a marker, and the marker, which it returns."""
        scanner = self._scanner
        marker = yield from scanner.hold_until(markers)
        text = scanner.take_held()
        wanted = " or ".join(map(quote, filter(None, gaps))) or "nothing"
        rule = f"expected {wanted} before {quote(marker)}, got {quote(text[:40])}"
        if text.strip():
            yield scanner.depart(rule, back=len(text) + len(marker))
        elif text not in gaps:
            scanner.insist(rule, back=len(text) + len(marker))
        return marker

    def _read_tag(self, marker: str) -> Generator[object, None, _Tag]:
        """Returns the tag whose `TAG_OPEN` or `TAG_CLOSE` has been read."""
        scanner = self._scanner
        start = scanner.position - len(marker)
        while not (found := _NAME.match(scanner.pending)):
            yield NEED_MORE
        tag = _Tag(marker, scanner.take(found.end()), start)
        if not tag.closes and tag.name in _HEADERS:
            exact, lenient, form, defaults = _HEADERS[tag.name]
            while not (found := exact.match(scanner.pending.partition(DSML)[0])):
                if DSML in scanner.pending:  # no attribute spans a tag
                    break
                yield NEED_MORE
            if not found:
                attributes = scanner.pending.partition(DSML)[0].rstrip("</")
                yield scanner.depart(f"expected {form} in {tag}, got {quote(attributes)}")
                found = lenient.match(attributes)
            scanner.take(found.end())
            pairs = zip(found.groups(), defaults, strict=True)
            header = tuple(default if value is None else value for value, default in pairs)
            return dataclasses.replace(tag, header=header)
        marker = yield from scanner.hold_until(_TAG_ENDS)
        if rest := scanner.take_held():
            scanner.insist(f'expected ">" behind {tag}, got {quote(rest[:40])}', back=len(rest) + 1)
        return tag


def _is_json(text: str) -> bool:
    def refuse(constant: str):
        raise ValueError(constant)  # NaN and infinities, which are not JSON

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True


_NAME = re.compile(r"\w*(?=\W)")
_TAGS = Markers(TAG_OPEN, TAG_CLOSE, TAG_CLOSE[1:], EOS)
_ENDS = Markers(TAG_OPEN, TAG_CLOSE, THINK_END, EOS)
_TAG_ENDS = Markers(">")
# Name of a tag → its attributes in the strict form, in the tolerant form, their description for
# messages, and the meaning of a missing attribute.
_HEADERS = {
    "invoke": (
        re.compile(r'\s*name="(.*?)">', re.DOTALL),
        re.compile(r'(?:[^>]*?name="([^"]*)")?[^>]*>?', re.DOTALL),
        'name="NAME">',
        ("",),
    ),
    "parameter": (
        re.compile(r' name="(.*?)" string="(true|false)">', re.DOTALL),
        re.compile(r'(?:[^>]*?name="([^"]*)")?(?:[^>]*?string="(true|false)")?[^>]*>?', re.DOTALL),
        'name="NAME" string="true|false">',
        ("", "true"),
    ),
}
