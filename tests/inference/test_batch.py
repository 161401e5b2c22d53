"""The job: answers, error lines, continuing, and refusing what does not belong together."""

import hashlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from v4jax.errors import RequestError, UnsupportedError, V4JaxError
from v4jax.inference import (
    BatchJob,
    Document,
    Frame,
    Question,
    SamplingOptions,
    batch,
    run_batch,
)
from v4jax.inference.engine import Engine
from v4jax.tokenizer import ByteTokenizer

from .fake_model import FakeModel, expected_tokens, make_engine

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


def test_drafts_leave_greedy_answers_as_they_are(source):
    """Byte by byte, also where the job stops in between and goes on with drafts."""
    lines = [{k: v for k, v in line.items() if k != "temperature"} for line in LINES]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = source.with_name("answers.jsonl")

    def write(speculate) -> str:
        engine = make_engine(FakeModel(drafts=4), speculate=speculate)
        return "\n".join(run(source, engine)[0].lines())

    assert "a pass" not in write("off")
    data = output.read_bytes()
    for kept, speculate in ((0, "auto"), (0, 1), (1, 2), (4, 3)):
        output.write_bytes(b"".join(data.splitlines(keepends=True)[:kept]) + data[:9])
        said = re.search(r"drafts +(\S+) tokens written a pass", write(speculate))
        assert 1 <= float(said[1]) <= 5 and (kept or float(said[1]) > 1)
        assert output.read_bytes() == data


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


class SickModel(FakeModel):
    """Computes NaN for a sequence as soon as it holds a certain token."""

    def __init__(self, token: int):
        super().__init__()
        self.token = token

    def extend(self, tokens, cache, lengths=None, logits="all", **options):
        logits_bv, extended = super().extend(tokens, cache, lengths, logits, **options)
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        sick = ((tokens == self.token) & real).any(axis=1, keepdims=True)
        return jnp.where(sick, jnp.nan, logits_bv), extended


def test_numbers_that_are_not_finite_fail_what_computed_them(source):
    """One document in its reading, two questions of another: their neighbours have answers."""
    source.write_text("".join(json.dumps(line) + "\n" for line in SICK_LINES))
    healthy = run(source)[1]
    source.with_name("answers.jsonl").unlink()
    summary, lines = run(source, make_engine(SickModel(ord("@"))))
    failed = {line["line"]: line["error"] for line in lines if "error" in line}
    assert [line for line in lines if "error" not in line] == [
        line
        for line in healthy
        if "@" not in SICK_LINES[line["line"] - 1]["text"] + line["question"]
    ]
    assert (summary.documents, summary.failed, summary.questions) == (3, 2, 4)
    assert {error["kind"] for error in failed.values()} == {"NonFiniteError"}
    assert failed[1]["message"].startswith(
        "the model computed NaN or infinity in tokens 65 to 104:"
    )
    assert failed[2]["message"].startswith(
        "no answer to question_index 1, 3: the model computed NaN or infinity for token 1 of the"
    )


SICK_LINES = [
    {"text": "x" * 70 + "@" + "x" * 31, "question": "Who?"},
    {"text": "Healthy.", "questions": ["Who?", "Who@?", "When?", "Why@?", "Where?"]},
    {"text": "Last.", "question": "Who?"},
]


def test_an_answer_that_stops_being_finite_keeps_its_neighbour():
    engine = make_engine(SickModel(expected_tokens(prompt("Who?"), 3)[1]))
    encoded = engine.encode(Document("Text.", (Question("Who?"), Question("When?"))))
    sick, well = engine.answer(encoded, engine.read(encoded), range(2))
    assert sick.finish_reason == "error" and sick.answer_tokens == 2
    assert "NaN or infinity for token 3 of the answer" in sick.error
    assert well.error == "" and well.answer_tokens == len(expected_tokens(prompt("When?"), 256))


def prompt(question: str) -> list[int]:
    """Returns the prompt of a question to the document "Text."."""
    tokenizer, frame = ByteTokenizer(), Frame()
    before = frame.encode_document(tokenizer, "Text.")
    return before + frame.encode_question(tokenizer, question)


GUARDED = {
    "while it is built": ("build_document", OverflowError("int too large to convert to float")),
    "while its line is parsed": ("parse_line", RecursionError("maximum recursion depth exceeded")),
    "while it is read": ("build_document", MemoryError()),
}


@pytest.mark.parametrize("place, error", GUARDED.values(), ids=GUARDED.keys())
def test_whatever_a_document_raises_is_its_own_error(source, monkeypatch, place, error):
    """One of the lines raises, each time it is touched."""
    original = getattr(batch, place)

    def touch(line, *arguments):
        if "Second" in str(line):
            raise error
        return original(line, *arguments)

    monkeypatch.setattr(batch, place, touch)
    summary, lines = run(source)
    assert [line["line"] for line in lines] == [1, 1, 1, 2, 3, 3]
    assert (summary.failed, summary.questions) == (1, 5)
    message = lines[3]["error"]["message"]
    assert (
        message.startswith(f"{type(error).__name__}: {error}") or "do not fit into the" in message
    )


def test_an_engine_that_raises_what_nobody_expected_goes_on(source, monkeypatch):
    engine = make_engine()
    read = engine.read
    monkeypatch.setattr(
        engine,
        "read",
        lambda encoded, **rest: read(encoded, **rest) if len(encoded.tokens) < 99 else 1 // 0,
    )
    summary, lines = run(source, engine)
    assert (summary.failed, summary.questions) == (1, 5)
    assert lines[3]["error"]["message"].startswith("ZeroDivisionError: ")


def test_failed_documents_are_retried_when_asked(source):
    (source.with_name("third.txt")).unlink()
    _, lines = run(source)
    assert lines[-1]["error"]["message"].endswith("No such file or directory")
    (source.with_name("third.txt")).write_text("Third text.")
    assert run(source)[1] == lines
    summary, again = run(source, retry_failed=True)
    assert again[:4] == lines[:4] and [line["line"] for line in again[4:]] == [3, 3]
    assert (summary.failed, summary.questions, summary.questions_before) == (0, 6, 4)
    assert run(source, retry_failed=True)[1] == again


def test_a_file_that_changed_is_another_document(source, capsys):
    path = source.with_name("third.txt")
    _, lines = run(source)
    assert lines[-1]["file"] == {
        "bytes": 11,
        "sha256": hashlib.sha256(b"Third text.").hexdigest()[:32],
    }
    for text in ("Third, longer.", "third text."):
        path.write_text(text)
        with pytest.raises(RequestError, match=r"third\.txt, which line 3 of .* changed since"):
            run(source)
    path.unlink()
    assert run(source)[1] == lines and "its file is gone" in capsys.readouterr().err
    path.write_text("Third, longer.")
    assert len(run(source, overwrite=True)[1]) == 6


def test_an_output_that_is_removed_ends_the_job(source):
    engine, output = make_engine(), source.with_name("answers.jsonl")
    answer = engine.answer

    def remove(*arguments, **options):
        output.unlink(missing_ok=True)
        return answer(*arguments, **options)

    engine.answer = remove
    with pytest.raises(V4JaxError, match="was removed or replaced while this job was writing it"):
        run(source, engine)
    assert not output.exists()


def test_a_broken_program_stops_the_job_and_loses_nothing(source):
    model = FailingModel()
    model.message = "INTERNAL: a bug"
    with pytest.raises(jax.errors.JaxRuntimeError):
        run(source, make_engine(model))
    _, lines = run(source)
    assert len(lines) == 6
