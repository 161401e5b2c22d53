"""Bad records with file and line, skipped or fatal; long documents split or refused."""

import re

import pytest

from v4jax.config import DataConfig, SourceConfig
from v4jax.errors import ConfigError, DataError
from v4jax.tokenizer import load_tokenizer
from v4jax.training.data.sources import open_source

BYTE = load_tokenizer("byte")
LINES = ['{"text": "one"}', "", "{torn", '{"text": "%s"}' % ("x" * 300)]


def open_text(folder, lines=LINES, *, too_long=None, **data):
    file = folder / "corpus.jsonl"
    file.write_text("\n".join(lines))
    config = SourceConfig("text", (str(file),), too_long=too_long)
    return open_source(config, DataConfig((config,), length=128, batch=1, **data), BYTE)


def test_a_bad_record_is_fatal_with_file_and_line(tmp_path):
    source = open_text(tmp_path)
    assert len(source) == 3 and len(source[0]) == 1
    message = f"data: {tmp_path / 'corpus.jsonl'}, line 3: is no JSON: Expecting property name"
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        source[1]
    assert 'data.on_bad_record="skip" leaves it out' in str(caught.value)


def test_a_bad_record_is_skipped_and_said_once(tmp_path, capsys):
    source = open_text(tmp_path, on_bad_record="skip")
    assert source[1] == () and source[1] == () and len(source[0]) == 1
    said = capsys.readouterr().err
    assert said.count("corpus.jsonl, line 3: is no JSON") == 1 and "; skipped" in said


def test_a_long_document_is_split(tmp_path):
    parts = open_text(tmp_path)[2]
    assert [len(part) for part in parts] == [128, 128, 46]  # 300 bytes, BOS and EOS
    assert sum(part.weights.sum() for part in parts) == 302 - 3


def test_a_long_document_is_a_bad_record_where_it_must_not_be_split(tmp_path):
    message = (
        "line 4: has 302 tokens and data.length is 128; raise it, or set the source's too_long"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        open_text(tmp_path, too_long="error")[2]
    assert open_text(tmp_path, too_long="error", on_bad_record="skip")[2] == ()


def test_nothing_but_bad_records_ends(tmp_path, capsys):
    source = open_text(tmp_path, ["{torn"] * 200, on_bad_record="skip")
    with pytest.raises(DataError, match="so were the 999 records before it: is this source of the"):
        for i in range(1000):
            assert source[i % 200] == ()
    said = capsys.readouterr().err
    assert said.count("is no JSON") == 100 and "further bad records of this source" in said


def test_no_record_at_all(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.sources\.paths: .*corpus\.jsonl.* no record"):
        open_text(tmp_path, ["", " "])
