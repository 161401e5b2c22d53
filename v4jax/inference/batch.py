"""The batch job: documents in, answers out, whatever happens on the way.

`documents.py` describes the input, `answer_log.py` the output. A document that fails becomes an
error line, and the job goes on. A job that was killed continues when it is started again with the
same settings, because each line of the output says which question of which input line it answers.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from v4jax import log
from v4jax.errors import NonFiniteError, RequestError, V4JaxError
from v4jax.files import is_same_file
from v4jax.inference.answer import Answer
from v4jax.inference.answer_log import AnswerLog
from v4jax.inference.document_files import DocumentFiles, open_path
from v4jax.inference.documents import (
    FIELDS,
    SCORE_FIELDS,
    InputLine,
    build_document,
    build_text,
    find_id,
    parse_line,
    read_questions,
)
from v4jax.inference.engine import EncodedDocument, Engine
from v4jax.inference.meter import Meter, ScoreSummary, Summary, summarize, summarize_scores
from v4jax.inference.request import Document, SamplingOptions
from v4jax.inference.shards import Shard
from v4jax.retries import retry


@dataclass(frozen=True)
class BatchJob:
    """A job.

    Attributes:
      input, output: paths of the JSONL files.
      settings: everything besides the input that determines the answers (model, numerics, engine
        options, …), as JSON values; an output can be continued only with the same settings.
      sampling: options for lines that do not state their own.
      overwrite: whether the job discards what the output holds.
      retry_failed: whether documents that failed before are tried again; their error lines go.
      documents_under: folder that all files of documents must be in; None: anywhere.
      shard: the part of the input that this process answers; the output is its own file.
      scores: whether lines are texts to be scored, instead of documents with questions.
    """

    input: str
    output: str
    settings: Mapping[str, Any]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    overwrite: bool = False
    retry_failed: bool = False
    documents_under: str | None = None
    shard: Shard = field(default_factory=Shard)
    scores: bool = False

    @property
    def files(self) -> DocumentFiles:
        """The files of documents, whose relative paths start at the folder of the input."""
        return DocumentFiles(os.path.dirname(self.input), self.documents_under)

    @property
    def verb(self) -> str:
        """The verb that speaks."""
        return "score" if self.scores else "batch"

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
    done = _run_job(job, load_engine)
    return summarize(
        done.records,
        done.meter,
        questions_before=done.before,
        compile_seconds=done.compile_seconds,
        drafts=done.drafts,
    )


def run_scores(job: BatchJob, load_engine: Callable[[], Engine]) -> ScoreSummary:
    """Scores every text of the input that the output does not have yet; as `run_batch`."""
    done = _run_job(job, load_engine)
    return summarize_scores(done.records.values(), done.meter)


class _Done(NamedTuple):
    """A job's records, those that were there before it, and what this run took."""

    records: Mapping[tuple[int, int], Mapping[str, Any]]
    before: int
    meter: Meter
    compile_seconds: float
    drafts: bool


def _run_job(job: BatchJob, load_engine: Callable[[], Engine]) -> _Done:
    with open_path(job.input):  # readable; checked before an output is created
        pass
    if is_same_file(job.input, job.output):
        raise RequestError(f"input and output are the same file, {job.input}")
    options = {"overwrite": job.overwrite, "retry_failed": job.retry_failed}
    with AnswerLog(job.output, job.digest, **options) as answers:
        work = _plan(job, answers)
        before = _count_answers(answers)
        if not (work.documents or answers.records):
            part = f" for shard {job.shard}" if job.shard.count > 1 else ""
            log.warning(f"{job.verb}: {job.input} holds no documents{part}")
        if answers.records:
            left = f"{work.documents:,} documents are left"
            log.info(f"{job.verb}: {job.output} holds {before:,} answers, {left}")
        meter = Meter(work.document_bytes, work.questions, job.sampling.max_new_tokens)
        compile_seconds, drafts = 0.0, False
        if work.documents:
            engine = load_engine()
            try:
                _Run(job, answers, engine, meter, work).run()
            except KeyboardInterrupt:
                log.info(
                    f"{job.verb}: stopped; {job.output} holds {_count_answers(answers):,} answers, "
                    "and the same command continues"
                )
                raise
            compile_seconds, drafts = engine.compile_seconds, bool(engine.drafts)
        answers.finish()
        return _Done(answers.records, before, meter, compile_seconds, drafts)


def _count_answers(answers: AnswerLog) -> int:
    return sum("error" not in record for record in answers.records.values())


@dataclass
class _Work:
    """The number of documents and questions that are left, and the bytes of each document."""

    documents: int = 0
    questions: int = 0
    document_bytes: list[int] = field(default_factory=list)


def _plan(job: BatchJob, answers: AnswerLog) -> _Work:
    """Counts what is left, and checks that the answers belong to this input.

    Raises:
      RequestError: a line of the input, or the file that it names, differs from what was answered.
    """
    work = _Work()
    digests = {record["line"]: record["input"] for record in answers.records.values()}
    known_files = {r["line"]: r["file"] for r in answers.records.values() if "file" in r}
    for line in job.shard.read_lines(job.input):
        known = digests.pop(line.number, line.digest)
        if known != line.digest:
            raise RequestError(
                f"{job.input} line {line.number} is not the one that {job.output} answers: "
                "the input changed; overwrite the output or choose another"
            )
        if line.number in known_files:
            _check_file(job, line, known_files[line.number])
        size_bytes, questions = _measure(job, line)
        left = sum(not answers.has(line.number, i) for i in range(questions))
        if not answers.has_failed(line.number) and (left or not questions):
            work.documents += 1
            work.questions += left
            work.document_bytes.append(size_bytes)
    if digests:
        part = f" in shard {job.shard}" if job.shard.count > 1 else ""
        raise RequestError(
            f"{job.output} answers line {min(digests)}, which {job.input} does not have{part}: the "
            "input changed; overwrite the output or choose another"
        )
    return work


def _parse(job: BatchJob, line: InputLine) -> dict[str, Any]:
    return parse_line(line, SCORE_FIELDS if job.scores else FIELDS)


def _check_file(job: BatchJob, line: InputLine, known: Mapping[str, Any]) -> None:
    """Raises RequestError if the file that a line names is not the one that was answered."""
    path = _parse(job, line)["path"]
    try:
        size = retry(lambda: job.files.measure(path), f"measure {path}")
        same = size == known["bytes"] and vars(job.files.identify(path)) == known
    except (RequestError, OSError) as error:
        log.warning(f"{job.verb}: line {line.number} was answered, and its file is gone: {error}")
        return
    if not same:
        raise RequestError(
            f"{path}, which line {line.number} of {job.input} names, changed since {job.output} "
            "answered it; overwrite the output or choose another, and all its questions are "
            "answered anew"
        )


def _measure(job: BatchJob, line: InputLine) -> tuple[int, int]:
    """Returns the document's bytes and the number of questions, 0 if the line does not say."""
    size_bytes = questions = 0
    try:
        fields = _parse(job, line)
        questions = 1 if job.scores else len(read_questions(fields))
        size_bytes = len(line.data)
        if "path" in fields:
            size_bytes = job.files.measure(fields["path"])
    except Exception:
        pass  # becomes an error line when its turn comes
    return size_bytes, questions


@dataclass
class _Turn:
    """A line while it is served; `id` and `tokens` are known once they were found."""

    line: InputLine
    size_bytes: int
    open_questions: list[int]
    questions_left: int
    id: str | int | None = None
    tokens: int | None = None


def _ends_the_job(error: Exception) -> bool:
    """Whether an error is no document's own: whatever the device does next is wrong."""
    return isinstance(error, jax.errors.JaxRuntimeError) and not _lacks_memory(error)


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _describe_failure(turn: _Turn, error: Exception) -> dict[str, str]:
    """Returns kind and message of an error line."""
    kind, message = type(error).__name__, str(error)
    if _lacks_memory(error):
        reason = f"a document of {turn.tokens:,} tokens does not fit into the memory of the device"
        return {"kind": "RequestError", "message": f"{reason}: {message.splitlines()[0]}"}
    if isinstance(error, MemoryError):
        reason = f"its {turn.size_bytes:,} bytes do not fit into the memory of this machine"
        return {"kind": "RequestError", "message": f"{reason}; divide the document"}
    if not isinstance(error, V4JaxError):  # nobody expected it: its type says most
        return {"kind": kind, "message": f"{kind}: {message}"}
    return {"kind": kind, "message": message}


class _Run:
    """One run of a job: the loop over the documents, and its progress."""

    def __init__(
        self, job: BatchJob, answers: AnswerLog, engine: Engine, meter: Meter, work: _Work
    ):
        self.job, self.answers, self.work = job, answers, work
        self.engine, self.meter = engine, meter
        self.progress = log.Progress(job.verb, total=meter.total)
        self.turn = 0  # documents begun
        meter.work = engine.reading_work

    def run(self) -> None:
        """Works through the input."""
        with self.progress:
            for line in self.job.shard.read_lines(self.job.input):
                if not self.answers.has_failed(line.number):
                    self._serve(line)

    def _serve(self, line: InputLine) -> None:
        """Answers the open questions of one line, or records why it failed.

        Whatever its way from the line to the answers raises is the document's own error. What
        concerns all of them is not: an output that cannot be written, a device that broke.
        """
        size_bytes, questions = _measure(self.job, line)
        open_questions = [i for i in range(questions) if not self.answers.has(line.number, i)]
        if questions and not open_questions:
            return
        self.turn += 1
        turn = _Turn(line, size_bytes, open_questions, len(open_questions))
        pieces = self._score(turn) if self.job.scores else self._answer(turn)
        while True:
            try:
                records = next(pieces, None)
            except Exception as error:
                if _ends_the_job(error):
                    raise
                begun = turn.tokens is not None
                self.meter.give_up(None if begun else size_bytes, turn.questions_left)
                self._fail(turn, error)
                return
            if records is None:
                return
            if records:
                self.answers.append(records)

    def _answer(self, turn: "_Turn") -> Iterator[list[dict[str, Any]]]:
        """Yields the records of each group of answers."""
        meter, engine, line = self.meter, self.engine, turn.line
        fields = _parse(self.job, line)
        turn.id = find_id(fields)
        document = build_document(
            fields, self.job.files, self.job.sampling, engine.max_document_bytes
        )
        encoded = engine.encode(document)
        turn.tokens = len(encoded.tokens)
        meter.begin_document(turn.size_bytes, turn.tokens)
        engine.prepare(encoded)
        meter.reading.start()
        state = engine.read(encoded, on_chunk=self._show_reading)
        meter.reading.add(0)
        # On a mesh a state has several slots, all with the same document.
        meter.cache_bytes = max(meter.cache_bytes, state.bytes() // len(state.lengths))
        failed: dict[int, str] = {}
        for group in encoded.groups(engine.options):
            open_questions = [i for i in group if i in turn.open_questions]
            if not open_questions:
                continue
            # The whole group is answered again even if a crash left some of its answers in the
            # file: answers of the same group come out the same to the last bit.
            meter.writing.start()
            given = engine.answer(encoded, state, group, on_tokens=self._show_writing)
            meter.writing.add(0)
            by_index = dict(zip(group, given, strict=True))
            yield [
                _record(line, document, encoded, i, by_index[i])
                for i in open_questions
                if not by_index[i].error
            ]
            failed |= {i: by_index[i].error for i in open_questions if by_index[i].error}
            meter.answered(len(open_questions), sum(a.answer_tokens for a in given))
            turn.questions_left -= len(open_questions)
            for answer in given:
                meter.wrote(answer.answer_tokens, answer.passes)
        if failed:
            numbers, reason = ", ".join(map(str, failed)), next(iter(failed.values()))
            raise NonFiniteError(f"no answer to question_index {numbers}: {reason}")

    def _score(self, turn: _Turn) -> Iterator[list[dict[str, Any]]]:
        """Yields the record of a text's score."""
        meter, engine, line = self.meter, self.engine, turn.line
        fields = _parse(self.job, line)
        turn.id = find_id(fields)
        text = build_text(fields, self.job.files, engine.max_document_bytes)
        tokens, first = engine.encode_text(text.text, text.context)
        turn.tokens = len(tokens)
        meter.begin_document(turn.size_bytes, turn.tokens)
        meter.reading.start()
        score = engine.score_text(tokens, first, on_chunk=self._show_reading)
        meter.reading.add(0)
        record = {
            "line": line.number,
            "id": text.id,
            "tokens": len(score.tokens),
            "bytes": score.bytes,
            "logprob": round(score.log_probability, 6),
            "perplexity": round(score.perplexity, 6),
            "bits_per_byte": round(score.bits_per_byte, 6),
            "greedy": score.greedy,
            "input": line.digest,
        } | ({"file": vars(text.file)} if text.file else {})
        if self.job.sampling.logprobs:
            record["logprobs"] = engine.describe_tokens(score.tokens, score.log_probabilities)
        yield [record]
        meter.answered(1, 0)

    def _fail(self, turn: "_Turn", error: Exception) -> None:
        failure = _describe_failure(turn, error)
        log.warning(
            f"{self.job.verb}: line {turn.line.number}: {log.printable(failure['message'])}"
        )
        line = turn.line
        record = {"line": line.number, "id": turn.id, "error": failure, "input": line.digest}
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
    } | ({"file": vars(document.file)} if document.file else {})
    optional = {
        "reasoning": answer.reasoning,
        "tool_calls": answer.tool_calls,
        "logprobs": answer.logprobs,
        "warning": answer.warning,
    }
    return record | {name: value for name, value in optional.items() if value}
