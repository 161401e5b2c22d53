"""The output of a job: what a crash leaves is repaired, and what is not ours is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import folder_bucket
import pytest

from v4jax import retries
from v4jax.errors import V4JaxError
from v4jax.files import BucketPath, to_path
from v4jax.inference.answer_log import AnswerLog

TOKENS = {"document": 3, "question": 2, "answer": 1}


def record(line: int, index: int = 0) -> dict:
    """Returns an answer."""
    answer = {"answer": "a\u2028\n", "tokens": TOKENS, "input": "i"}
    return {"line": line, "question_index": index} | answer


def failure(line: int) -> dict:
    """Returns an error line."""
    return {"line": line, "error": {"message": "no"}, "input": "i"}


@pytest.fixture
def disk(tmp_path):
    return str(tmp_path / "answers.jsonl")


@pytest.fixture
def remote(bucket):
    return f"{bucket}/answers.jsonl"


@pytest.fixture(params=["disk", "remote"])
def path(request):
    return request.getfixturevalue(request.param)


def write(path: str, *records: dict, job: str = "job", ends: bool = False, **options) -> None:
    """Appends records, each by itself, as one job does."""
    with AnswerLog(path, job, **options) as log:
        for one in records:
            log.append([one])
        if ends:
            log.finish()


def read(path: str) -> list[dict]:
    """Returns the records of an output, without the job."""
    lines = [json.loads(line) for line in to_path(path).read_bytes().splitlines()]
    return [{name: line[name] for name in line if name != "job"} for line in lines]


def names() -> list[str]:
    return folder_bucket.names("s3://bucket")


def test_reopened_log_knows_its_records_before_and_after_the_end(path):
    with AnswerLog(path, "job") as log:
        log.append([record(1), record(1, 1)])
    write(path, failure(2))
    with AnswerLog(path, "job") as log:
        assert log.has(1, 0) and log.has(1, 1) and not log.has(1, 2) and not log.has(2, 0)
        assert log.has_failed(2) and not log.has_failed(1)
        assert log.records[1, 0] == {"line": 1, "input": "i", "tokens": TOKENS}
        log.finish()
    before = read(path)
    assert before == [record(1), record(1, 1), failure(2)]
    with AnswerLog(path, "job") as log:  # the input got longer
        assert log.has(1, 1)
        log.append([record(4)])
        log.finish()
    assert read(path) == [*before, record(4)]
    assert "s3:" not in path or names() == ["answers.jsonl"]


def test_failures_can_be_taken_out(path):
    write(path, record(1), failure(2), record(3), failure(4), ends="s3:" in path)
    write(path, failure(5))
    write(path, record(4), retry_failed=True, ends=True)
    assert read(path) == [record(1), record(3), record(4)]
    write(path, failure(5), ends=True)  # it can fail again
    write(path, retry_failed=True, ends=True)
    assert read(path) == [record(1), record(3), record(4)]
    assert "s3:" not in path or names() == ["answers.jsonl"]


def test_overwriting_begins_anew(path):
    write(path, record(1), job="old", ends=True)
    write(path, record(2), job="new", overwrite=True)
    with AnswerLog(path, "new") as log:
        assert list(log.records) == [(2, 0)]


FOREIGN = {
    "no JSON": (b"hello\n", "line 1 was not written by v4jax batch"),
    "other JSON": (b'{"line": 1}\n', "line 1 was not written by v4jax batch"),
    "a list": (b"[1]\n", "line 1 was not written by v4jax batch"),
    "other settings": (
        b'{"line": 1, "question_index": 0, "input": "i", "job": "x"}\n',
        "was written with another model or other settings; start with the same ones to continue",
    ),
    "twice": (
        b'{"line": 1, "question_index": 0, "input": "i", "job": "job"}\n' * 2,
        "line 2 repeats an answer",
    ),
}


@pytest.mark.parametrize(("data", "message"), FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_outputs_are_refused_and_left_alone(path, data, message):
    to_path(path).write_bytes(data)
    with pytest.raises(V4JaxError, match=message):
        AnswerLog(path, "job")
    assert to_path(path).read_bytes() == data
    assert "s3:" not in path or names() == ["answers.jsonl"]
    write(path, record(1), overwrite=True)  # and the lock is free again


def test_a_torn_line_is_cut_off_wherever_it_tore(disk):
    write(disk, record(1))
    whole = Path(disk).read_bytes()
    write(disk, record(2))
    both = Path(disk).read_bytes()
    for end in range(len(whole), len(both)):
        Path(disk).write_bytes(both[:end])
        with AnswerLog(disk, "job") as log:
            assert log.has(1, 0) and not log.has(2, 0)
            assert Path(disk).read_bytes() == whole
            log.append([record(2)])
        assert Path(disk).read_bytes() == both


def test_one_job_at_a_time_on_a_disk(disk):
    refused = pytest.raises(V4JaxError, match=r"another job is writing .*answers\.jsonl; wait")
    with AnswerLog(disk, "job"), refused:
        AnswerLog(disk, "job", overwrite=True)
    write(disk, record(1))


def test_the_lock_of_a_killed_job_is_gone(disk):
    code = (
        "import sys; from v4jax.inference.answer_log import AnswerLog\n"
        "log = AnswerLog(sys.argv[1], 'job'); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen([sys.executable, "-c", code, disk], **pipes)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(V4JaxError, match="another job"):
        AnswerLog(disk, "job")
    holder.kill()
    holder.communicate()
    write(disk, record(1))


def test_unwritable_places(tmp_path):
    with pytest.raises(V4JaxError, match=r"cannot write .*: No such file or directory"):
        AnswerLog(str(tmp_path / "none" / "answers.jsonl"), "job")
    with pytest.raises(V4JaxError, match=r"cannot write .*: Is a directory"):
        AnswerLog(str(tmp_path), "job")
    with pytest.raises(V4JaxError, match="cannot write /dev/null: it is not a regular file"):
        AnswerLog("/dev/null", "job")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_plainly(disk):
    with AnswerLog(disk, "job") as log:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, log._output.descriptor)
        os.close(full)
        with pytest.raises(V4JaxError, match="No space left on device; start the job again"):
            log.append([record(1)])
        assert not log.has(1, 0)


def test_every_answer_is_in_the_bucket_at_once_and_the_output_in_the_end(remote, monkeypatch):
    monkeypatch.setattr("v4jax.inference.answer_output._AT_ONCE", 4)
    records = [record(line) for line in range(11)]
    with AnswerLog(remote, "job") as log:
        for i, one in enumerate(records):
            log.append([one])
            assert read(f"{remote}.parts/{i + 2:08d}.jsonl") == [one]
        log.finish()
    assert names() == ["answers.jsonl"] and read(remote) == records


def test_a_job_without_answers_has_an_empty_output(remote):
    write(remote, ends=True)
    assert names() == ["answers.jsonl"] and read(remote) == []


def test_parts_that_a_crash_left_beside_the_output_are_removed(remote, monkeypatch):
    """Killed between making the output and removing its parts, wherever."""
    real = BucketPath.write_blocks

    def stop_after(path, blocks):
        real(path, blocks)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(BucketPath, "write_blocks", stop_after)
        with pytest.raises(KeyboardInterrupt):
            write(remote, record(1), record(2), record(3), ends=True)
    assert len(names()) == 5 and len(read(remote)) == 3
    to_path(f"{remote}.parts/00000003.jsonl").unlink()  # removal had begun
    with AnswerLog(remote, "job") as log:
        assert sorted(log.records) == [(1, 0), (2, 0), (3, 0)]
        log.append([record(4)])
        log.finish()
    assert read(remote) == [record(line) for line in range(1, 5)]
    assert names() == ["answers.jsonl"]


def test_the_newer_of_two_jobs_goes_on_and_the_older_ends(remote):
    older = AnswerLog(remote, "job")
    older.append([record(1)])
    newer = AnswerLog(remote, "job")
    assert newer.has(1, 0)
    taken = r"another job is writing s3://bucket/answers\.jsonl \(process \d+ on .+, begun .+\), "
    for _ in range(2):  # whether or not the newer one has written
        with pytest.raises(V4JaxError, match=taken + "and this one ends; its answers are kept"):
            older.append([record(2)])
        assert not older.has(2, 0)
        newer.append([record(len(newer.records) + 1)])
    with pytest.raises(V4JaxError, match=taken):
        older.finish()
    newer.finish()
    with pytest.raises(V4JaxError, match=r"\(it was finished or overwritten meanwhile\)"):
        older.append([record(2)])
    older.close()
    assert read(remote) == [record(line) for line in range(1, 4)]
    assert names() == ["answers.jsonl"]


def test_an_answer_written_while_a_job_starts_is_seen(remote, monkeypatch):
    """The older job writes between the newer one's list of parts and its own part."""
    older = AnswerLog(remote, "job")
    real, left = BucketPath.create, [record(1), record(2)]

    def create(path, data):
        if left:
            one = left.pop(0)
            monkeypatch.setattr(BucketPath, "create", real)
            older.append([one])
            monkeypatch.setattr(BucketPath, "create", create)
        real(path, data)

    monkeypatch.setattr(BucketPath, "create", create)
    newer = AnswerLog(remote, "job")
    assert sorted(newer.records) == [(1, 0), (2, 0)]
    with pytest.raises(V4JaxError, match="another job is writing"):
        older.append([record(3)])


def test_a_request_that_was_repeated_is_no_other_job(remote, monkeypatch):
    """A part that was written, though the answer of the bucket was lost, is ours."""
    with AnswerLog(remote, "job") as log:
        pipe_file = folder_bucket.FolderBucket.pipe_file

        def twice(self, path, value, **options):
            pipe_file(self, path, value, **options)
            pipe_file(self, path, value, **options)

        with monkeypatch.context() as patch:
            patch.setattr(folder_bucket.FolderBucket, "pipe_file", twice)
            log.append([record(1)])
        log.append([record(2)])
        log.finish()
    assert read(remote) == [record(1), record(2)]


def test_a_bucket_that_cannot_be_written(remote, monkeypatch):
    def refuse(*_arguments, **_options):
        raise RuntimeError("403 Forbidden\nmore")

    with AnswerLog(remote, "job") as log:
        waited = []
        monkeypatch.setattr(retries.time, "sleep", waited.append)
        monkeypatch.setattr(folder_bucket.FolderBucket, "pipe_file", refuse)
        message = "cannot write s3://bucket/answers.jsonl.parts/00000002.jsonl: RuntimeError: 403 "
        with pytest.raises(V4JaxError, match=re.escape(message) + "Forbidden; start the job again"):
            log.append([record(1)])
        assert not log.has(1, 0) and waited == [1.0, 2.0, 4.0, 8.0]
    with pytest.raises(V4JaxError, match=r"cannot write s3://bucket/answers\.jsonl: Runtime.* 403"):
        AnswerLog(remote, "job")
