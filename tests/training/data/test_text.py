"""Plain text as documents: whole files, lines, and segments of files that are too long."""

import json
import re

import pytest

from v4jax.config import SourceConfig
from v4jax.errors import DataError, RequestError
from v4jax.tokenizer import load_tokenizer
from v4jax.training.data.text import Segment, TextRecords, cut_file, encode_text

BYTE = load_tokenizer("byte")
BOS, EOS = BYTE.bos_id, BYTE.eos_id


def test_bos_text_eos():
    document = encode_text("ü<think>", BYTE)
    assert document.tokens.tolist() == [BOS, *"ü<think>".encode(), EOS]  # literals are text
    assert document.weights.tolist() == [0] + [1] * (len(document) - 1)


def test_files_then_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone")
    (tmp_path / "b.md").write_text("two")
    lines = [json.dumps({"text": text, "source": "x"}) for text in ("three", "four")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    files = sorted(tmp_path.iterdir())
    records = TextRecords(files, SourceConfig("text", ("x",)), BYTE, 128)
    texts = [BYTE.decode(records.read(i)[0].tokens[1:-1]) for i in range(len(records))]
    assert texts == ["one", "two", "three", "four"]
    assert records.place(0) == str(tmp_path / "a.txt")
    assert records.place(3) == f"{tmp_path / 'a.jsonl'}, line 2"


def test_segments_join_to_the_document(tmp_path, monkeypatch):
    text = "Grüße, 𝄞! " * 20
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr("v4jax.training.data.text.ROWS_OF_A_SEGMENT", 0)
    monkeypatch.setattr("v4jax.training.data.text.LEAST_SEGMENT_BYTES", 37)
    records = TextRecords([tmp_path / "a.txt"], SourceConfig("text", ("x",)), BYTE, 128)
    assert len(records) == -(-len(text.encode()) // 37)
    tokens = [token for i in range(len(records)) for token in records.read(i)[0].tokens.tolist()]
    assert tokens == [BOS, *text.encode(), EOS]
    assert records.place(1) == f"{tmp_path / 'a.txt'}, bytes 37 to 74"
    whole = SourceConfig("text", ("x",), too_long="error")
    assert len(TextRecords([tmp_path / "a.txt"], whole, BYTE, 128)) == 1


def test_an_empty_file_is_a_record_that_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert cut_file(tmp_path / "a.txt", 8) == [Segment(tmp_path / "a.txt", 0, 0, 0)]
    records = TextRecords([tmp_path / "a.txt"], SourceConfig("text", ("x",)), BYTE, 128)
    with pytest.raises(DataError, match="is blank; leave it out"):
        records.read(0)


# {what is wrong: (a line, the error, what the message must say)}
BROKEN = {
    "no text": ('{"txt": "a"}', DataError, "needs the field text, a string, got NoneType"),
    "no string": ('{"text": 5}', DataError, "needs the field text, a string, got int"),
    "blank": ('{"text": " "}', DataError, "is blank; leave it out"),
    "half a pair": ('{"text": "a\\ud800"}', RequestError, "text must be valid Unicode"),
}


@pytest.mark.parametrize(("line", "error", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_lines(tmp_path, line, error, message):
    (tmp_path / "a.jsonl").write_text(line)
    records = TextRecords([tmp_path / "a.jsonl"], SourceConfig("text", ("x",)), BYTE, 128)
    with pytest.raises(error, match=re.escape(message)):
        records.read(0)
