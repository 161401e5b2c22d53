"""Bad records with file and line, skipped or fatal; long documents split or refused."""

import re

import pytest

from v4jax.config import DataConfig, SourceConfig
from v4jax.errors import ConfigError, DataError
from v4jax.tokenizer import load_tokenizer
from v4jax.training.data.sources import ExampleSource, open_source

BYTE = load_tokenizer("byte")
LINES = ['{"text": "one"}', "", "{torn", '{"text": "%s"}' % ("x" * 300)]


def open_text(folder, lines=LINES, *, too_long=None, **data):
    file = folder / "corpus.jsonl"
    file.write_text("\n".join(lines))
    config = SourceConfig("text", (str(file),), too_long=too_long)
    return open_source(DataConfig((config,), length=128, batch=1, **data), 0, BYTE)


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


def test_needles():
    settings = {"tokens": (256, 300), "questions": (1, 1)}
    needles = SourceConfig("needles", settings=settings)
    data = DataConfig((needles, needles), length=512, batch=1)
    first, second = (open_source(data, i, BYTE) for i in range(2))
    (one,), (same,), (other,) = first[5], first[5], second[5]
    assert (one.tokens == same.tokens).all() and BYTE.decode(one.tokens) != BYTE.decode(
        other.tokens
    )
    assert (one.weights == 1).sum() == 6  # five digits and EOS
    assert len(first) == 2**31 and len(first[2**31 - 1]) == 1


def test_needles_are_bytes():
    needles = SourceConfig("needles", settings={"tokns": (256, 300)})
    data = DataConfig((needles,), length=512, batch=1)
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.settings\.tokns is no field"):
        open_source(data, 0, BYTE)
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.kind needles is made of bytes"):
        open_source(data, 0, load_tokenizer("v4"))


def test_a_record_nested_too_deeply_is_a_bad_one():
    class Deep:
        def __len__(self):
            return 1

        def place(self, index):
            return "here"

        def read(self, index):
            return self.read(index)

    config = SourceConfig("text", ("x",))
    data = DataConfig((config,), length=128, batch=1)
    with pytest.raises(DataError, match="data: here: maximum recursion depth exceeded"):
        ExampleSource(Deep(), config, data)[0]


def test_many_bad_records_among_good_ones_go_on(tmp_path):
    source = open_text(tmp_path, ["{torn", '{"text": "one"}'], on_bad_record="skip")
    assert sum(len(source[i % 2]) for i in range(2400)) == 1200
