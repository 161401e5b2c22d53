"""Lines and ranges of files at random access, and files that are not there."""

import re

import pytest

from v4jax.errors import ConfigError, DataError
from v4jax.training.data.files import Lines, decode, find_files, parse_object, read_range


def test_lines_of_several_files(tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    one.write_bytes(b"\xef\xbb\xbfa\n\n  \nb\r\n")  # byte-order mark, blank lines, CRLF
    two.write_bytes(b"")
    three.write_bytes("ü\n\nlast".encode())  # no newline at the end
    lines = Lines([one, two, three])
    found = [(lines[i].decode().rstrip(), lines.place(i)) for i in range(len(lines))]
    assert found == [
        ("a", f"{one}, line 1"),
        ("b", f"{one}, line 4"),
        ("ü", f"{three}, line 1"),
        ("last", f"{three}, line 3"),
    ]


@pytest.mark.parametrize("step", range(1, 9))
def test_ranges_join_to_the_file_and_cut_no_character(tmp_path, step):
    text = "a𝄞ü€" * 3 + "€"
    file = tmp_path / "text"
    file.write_text(text, encoding="utf-8")
    size = len(text.encode())
    parts = [decode(read_range(file, i, min(i + step, size))) for i in range(0, size, step)]
    assert "".join(parts) == text


def test_files_of_folders_in_order(tmp_path):
    for name in ("b.txt", "a/z.md", "a/skipped.pdf", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    single, folder = str(tmp_path / "c.jsonl"), str(tmp_path)
    found = find_files((single, folder), (".txt", ".md", ".jsonl"))
    names = [str(path.relative_to(tmp_path)) for path in found]
    assert names == ["c.jsonl", "a/z.md", "b.txt", "c.jsonl"]


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(ConfigError, match=r"a\.pdf must end in one of \.txt, \.md, \.json, "):
        find_files((str(tmp_path / "a.pdf"),), (".txt", ".md"))
    with pytest.raises(ConfigError, match=r"holds no file ending in \.txt"):
        find_files((str(tmp_path),), (".txt",))
    with pytest.raises(ConfigError, match=r"gs:/.*is no file or folder; remote files must be"):
        find_files(("gs://bucket/a.txt",), (".txt",))


# {what is wrong: (a line, what the message must say)}
BROKEN = {
    "no JSON": (b"{text}", "is no JSON: Expecting property name"),
    "twice": (b'{"a": 1, "a": 2}', "is no JSON: 'a' appears twice"),
    "deep": (b"[" * 100_000, "is no JSON: nested too deeply"),
    "a list": (b"[1]", "must hold a JSON object, got list"),
    "no UTF-8": (b'{"a": "\xff"}', "is not UTF-8: byte 0xff at position 7; convert the file"),
}


@pytest.mark.parametrize(("line", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_lines(line, message):
    with pytest.raises(DataError, match=re.escape(message)):
        parse_object(line)
