"""The input of a job: every way a line can be wrong, with the message it must give."""

import errno
import hashlib
import json
import os
from dataclasses import dataclass

import pytest

from v4jax import retries
from v4jax.errors import RequestError
from v4jax.inference import document_files, documents
from v4jax.inference.document_files import DocumentFiles
from v4jax.inference.documents import (
    InputLine,
    build_document,
    parse_line,
    read_lines,
)
from v4jax.inference.request import Document, FileIdentity, Question, SamplingOptions

DEFAULTS = SamplingOptions(seed=5, max_new_tokens=9)


def build(data: bytes, folder: str) -> Document:
    """Returns the document of a line."""
    return build_document(parse_line(InputLine(1, data)), DocumentFiles(folder), DEFAULTS, 1000)


GOOD = {
    "text": (b'{"text": "t", "question": "q"}', Document("t", (Question("q", DEFAULTS),))),
    "path": (
        b'{"id": 7, "path": "good.txt", "questions": ["a", "b"]}',
        Document(
            "Gr\u00fc\u00dfe\r\n",
            (Question("a", DEFAULTS), Question("b", DEFAULTS)),
            7,
            FileIdentity(12, hashlib.sha256("\ufeffGr\u00fc\u00dfe\r\n".encode()).hexdigest()[:32]),
        ),
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
    (tmp_path / "long.txt").write_bytes(b"x" * 1001)
    with open(tmp_path / "sparse.txt", "wb") as file:
        file.truncate(1 << 40)
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
    "file beyond the context": Bad(
        {"path": "long.txt", "question": "q"},
        "{folder}/long.txt has 1,001 bytes or more, and the context of the model holds at most "
        "1,000; divide it into several documents",
    ),
    "file of a terabyte, which is not read": Bad(
        {"path": "sparse.txt", "question": "q"}, "{folder}/sparse.txt has 1,099,511,627,776 bytes"
    ),
    "number beyond floats": Bad(
        b'{"text": "t", "question": "q", "temperature": ' + b"1" * 400 + b"}",
        "temperature must be a number at least 0, got 1111",
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


def test_a_line_that_is_too_long_is_not_kept(tmp_path, monkeypatch):
    """Its digest tells lines of other lengths and beginnings apart; the next line is read."""
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 20)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 8)
    path, digests = tmp_path / "docs.jsonl", set()
    for long in (b"x" * 21, b"x" * 50, b"y" + b"x" * 20):
        path.write_bytes(b'{"a": 1}\n' + long + b'\n{"b": 2}')
        first, bad, last = read_lines(str(path))
        assert (first.data, last) == (b'{"a": 1}', InputLine(3, b'{"b": 2}'))
        with pytest.raises(
            RequestError, match=f"the line has {len(long) + 1} bytes, and at most 20"
        ):
            parse_line(bad)
        digests.add(bad.digest)
    assert len(digests) == 3


def test_paths_can_be_confined(tmp_path):
    """Links are followed, and names that only begin alike are others."""
    for name in ("in/a.txt", "inner/a.txt", "out.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "in/inside").symlink_to("a.txt")
    (tmp_path / "in/outside").symlink_to("../out.txt")
    (tmp_path / "linked").symlink_to("in")
    files = DocumentFiles(str(tmp_path), str(tmp_path / "linked"))
    for path in ("in/a.txt", "linked/inside", str(tmp_path / "in" / ".." / "in" / "a.txt")):
        assert files.read(path, 9)[0] == b"text"
    for path in (
        "out.txt",
        "in/outside",
        "inner/a.txt",
        "in/../out.txt",
        "/etc/passwd",
        "s3://bucket/in/a.txt",
        "in/a\0b",
    ):
        with pytest.raises(RequestError, match=r"is outside of .*linked, the folder that"):
            files.resolve(path)
    files = DocumentFiles("s3://bucket/docs", "s3://bucket/docs/")
    assert files.resolve("a/b.txt") == "s3://bucket/docs/a/b.txt"
    for path in ("../b.txt", "s3://bucket/docs/../b", "s3://bucket/docsb", str(tmp_path / "in")):
        with pytest.raises(RequestError, match="is outside of s3://bucket/docs/"):
            files.resolve(path)


def test_passing_errors_are_waited_for(tmp_path, monkeypatch, capsys):
    path, waited = tmp_path / "a.txt", []
    path.write_text("text")
    monkeypatch.setattr(retries.time, "sleep", waited.append)
    errors = [OSError(errno.EIO, "Input/output error"), OSError("HttpError: 503")]

    def fail_first(*arguments):
        if errors:
            raise errors.pop()
        return open_bytes(*arguments)

    open_bytes = document_files.open_bytes
    monkeypatch.setattr(document_files, "open_bytes", fail_first)
    files = DocumentFiles(str(tmp_path))
    assert files.read("a.txt", 9)[0] == b"text" and waited == [1.0, 2.0]
    assert "a.txt: Input/output error; trying again in 2 s" in capsys.readouterr().err
    for lasting, waits in (
        (OSError(errno.ENOSPC, "full"), 0),
        (PermissionError(13, "no"), 0),
        (OSError(errno.EIO, "Input/output error"), 4),
    ):
        waited.clear()
        errors[:] = [lasting] * 5
        with pytest.raises(RequestError, match=r"cannot read .*a\.txt: "):
            files.read("a.txt", 9)
        assert len(waited) == waits
