"""The batch job: documents in, answers out, whatever happens on the way.

`documents.py` describes the input, `answer_log.py` the output. A document that fails becomes an
error line, and the job goes on. A job that was killed continues when it is started again with the
same settings, because each line of the output says which question of which input line it answers.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from v4jax import log
from v4jax.errors import CacheError, RequestError, UnsupportedError, V4JaxError
from v4jax.files import is_same_file, size_of
from v4jax.inference.answer import Answer
from v4jax.inference.answer_log import AnswerLog
from v4jax.inference.documents import (
    InputLine,
    build_document,
    find_id,
    open_path,
    parse_line,
    read_questions,
    resolve_path,
)
from v4jax.inference.engine import EncodedDocument, Engine
from v4jax.inference.meter import Meter, Summary, summarize
from v4jax.inference.request import Document, SamplingOptions
from v4jax.inference.shards import Shard


@dataclass(frozen=True)
class BatchJob:
    """A job.

    Attributes:
      input, output: paths of the JSONL files.
      settings: everything besides the input that determines the answers (model, numerics, engine
        options, …), as JSON values; an output can be continued only with the same settings.
      sampling: options for lines that do not state their own.
      overwrite: whether the job discards what the output holds.
      shard: the part of the input that this process answers; the output is its own file.
    """

    input: str
    output: str
    settings: Mapping[str, Any]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    overwrite: bool = False
    shard: Shard = field(default_factory=Shard)

    @property
    def folder(self) -> str:
        """The folder at which relative paths of documents start."""
        return os.path.dirname(self.input)

    @property
    def digest(self) -> str:
        """Identifies the settings."""
        settings = {**self.settings, "sampling": vars(self.sampling)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def run_batch(job: BatchJob, load_engine: Callable[[], Engine]) -> Summary:
    """Answers every question of the input that the output does not answer yet.

    Args:
      load_engine: is called once, and only if there is something to do. Input and output are
        checked before any weights are read.

    Raises:
      V4JaxError: input or output cannot be used, or the output is that of another input or job.
    """
    with open_path(job.input):  # readable; checked before an output is created
        pass
    if is_same_file(job.input, job.output):
        raise RequestError(f"input and output are the same file, {job.input}")
    with AnswerLog(job.output, job.digest, overwrite=job.overwrite) as answers:
        work = _plan(job, answers)
        before = _count_answers(answers)
        if not (work.documents or answers.records):
            part = f" for shard {job.shard}" if job.shard.count > 1 else ""
            log.warning(f"batch: {job.input} holds no documents{part}")
        if answers.records:
            left = f"{work.documents:,} documents are left"
            log.info(f"batch: {job.output} holds {before:,} answers, {left}")
        meter = Meter(work.document_bytes, work.questions, job.sampling.max_new_tokens)
        compile_seconds = 0.0
        if work.documents:
            engine = load_engine()
            try:
                _Run(job, answers, engine, meter, work).run()
            except KeyboardInterrupt:
                log.info(
                    f"batch: stopped; {job.output} holds {_count_answers(answers):,} answers, and "
                    "the same command continues"
                )
                raise
            compile_seconds = engine.compile_seconds
        answers.finish()
        return summarize(
            answers.records, meter, questions_before=before, compile_seconds=compile_seconds
        )


def _count_answers(answers: AnswerLog) -> int:
    return sum("error" not in record for record in answers.records.values())


@dataclass
class _Work:
    """The number of documents, questions and bytes that are left."""

    documents: int = 0
    questions: int = 0
    document_bytes: int = 0


def _plan(job: BatchJob, answers: AnswerLog) -> _Work:
    """Counts what is left, and checks that the answers belong to this input.

    Raises:
      RequestError: a line of the input differs from the one that was answered.
    """
    work = _Work()
    digests = {record["line"]: record["input"] for record in answers.records.values()}
    for line in job.shard.read_lines(job.input):
        known = digests.pop(line.number, line.digest)
        if known != line.digest:
            raise RequestError(
                f"{job.input} line {line.number} is not the one that {job.output} answers: "
                "the input changed; overwrite the output or choose another"
            )
        size_bytes, questions = _measure(job, line)
        left = sum(not answers.has(line.number, i) for i in range(questions))
        if not answers.has_failed(line.number) and (left or not questions):
            work.documents += 1
            work.questions += left
            work.document_bytes += size_bytes
    if digests:
        part = f" in shard {job.shard}" if job.shard.count > 1 else ""
        raise RequestError(
            f"{job.output} answers line {min(digests)}, which {job.input} does not have{part}: the "
            "input changed; overwrite the output or choose another"
        )
    return work


def _measure(job: BatchJob, line: InputLine) -> tuple[int, int]:
    """Returns the document's bytes and the number of questions, 0 if the line does not say."""
    size_bytes = questions = 0
    try:
        fields = parse_line(line)
        questions = len(read_questions(fields))
        size_bytes = len(line.data)
        if "path" in fields:
            size_bytes = size_of(resolve_path(fields["path"], job.folder))
    except (V4JaxError, OSError, ValueError):
        pass  # becomes an error line when its turn comes
    return size_bytes, questions


class _Run:
    """One run of a job: the loop over the documents, and its progress."""

    def __init__(
        self, job: BatchJob, answers: AnswerLog, engine: Engine, meter: Meter, work: _Work
    ):
        self.job, self.answers, self.work = job, answers, work
        self.engine, self.meter = engine, meter
        self.progress = log.Progress("batch", total=meter.total)
        self.turn = 0  # documents begun

    def run(self) -> None:
        """Works through the input."""
        with self.progress:
            for line in self.job.shard.read_lines(self.job.input):
                if not self.answers.has_failed(line.number):
                    self._serve(line)

    def _serve(self, line: InputLine) -> None:
        """Answers the open questions of one line, or records why it failed."""
        size_bytes, questions = _measure(self.job, line)
        open_questions = [i for i in range(questions) if not self.answers.has(line.number, i)]
        if questions and not open_questions:
            return
        self.turn += 1
        document_id = None
        try:
            fields = parse_line(line)
            document_id = find_id(fields)
            document = build_document(fields, self.job.folder, self.job.sampling)
            encoded = self.engine.encode(document)
        except (RequestError, UnsupportedError) as error:
            self.meter.skip_document(size_bytes, len(open_questions))
            self._fail(line, document_id, error)
            return
        self.meter.begin_document(size_bytes, len(encoded.tokens))
        try:
            self._answer(line, document, encoded)
        except (RequestError, CacheError) as error:
            self._fail(line, document_id, error)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            tokens = f"{len(encoded.tokens):,} tokens"
            reason = f"a document of {tokens} does not fit into the memory of the device"
            self._fail(line, document_id, RequestError(f"{reason}: {str(error).splitlines()[0]}"))

    def _answer(self, line: InputLine, document: Document, encoded: EncodedDocument) -> None:
        meter, engine = self.meter, self.engine
        engine.prepare(encoded)
        meter.reading.start()
        state = engine.read(encoded, on_chunk=self._show_reading)
        meter.reading.add(0)
        # On a mesh a state has several slots, all with the same document.
        meter.cache_bytes = max(meter.cache_bytes, state.bytes() // len(state.lengths))
        for group in encoded.groups(engine.options):
            open_questions = [i for i in group if not self.answers.has(line.number, i)]
            if not open_questions:
                continue
            # The whole group is answered again even if a crash left some of its answers in the
            # file: answers of the same group come out the same to the last bit.
            meter.writing.start()
            given = engine.answer(encoded, state, group, on_tokens=self._show_writing)
            meter.writing.add(0)
            by_index = dict(zip(group, given, strict=True))
            self.answers.append(
                _record(line, document, encoded, i, by_index[i]) for i in open_questions
            )
            meter.answered(len(open_questions), sum(a.answer_tokens for a in given))

    def _fail(self, line: InputLine, document_id: str | int | None, error: V4JaxError) -> None:
        log.warning(f"batch: line {line.number}: {log.printable(str(error))}")
        failure = {"kind": type(error).__name__, "message": str(error)}
        record = {"line": line.number, "id": document_id, "error": failure, "input": line.digest}
        self.answers.append([record])

    def _show_reading(self, tokens: int) -> None:
        self.meter.read(tokens)
        self._show("reading", self.meter.reading.per_second)

    def _show_writing(self, tokens: int) -> None:
        self.meter.writing.add(tokens)
        self._show("writing", self.meter.writing.per_second)

    def _show(self, what: str, rate: float | None) -> None:
        self.progress.update(
            self.meter.done,
            rate=rate,
            seconds_left=self.meter.seconds_left,
            total=self.meter.total,
            note=f"document {self.turn:,} of {self.work.documents:,}, {what}",
        )


def _record(
    line: InputLine, document: Document, encoded: EncodedDocument, index: int, answer: Answer
) -> dict[str, Any]:
    record = {
        "line": line.number,
        "id": document.id,
        "question_index": index,
        "question": document.questions[index].text,
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": {
            "document": len(encoded.tokens),
            "question": answer.prompt_tokens,
            "answer": answer.answer_tokens,
        },
        "input": line.digest,
    }
    optional = {
        "reasoning": answer.reasoning,
        "tool_calls": answer.tool_calls,
        "warning": answer.warning,
    }
    return record | {name: value for name, value in optional.items() if value}
