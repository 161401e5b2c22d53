"""`v4jax batch`: long documents in, answers out."""

import json
from collections.abc import Mapping
from typing import Any

from v4jax.cli import model_flags

SUMMARY = "reads documents and answers questions about each"
USAGE = """
Reads every document of a JSONL file once, answers its questions from the state that reading left
behind, and appends the answers to another JSONL file. Killed at any moment and started again with
the same command, it continues. A document that fails becomes a line with the reason.

  v4jax batch --model=/models/v4-flash --input=docs.jsonl --output=answers.jsonl
  v4jax batch --model=nano --input=docs.jsonl --output=answers.jsonl --summary=summary.json

A line of the input: the text or a path to it, one question or several, and what differs from the
flags (temperature, top_p, top_k, seed, max_new_tokens):

  {"text": "It was a dark night …", "question": "What was the weather?"}
  {"id": "a7", "path": "reports/a7.txt", "questions": ["Who?", "When?"], "max_new_tokens": 64}

A line of the output, for an answer and for a document that failed:

  {"line": 2, "id": "a7", "question_index": 0, "question": "Who?", "answer": "…",
   "finish_reason": "stop", "tokens": {"document": 64000, "question": 9, "answer": 40}, …}
  {"line": 3, "id": null, "error": {"kind": "RequestError", "message": "…"}, …}

Several machines divide the input among themselves: with --shard=3/16 a process answers every 16th
line, beginning with the fourth, and writes answers-00003-of-00016.jsonl (a --summary is named
likewise). The files together are the whole output:

  v4jax batch --model=… --input=docs.jsonl --output=answers.jsonl --shard=auto/16
  cat answers-*-of-00016.jsonl > answers.jsonl

All files may be in buckets (gs://, s3://). There the answers are in answers.jsonl.parts/ while the
job runs, and answers.jsonl is made of them at its end. Of two jobs that write the same output the
one that began last goes on, and the other ends with an error.

  v4jax batch --model=gs://models/v4-flash --input=gs://texts/docs.jsonl --output=gs://texts/a.jsonl

Exit status: 0 when the job is finished, 1 when it is finished and every document failed.
"""


def define(flags: Any, values: Any) -> None:
    """Defines the flags."""
    model_flags.define_model_flags(flags, values)
    model_flags.define_sampling_flags(flags, values)
    flags.DEFINE_string("input", None, "JSONL file of documents. Required.", flag_values=values)
    flags.DEFINE_string(
        "output", None, "JSONL file that answers are appended to. Required.", flag_values=values
    )
    flags.DEFINE_boolean(
        "overwrite", False, "Begin anew instead of continuing the output.", flag_values=values
    )
    flags.DEFINE_string(
        "summary", None, "File for the summary as JSON, beside what is printed.", flag_values=values
    )
    flags.DEFINE_integer(
        "questions_at_once",
        4,
        "Questions of one document answered side by side, each with a copy of its cache.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "shard",
        None,
        "Which part of the input to answer: INDEX/COUNT, indices from 0. auto/COUNT takes the "
        "index from JOB_COMPLETION_INDEX (Kubernetes), SLURM_ARRAY_TASK_ID or SLURM_PROCID.",
        flag_values=values,
    )


def run(values: Any, positional: list[str]) -> int:
    """Runs the job and prints its summary."""
    from v4jax.errors import RequestError

    model_flags.require(values, "model", "input", "output")
    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}; files are named by flags")
    from v4jax.inference import BatchJob, Engine, EngineOptions, Shard, parse_shard, run_batch

    shard = parse_shard(values.shard) if values.shard else Shard()
    output = shard.name_file(values.output)
    summary_file = shard.name_file(values.summary) if values.summary else None
    _check_summary(summary_file, {"input": values.input, "output": output})
    _check_alone(values)

    options = EngineOptions(
        frame=model_flags.build_frame(values),
        chunk_tokens=values.chunk_tokens,
        questions_at_once=values.questions_at_once,
        max_tokens=values.max_tokens,
    )
    job = BatchJob(
        input=values.input,
        output=output,
        settings={
            "model": model_flags.identify_model(values),
            "numerics": values.numerics,
            "weights_seed": values.weights_seed,
            "frame": vars(options.frame),
            "chunk_tokens": options.chunk_tokens,
            "questions_at_once": options.questions_at_once,
            "max_tokens": options.max_tokens,
        },
        sampling=model_flags.build_sampling(values),
        overwrite=values.overwrite,
        shard=shard,
    )
    summary = run_batch(job, lambda: Engine(model_flags.load_model(values), options))
    print("\n".join(summary.lines()), flush=True)
    if summary_file:
        _write_summary(summary_file, summary.to_json())
    return 1 if summary.documents and summary.failed == summary.documents else 0


def _check_summary(summary: str | None, others: Mapping[str, str]) -> None:
    """Raises now, and not after hours of work, if the summary could not be written."""
    from v4jax.errors import RequestError
    from v4jax.files import is_same_file

    if not summary:
        return
    for name, path in others.items():
        if is_same_file(summary, path):
            raise RequestError(f"--summary and --{name} are the same file, {summary}")
    model_flags.check_writable("summary", summary)


def _check_alone(values: Any) -> None:
    """Raises if this is one of several processes and they would all do the same work.

    Hosts of one TPU slice cannot work apart; other processes can, each on its shard.
    """
    from v4jax.errors import RequestError, UnsupportedError
    from v4jax.parallel.hosts import find_hosts

    hosts = find_hosts()
    if hosts.count > 1 and hosts.environment.endswith("TPU"):
        raise UnsupportedError(
            f"{hosts}: batch runs on one host; take slices of one host, such as v6e-8, and give "
            "each its part of the input with --shard"
        )
    if hosts.count > 1 and not values.shard:
        raise RequestError(
            f"{hosts}: they would all answer the same documents; --shard=auto/{hosts.count} gives "
            "each its part"
        )


def _write_summary(path: str, content: dict[str, Any]) -> None:
    from v4jax.errors import V4JaxError
    from v4jax.files import to_path

    try:
        to_path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise V4JaxError(f"cannot write {path}: {error.strerror or error}") from error
