"""The output of a job in a bucket: what a crash leaves, two jobs at once, what it becomes."""

import json
import re

import folder_bucket
import pytest

from v4jax.errors import V4JaxError
from v4jax.files import RemotePath
from v4jax.inference.answer_log import AnswerLog

from .test_answer_log import FOREIGN, failure, record

PATH = "s3://bucket/answers.jsonl"


@pytest.fixture(autouse=True)
def bucket(tmp_path):
    folder_bucket.install(tmp_path / "bucket")
    yield
    folder_bucket.uninstall()


def write(*records: dict, job: str = "job", ends: bool = False, **options) -> None:
    """Appends records, each by itself, as one job does."""
    with AnswerLog(PATH, job, **options) as log:
        for one in records:
            log.append([one])
        if ends:
            log.finish()


def lines(name: str = "answers.jsonl") -> list[dict]:
    return [json.loads(line) for line in folder_bucket.read(f"s3://bucket/{name}").splitlines()]


def expected(*records: dict) -> list[dict]:
    return [one | {"job": "job"} for one in records]


def parts() -> list[str]:
    return folder_bucket.names("s3://bucket/answers.jsonl.parts")


def test_every_answer_is_in_the_bucket_at_once_and_the_output_in_the_end():
    with AnswerLog(PATH, "job") as log:
        log.append([record(1), record(1, 1)])
        assert parts() == ["00000001.jsonl", "00000002.jsonl"]
        assert lines("answers.jsonl.parts/00000002.jsonl") == expected(record(1), record(1, 1))
        log.append([failure(2)])
        log.finish()
    assert folder_bucket.names("s3://bucket") == ["answers.jsonl"]
    assert lines() == expected(record(1), record(1, 1), failure(2))


def test_a_job_without_answers_has_an_empty_output():
    write(ends=True)
    assert folder_bucket.names("s3://bucket") == ["answers.jsonl"] and lines() == []


def test_reopened_log_knows_its_records_before_and_after_the_end():
    write(record(1), failure(2))
    write(record(3))
    with AnswerLog(PATH, "job") as log:
        assert [log.has(1, 0), log.has_failed(2), log.has(3, 0), log.has(4, 0)] == [
            True,
            True,
            True,
            False,
        ]
        log.finish()
    before = lines()
    with AnswerLog(PATH, "job") as log:  # the input got longer
        assert log.has(3, 0)
        log.append([record(4)])
        log.finish()
    assert lines() == [*before, *expected(record(4))]
    assert folder_bucket.names("s3://bucket") == ["answers.jsonl"]


def test_many_parts_are_read_in_order(monkeypatch):
    monkeypatch.setattr("v4jax.inference.answer_parts._AT_ONCE", 4)
    write(*(record(line) for line in range(11)), ends=True)
    assert lines() == expected(*(record(line) for line in range(11)))


def test_parts_that_a_crash_left_beside_the_output_are_removed(monkeypatch):
    """Killed between making the output and removing its parts, wherever."""
    real = RemotePath.write_blocks

    def stop_after(path, blocks):
        real(path, blocks)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "write_blocks", stop_after)
        with pytest.raises(KeyboardInterrupt):
            write(record(1), record(2), record(3), ends=True)
    assert len(parts()) == 4 and len(lines()) == 3
    RemotePath("s3://bucket/answers.jsonl.parts/00000003.jsonl").unlink()  # removal had begun
    with AnswerLog(PATH, "job") as log:
        assert sorted(log.records) == [(1, 0), (2, 0), (3, 0)]
        log.append([record(4)])
        log.finish()
    assert lines() == expected(*(record(line) for line in range(1, 5)))
    assert folder_bucket.names("s3://bucket") == ["answers.jsonl"]


def test_the_newer_of_two_jobs_goes_on_and_the_older_ends():
    older = AnswerLog(PATH, "job")
    older.append([record(1)])
    newer = AnswerLog(PATH, "job")
    assert newer.has(1, 0)
    taken = r"another job is writing s3://bucket/answers\.jsonl \(process \d+ on .+, begun .+\), "
    for _ in range(2):  # whether or not the newer one has written
        with pytest.raises(V4JaxError, match=taken + "and this one ends; what it answered is kept"):
            older.append([record(2)])
        assert not older.has(2, 0)
        newer.append([record(len(newer.records) + 1)])
    with pytest.raises(V4JaxError, match=taken):
        older.finish()
    newer.finish()
    with pytest.raises(V4JaxError, match=r"\(it was finished or overwritten meanwhile\)"):
        older.append([record(2)])
    older.close()
    assert lines() == expected(*(record(line) for line in range(1, 4)))
    assert folder_bucket.names("s3://bucket") == ["answers.jsonl"]


def test_an_answer_written_while_a_job_starts_is_seen(monkeypatch):
    """The older job writes between the newer one's list of parts and its own part."""
    older = AnswerLog(PATH, "job")
    real, left = RemotePath.create, [record(1), record(2)]

    def create(path, data):
        if left:
            one = left.pop(0)
            monkeypatch.setattr(RemotePath, "create", real)
            older.append([one])
            monkeypatch.setattr(RemotePath, "create", create)
        real(path, data)

    monkeypatch.setattr(RemotePath, "create", create)
    newer = AnswerLog(PATH, "job")
    assert sorted(newer.records) == [(1, 0), (2, 0)]
    with pytest.raises(V4JaxError, match="another job is writing"):
        older.append([record(3)])


def test_a_request_that_was_repeated_is_no_other_job(monkeypatch):
    """A part that was written, though the answer of the bucket was lost, is ours."""
    with AnswerLog(PATH, "job") as log:
        pipe_file = folder_bucket.FolderBucket.pipe_file

        def twice(self, path, value, **options):
            pipe_file(self, path, value, **options)
            pipe_file(self, path, value, **options)

        monkeypatch.setattr(folder_bucket.FolderBucket, "pipe_file", twice)
        log.append([record(1)])
        monkeypatch.undo()
        log.append([record(2)])
        log.finish()
    assert lines() == expected(record(1), record(2))


def test_overwriting_begins_anew():
    write(record(1), job="old", ends=True)
    write(record(2), job="new", overwrite=True)
    with AnswerLog(PATH, "new") as log:
        assert list(log.records) == [(2, 0)]


@pytest.mark.parametrize(("data", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_objects_are_refused_and_left_alone(data, message):
    RemotePath(PATH).write_bytes(data)
    with pytest.raises(V4JaxError, match=message):
        AnswerLog(PATH, "job")
    assert folder_bucket.read(PATH) == data
    assert folder_bucket.names("s3://bucket") == ["answers.jsonl"]


def test_a_bucket_that_cannot_be_written(monkeypatch):
    def refuse(*_arguments, **_options):
        raise RuntimeError("403 Forbidden\nmore")

    with AnswerLog(PATH, "job") as log:
        monkeypatch.setattr(folder_bucket.FolderBucket, "pipe_file", refuse)
        message = "cannot write s3://bucket/answers.jsonl.parts/00000002.jsonl: RuntimeError: 403 "
        with pytest.raises(V4JaxError, match=re.escape(message) + "Forbidden; start the job again"):
            log.append([record(1)])
        assert not log.has(1, 0)
    with pytest.raises(V4JaxError, match=r"cannot write s3://bucket/answers\.jsonl: Runtime.* 403"):
        AnswerLog(PATH, "job")
