"""The input of a job: every way a line can be wrong, with the message it must give."""

import json
import os
from dataclasses import dataclass

import pytest

from v4jax.errors import RequestError
from v4jax.inference.documents import (
    InputLine,
    build_document,
    parse_line,
    read_lines,
)
from v4jax.inference.request import Document, Question, SamplingOptions

DEFAULTS = SamplingOptions(seed=5, max_new_tokens=9)


def build(data: bytes, folder: str) -> Document:
    """Returns the document of a line."""
    return build_document(parse_line(InputLine(1, data)), folder, DEFAULTS)


GOOD = {
    "text": (b'{"text": "t", "question": "q"}', Document("t", (Question("q", DEFAULTS),))),
    "path": (
        b'{"id": 7, "path": "good.txt", "questions": ["a", "b"]}',
        Document("Gr\u00fc\u00dfe\r\n", (Question("a", DEFAULTS), Question("b", DEFAULTS)), 7),
    ),
    "options": (
        b'{"id": "x", "text": "t", "question": "q", "temperature": 1, "seed": 1, "top_k": 3}',
        Document("t", (Question("q", DEFAULTS.replace(temperature=1, seed=1, top_k=3)),), "x"),
    ),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.txt").write_bytes("\ufeffGr\u00fc\u00dfe\r\n".encode())
    (tmp_path / "latin.txt").write_bytes("Gr\u00fc\u00dfe".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return str(tmp_path)


@pytest.mark.parametrize(("data", "document"), GOOD.values(), ids=GOOD.keys())
def test_good_lines(folder, data, document):
    assert build(data, folder) == document


@dataclass(frozen=True)
class Bad:
    """A line, or the object that it holds, and the message."""

    line: bytes | dict
    message: str


BAD = {
    "not JSON": Bad(b"{text}", "the line is not JSON: Expecting property name enclosed in double"),
    "torn": Bad(b'{"text": "ab', "the line is not JSON: Unterminated string"),
    "not an object": Bad(b'["text"]', "the line must be a JSON object, got ['text']"),
    "not UTF-8": Bad(b'{"text": "\xff"}', "the line is not UTF-8: byte 0xff at position 10"),
    "a field twice": Bad(
        b'{"text": "a", "text": "b"}', "the line is not JSON: 'text' appears twice"
    ),
    "nested without end": Bad(b"[" * 100_000, "the line is not JSON: nested too deeply"),
    "endless number": Bad(
        b'{"id": ' + b"1" * 5000 + b"}", "the line is not JSON: Exceeds the limit"
    ),
    "misspelt field": Bad({"txt": "t"}, "unknown field 'txt'; did you mean text?"),
    "unknown field": Bad({"zzz": 1}, "unknown field 'zzz'; known: id, text, path, question"),
    "no document": Bad({"question": "q"}, 'the line needs either "text" or "path", got neither'),
    "two documents": Bad(
        {"question": "q", "text": "t", "path": "p"},
        'the line needs either "text" or "path", got both',
    ),
    "no question": Bad(
        {"text": "t"}, 'the line needs either "question" or "questions", got neither'
    ),
    "empty list of questions": Bad(
        {"text": "t", "questions": []}, "questions must hold at least one question, got none"
    ),
    "questions no list": Bad(
        {"text": "t", "questions": "q"}, "questions must be a list of strings, got 'q'"
    ),
    "question no string": Bad(
        {"text": "t", "questions": ["a", 3]}, "question must be a string, got 3"
    ),
    "text null": Bad({"text": None, "question": "q"}, "text must be a string, got None"),
    "text empty": Bad({"text": "", "question": "q"}, "text must not be empty, got ''"),
    "text with half a pair": Bad(
        b'{"text": "a\\ud800", "question": "q"}',
        "text must be valid Unicode, got the lone surrogate '\\ud800' at character 1",
    ),
    "id a list": Bad(
        {"id": [], "text": "t", "question": "q"}, "id must be a string or an integer, got []"
    ),
    "bad option": Bad(
        {"text": "t", "question": "q", "top_p": 3},
        "top_p must be a number greater than 0 and at most 1, got 3",
    ),
    "path no string": Bad({"path": 3, "question": "q"}, "path must be a string, got 3"),
    "no such file": Bad(
        {"path": "none.txt", "question": "q"}, "cannot read {folder}/none.txt: No such file"
    ),
    "folder as file": Bad(
        {"path": "folder", "question": "q"}, "cannot read {folder}/folder: it is not a regular file"
    ),
    "pipe as file": Bad(
        {"path": "pipe", "question": "q"}, "cannot read {folder}/pipe: it is not a regular file"
    ),
    "NUL in path": Bad({"path": "a\0b", "question": "q"}, "cannot read {folder}/a\0b: "),
    "file not UTF-8": Bad(
        {"path": "latin.txt", "question": "q"},
        "{folder}/latin.txt is not UTF-8: byte 0xfc at position 2",
    ),
    "file empty": Bad({"path": "empty.txt", "question": "q"}, "{folder}/empty.txt is empty"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_bad_lines(folder, bad):
    data = bad.line if isinstance(bad.line, bytes) else json.dumps(bad.line).encode()
    with pytest.raises(RequestError) as error:
        build(data, folder)
    assert str(error.value).startswith(bad.message.replace("{folder}", folder))


def test_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": 2}')
    assert list(read_lines(str(path))) == [InputLine(1, b'{"a": 1}'), InputLine(4, b'{"b": 2}')]
