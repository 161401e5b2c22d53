"""Shards: who takes which lines, how files are named, and that all together are the whole job."""

import json
from itertools import chain
from pathlib import Path

import pytest

from v4jax.errors import ConfigError, RequestError
from v4jax.inference import BatchJob, SamplingOptions, Shard, parse_shard, run_batch

from .fake_model import make_engine

SAMPLING = SamplingOptions(max_new_tokens=4)


@pytest.fixture
def source(tmp_path) -> Path:
    """Seven documents on lines 1 to 8, of which line 3 is blank, and line 6 is broken."""
    lines = [
        json.dumps({"id": i, "text": f"Document {i}.", "questions": ["Who?", "When?"][: 1 + i % 2]})
        for i in range(1, 9)
    ]
    lines[2], lines[5] = "", "{broken"
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(source: Path, shard: Shard = Shard()):  # noqa: B008
    output = shard.name_file(str(source.with_name("answers.jsonl")))
    job = BatchJob(str(source), output, {"model": "fake"}, SAMPLING, shard=shard)
    return run_batch(job, make_engine), Path(output).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_every_line_belongs_to_one_shard(source, count):
    shards = [Shard(index, count) for index in range(count)]
    numbers = [[line.number for line in shard.read_lines(str(source))] for shard in shards]
    assert sorted(chain.from_iterable(numbers)) == [1, 2, 4, 5, 6, 7, 8]
    assert all((number - 1) % count == index for index, own in enumerate(numbers) for number in own)


def test_shards_together_are_the_whole_job(source):
    whole, lines = run(source)
    parts = [run(source, Shard(index, 3)) for index in range(3)]
    assert sorted(chain.from_iterable(part for _, part in parts)) == sorted(lines)
    assert sum(summary.documents for summary, _ in parts) == whole.documents == 7
    assert sum(summary.failed for summary, _ in parts) == whole.failed == 1
    names = {path.name for path in source.parent.glob("answers-*")}
    assert names == {f"answers-0000{index}-of-00003.jsonl" for index in range(3)}


def test_joined_files_continue_as_the_whole_job(source):
    parts = [run(source, Shard(index, 2))[1] for index in range(2)]
    joined = b"".join(parts[0] + parts[1])
    output = source.with_name("answers.jsonl")
    output.write_bytes(joined)
    assert run(source)[0].questions_before == sum(
        b'"answer":' in line for line in joined.split(b"\n")
    )
    assert output.read_bytes() == joined  # nothing was left to do


def test_a_shard_continues_only_its_own_file(source):
    _, lines = run(source, Shard(0, 2))
    other = Shard(1, 2).name_file(str(source.with_name("answers.jsonl")))
    Path(other).write_bytes(b"".join(lines))
    with pytest.raises(RequestError, match=r"answers line 1, which .* does not have in shard 1/2"):
        run(source, Shard(1, 2))


def test_a_shard_without_documents_is_done(source, capsys):
    summary, lines = run(source, Shard(2, 12))
    assert (summary.documents, lines) == (0, [])
    assert "holds no documents for shard 2/12" in capsys.readouterr().err


NAMES = {
    "a/answers.jsonl": "a/answers-00003-of-00016.jsonl",
    "answers": "answers-00003-of-00016",
    "a.b/answers": "a.b/answers-00003-of-00016",
}


@pytest.mark.parametrize("path, name", NAMES.items())
def test_names(path, name):
    assert Shard(3, 16).name_file(path) == name
    assert Shard().name_file(path) == path


PARSED = {
    "3/16": ({}, Shard(3, 16)),
    "0/1": ({}, Shard()),
    "auto/4": ({"JOB_COMPLETION_INDEX": "2"}, Shard(2, 4)),
    "2/4": ({"JOB_COMPLETION_INDEX": "1"}, Shard(2, 4)),
}


@pytest.mark.parametrize("text, case", PARSED.items())
def test_parsed(text, case):
    variables, expected = case
    assert parse_shard(text, variables) == expected


BAD = {
    "16": (RequestError, "must be INDEX/COUNT or auto/COUNT, such as 3/16; got '16'"),
    "-1/4": (RequestError, "must be INDEX/COUNT"),
    "4/4": (RequestError, "is part 4 of 4, but indices run from 0 to 3"),
    "0/0": (RequestError, "divides the input into no parts"),
    "auto/4": (ConfigError, "none of JOB_COMPLETION_INDEX, .* is set"),
}


@pytest.mark.parametrize("text, case", BAD.items())
def test_bad(text, case):
    kind, message = case
    with pytest.raises(kind, match=message):
        parse_shard(text, {})
