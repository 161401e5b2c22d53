"""The output of a job: what a crash leaves is repaired, and what is not ours is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from v4jax.errors import V4JaxError
from v4jax.inference.answer_log import AnswerLog

TOKENS = {"document": 3, "question": 2, "answer": 1}


def record(line: int, index: int = 0) -> dict:
    """Returns an answer."""
    return {
        "line": line,
        "question_index": index,
        "answer": "a\u2028\n",
        "tokens": TOKENS,
        "input": "i",
    }


def failure(line: int) -> dict:
    """Returns an error line."""
    return {"line": line, "error": {"message": "no"}, "input": "i"}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "answers.jsonl")


def write(path: str, *records: dict, job: str = "job", **options) -> None:
    """Appends records, as one job does."""
    with AnswerLog(path, job, **options) as log:
        log.append(records)


def read(path: str) -> bytes:
    """Returns what the file holds."""
    return Path(path).read_bytes()


def test_reopened_log_knows_its_records(path):
    write(path, record(1), record(1, 1))
    write(path, failure(2))
    with AnswerLog(path, "job") as log:
        assert [log.has(1, 0), log.has(1, 1), log.has(1, 2), log.has(2, 0)] == [
            True,
            True,
            False,
            False,
        ]
        assert [log.has_failed(1), log.has_failed(2)] == [False, True]
        assert log.records[1, 0] == {"line": 1, "input": "i", "tokens": TOKENS}
    lines = [json.loads(line) for line in read(path).split(b"\n")[:-1]]
    assert lines == [r | {"job": "job"} for r in (record(1), record(1, 1), failure(2))]


def test_a_torn_line_is_cut_off_wherever_it_tore(path):
    write(path, record(1))
    whole = read(path)
    write(path, record(2))
    both = read(path)
    for end in range(len(whole), len(both)):
        Path(path).write_bytes(both[:end])
        with AnswerLog(path, "job") as log:
            assert log.has(1, 0) and not log.has(2, 0)
            assert read(path) == whole
            log.append([record(2)])
        assert read(path) == both


def test_overwriting_begins_anew(path):
    write(path, record(1), job="old")
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
def test_foreign_files_are_refused_and_left_alone(path, data, message):
    Path(path).write_bytes(data)
    with pytest.raises(V4JaxError, match=message):
        AnswerLog(path, "job")
    assert read(path) == data
    write(path, record(1), overwrite=True)  # and the lock is free again


def test_one_job_at_a_time(path):
    refused = pytest.raises(V4JaxError, match=r"another job is writing .*answers\.jsonl; wait")
    with AnswerLog(path, "job"), refused:
        AnswerLog(path, "job", overwrite=True)
    write(path, record(1))


def test_the_lock_of_a_killed_job_is_gone(path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from v4jax.inference.answer_log import AnswerLog\n"
            "log = AnswerLog(sys.argv[1], 'job'); print('held', flush=True); sys.stdin.read()",
            path,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(V4JaxError, match="another job"):
        AnswerLog(path, "job")
    holder.kill()
    holder.communicate()
    write(path, record(1))


def test_unwritable_places(tmp_path):
    with pytest.raises(V4JaxError, match=r"cannot write .*: No such file or directory"):
        AnswerLog(str(tmp_path / "none" / "answers.jsonl"), "job")
    with pytest.raises(V4JaxError, match=r"cannot write .*: Is a directory"):
        AnswerLog(str(tmp_path), "job")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said_plainly(path, monkeypatch):
    with AnswerLog(path, "job") as log:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, log._output.descriptor)
        os.close(full)
        with pytest.raises(V4JaxError, match="No space left on device; start the job again"):
            log.append([record(1)])
        assert not log.has(1, 0)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/full"])
def test_what_cannot_be_continued_is_refused(path):
    with pytest.raises(V4JaxError, match=f"cannot write {path}: it is not a regular file"):
        AnswerLog(path, "job")
