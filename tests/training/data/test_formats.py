"""Records of other tools: the messages that they mean."""

import gzip
import json
import re
import sys

import pyarrow
import pytest
from pyarrow import parquet

from v4jax.config import SourceConfig
from v4jax.errors import DataError, V4JaxError
from v4jax.tokenizer import encode_messages, load_tokenizer
from v4jax.training.data.chat import SUFFIXES, ChatRecords
from v4jax.training.data.files import find_files
from v4jax.training.data.formats import read_messages

BYTE = load_tokenizer("byte")


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


CALL = {"name": "f", "arguments": {"x": 1}}
# {what: (record, its messages)}
RECORDS = {
    "sharegpt": (
        {
            "system": "S",
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b", "weight": 0},
                {"from": "user", "value": "c"},
                {"from": "assistant", "value": "d"},
            ],
        },
        [say("system", "S"), say("user", "a"), say("assistant", "b", weight=0),
         say("user", "c"), say("assistant", "d")],
    ),
    "sharegpt with a call": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "b"},
            ]
        },
        [say("user", "a"), say("assistant", "", tool_calls=[{"function": CALL}]),
         say("tool", "1"), say("assistant", "b")],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        [say("user", "Add.\n\n1, 2"), say("assistant", "3")],
    ),
    "alpaca with history": (
        {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "S"},
        [say("system", "S"), say("user", "a"), say("assistant", "b"), say("user", "c"),
         say("assistant", "d")],
    ),
    "prompt and completion": (
        {"prompt": "a", "completion": "b"}, [say("user", "a"), say("assistant", "b")],
    ),
    "prompt and completion of messages": (
        {"prompt": [say("user", "a")], "completion": [say("assistant", "b")]},
        [say("user", "a"), say("assistant", "b")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "messages"), RECORDS.values(), ids=RECORDS.keys())
def test_messages(record, messages):
    found, used = read_messages(record)
    assert found == messages and used >= set(record)
    encode_messages(messages)  # they break no rule


# {what is wrong: (record, what the message says)}
BROKEN = {
    "two formats": (
        {"messages": [], "prompt": "a"}, "needs one of the fields messages, conversations, ",
    ),
    "a history of texts": ({"instruction": "a", "output": "b", "history": ["a"]}, "history must"),
    "a call that is none": (
        {"conversations": [{"from": "function_call", "value": "f(1)"}]},
        "conversations[0].value must be the JSON of a call, got",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "bing", "value": "a"}]}, "messages[0].role must be one of",
    ),
    "no output": ({"instruction": "a"}, "messages[1].content is missing"),
    "no completion": ({"prompt": "a"}, "messages[1].content is missing"),
}  # fmt: skip


def records_of(path):
    config = SourceConfig("chat", (str(path),))
    return ChatRecords(find_files(config.paths, SUFFIXES), config, BYTE)


@pytest.mark.parametrize(("record", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_broken(tmp_path, record, message):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(V4JaxError, match=re.escape(message)):
        records_of(tmp_path / "a.jsonl").read(0)


def test_packed_files_and_lists(tmp_path):
    """All hold the same records, whose places have the names of the files given."""
    made = [{"instruction": f"é{i}", "output": "b"} for i in range(3)]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in made).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(made, indent=1))
    (tmp_path / "d.json.gz").write_bytes(gzip.compress(json.dumps(made).encode()))
    plain = records_of(tmp_path / "a.jsonl")
    for name in ("b.jsonl.gz", "c.json", "d.json.gz"):
        found = records_of(tmp_path / name)
        assert len(found) == 3
        for i in range(3):
            assert (found.read(i)[0].tokens == plain.read(i)[0].tokens).all()
        assert found.place(2) == f"{tmp_path / name}, line 3"
    assert len(records_of(tmp_path)) == 6  # a folder's lists may be anything
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(lines)[:-9])
    with pytest.raises(DataError, match=r"torn.jsonl.gz cannot be unpacked: Compressed file ended"):
        records_of(tmp_path / "torn.jsonl.gz")
    (tmp_path / "e.json").write_text("{}")
    with pytest.raises(DataError, match=r"e.json must hold a list of records, got dict"):
        records_of(tmp_path / "e.json")


def test_tables(tmp_path):
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]
    made = [{"messages": turns, "source": None}, {"messages": turns[:1], "source": "web"}]
    parquet.write_table(pyarrow.Table.from_pylist(made), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(made[0]))
    records = records_of(tmp_path / "a.parquet")
    assert len(records) == 2 and len(records_of(tmp_path)) == 3
    assert (records.read(0)[0].tokens == records_of(tmp_path / "a.jsonl").read(0)[0].tokens).all()
    assert records.place(1) == f"{tmp_path}/a.parquet, row 2"
    with pytest.raises(DataError, match="has no assistant turn that counts"):
        records.read(1)


def test_tables_that_cannot_be_used(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.table({"prompt": [b"a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet has values that JSON does not have: .*bytes"):
        records_of(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a.parquet cannot be read as Parquet: "):
        records_of(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a.parquet needs pyarrow to be read; pip install pyarrow"):
        records_of(tmp_path / "a.parquet")
