"""The job: answers, error lines, continuing, and refusing what does not belong together."""

import json
import re
import sys
from pathlib import Path

import jax
import pytest

from v4jax.errors import RequestError, UnsupportedError, V4JaxError
from v4jax.inference import BatchJob, SamplingOptions, run_batch
from v4jax.inference.engine import Engine

from .fake_model import FakeModel, make_engine

SAMPLING = SamplingOptions(max_new_tokens=6)
LINES = [
    {"id": "a", "text": "First text.", "questions": ["Who?", "When?", "Where?"]},
    {"id": "b", "text": "Second text. " * 20, "question": "Why?", "temperature": 1.0},
    {"path": "third.txt", "questions": ["How?", "How often?"], "max_new_tokens": 3},
]


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "third.txt").write_text("Third text.")
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def run(source: Path, engine: Engine | None = None, **fields):
    """Runs a job; returns its summary and the lines of its output."""
    output = source.with_name("answers.jsonl")
    job = BatchJob(
        str(source), str(output), **({"settings": {"model": "fake"}, "sampling": SAMPLING} | fields)
    )
    summary = run_batch(job, lambda: engine or make_engine())
    return summary, [json.loads(line) for line in output.open(encoding="utf-8")]


def test_output_lines(source):
    summary, lines = run(source)
    asked = [
        (number, fields.get("id"), i, question)
        for number, fields in enumerate(LINES, start=1)
        for i, question in enumerate(fields.get("questions") or [fields["question"]])
    ]
    names = ("line", "id", "question_index", "question")
    assert [tuple(line[name] for name in names) for line in lines] == asked
    for line in lines:
        assert isinstance(line["answer"], str)
        assert line["finish_reason"] == "stop" or line["tokens"]["answer"] in (3, 6)
    assert lines[0]["tokens"]["document"] == len("First text.") + 2  # BOS and the user's role
    assert (
        lines[0]["tokens"]["question"] == len("\n\nWho?") + 2
    )  # the assistant's role and </think>
    assert (summary.documents, summary.failed, summary.questions) == (3, 0, 6)
    assert summary.tokens_written == sum(line["tokens"]["answer"] for line in lines)
    assert summary.cache_bytes == 8


def test_failures_do_not_stop_the_job(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    bad = [
        b"{broken",
        b'{"id": "x", "text": "t"}',
        b'{"id": 4, "path": "none.txt", "question": "q"}',
        b'{"text": "\xff", "question": "q"}',
        b'{"path": "gs://b/o", "question": "q"}',
        json.dumps({"id": "long", "text": "x" * 5000, "question": "q"}).encode(),
        b'{"text": "", "question": "q"}',
    ]
    good = source.read_bytes()
    source.write_bytes(b"\n".join(bad) + b"\n" + good)
    summary, lines = run(source)
    failed = [line for line in lines if "error" in line]
    assert [line["line"] for line in failed] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["id"] for line in failed] == [None, "x", 4, None, None, "long", None]
    reasons = [
        "the line is not JSON",
        "needs either",
        "No such file",
        "not UTF-8",
        "needs the extra gcs",
        "too long: 5,002 tokens",
        "text must not be empty",
    ]
    for line, reason in zip(failed, reasons, strict=True):
        assert reason in line["error"]["message"]
        assert line["error"]["kind"] in ("RequestError", "UnsupportedError")
    assert (summary.documents, summary.failed, summary.questions) == (10, 7, 6)
    _, again = run(source)
    assert again == lines


def test_continuing_after_any_line(source):
    _, whole = run(source)
    output = source.with_name("answers.jsonl")
    data = output.read_bytes()
    ends = [0, *(match.end() for match in re.finditer(rb"\n", data))]
    for end in ends:
        for torn in (0, 9):
            output.write_bytes(data[: end + torn])
            summary, lines = run(source)
            assert lines == whole and output.read_bytes() == data
            assert summary.questions_before == data[: end + torn].count(b"\n")


def test_a_finished_job_needs_no_model(source):
    run(source)
    job = BatchJob(str(source), str(source.with_name("answers.jsonl")), {"model": "fake"}, SAMPLING)
    summary = run_batch(job, lambda: pytest.fail("the model was loaded"))
    assert (summary.questions, summary.questions_before) == (6, 6)


def test_more_documents_can_be_appended(source):
    _, before = run(source)
    with source.open("a") as file:
        file.write('{"text": "Fourth.", "question": "What?"}\n')
    _, after = run(source)
    assert after[:-1] == before and after[-1]["line"] == 4


def test_another_input_is_noticed(source):
    run(source)
    text = source.read_text()
    source.write_text(text.replace("Second", "Other"))
    with pytest.raises(RequestError, match=r"docs\.jsonl line 2 is not the one that .* answers"):
        run(source)
    source.write_text(text.splitlines()[0])
    with pytest.raises(RequestError, match=r"answers line 2, which .*docs\.jsonl does not have"):
        run(source)
    _, lines = run(source, overwrite=True)
    assert [line["line"] for line in lines] == [1, 1, 1]


def test_other_settings_are_noticed(source):
    _, lines = run(source)
    for other in ({"settings": {"model": "x"}}, {"sampling": SAMPLING.replace(seed=1)}):
        with pytest.raises(V4JaxError, match="another model or other settings"):
            run(source, **other)
    assert run(source)[1] == lines


def test_input_and_output_must_differ(source):
    data = source.read_bytes()
    job = BatchJob(str(source), str(source), {}, overwrite=True)
    with pytest.raises(RequestError, match="input and output are the same file"):
        run_batch(job, make_engine)
    assert source.read_bytes() == data


def test_no_input_leaves_no_output(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for path, error in ((str(tmp_path / "none"), RequestError), ("s3://b/o", UnsupportedError)):
        with pytest.raises(error):
            run_batch(BatchJob(path, str(tmp_path / "answers"), {}), make_engine)
    assert list(tmp_path.iterdir()) == []


class FailingModel(FakeModel):
    """Raises an error of the runtime on long caches."""

    message = ""

    def extend(self, tokens, cache, *arguments, **options):
        if cache.capacity > 64:
            raise jax.errors.JaxRuntimeError(self.message)
        return super().extend(tokens, cache, *arguments, **options)


def test_a_document_beyond_the_memory_fails_alone(source):
    model = FailingModel()
    model.message = "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"
    summary, lines = run(source, make_engine(model))
    assert (summary.failed, summary.questions) == (1, 5)
    assert lines[3]["error"]["message"] == (
        "a document of 262 tokens does not fit into the memory of the device: "
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
    )


def test_a_broken_program_stops_the_job_and_loses_nothing(source):
    model = FailingModel()
    model.message = "INTERNAL: a bug"
    with pytest.raises(jax.errors.JaxRuntimeError):
        run(source, make_engine(model))
    _, lines = run(source)
    assert len(lines) == 6
