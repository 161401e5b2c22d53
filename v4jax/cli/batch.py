"""`v4jax batch`: long documents in, answers out."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from v4jax.cli import host_flags, model_flags

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

All devices serve one model, on --mesh. On a slice of several hosts every host runs the same
command; the first reads the input and writes the output, all read the model:

  v4jax batch --model=/models/v4-pro --mesh=expert=32,tensor=2 --input=docs.jsonl --output=…

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
    host_flags.define_host_flags(flags, values)


def run(values: Any, positional: list[str]) -> int:
    """Runs the job and prints its summary."""
    from v4jax.errors import RequestError

    model_flags.require(values, "model", "input", "output")
    if positional:
        raise RequestError(f"unexpected argument {positional[0]!r}; files are named by flags")
    from v4jax.inference import BatchJob, Shard, Summary, parse_shard, run_batch, run_together

    shard = parse_shard(values.shard) if values.shard else Shard()
    output = shard.name_file(values.output)
    summary_file = shard.name_file(values.summary) if values.summary else None
    sampling = model_flags.build_sampling(values)
    _join(values)
    mesh, options = model_flags.plan_engine(values, values.questions_at_once)
    job = BatchJob(
        input=values.input,
        output=output,
        settings={
            # A mesh, and the chunks it brings by default, change no more than the last bits: a job
            # may continue on another.
            "model": model_flags.identify_model(values, mesh),
            "numerics": values.numerics,
            "weights_seed": values.weights_seed,
            "frame": vars(options.frame),
            "chunk_tokens": values.chunk_tokens or model_flags.CHUNK_TOKENS,
            "questions_at_once": options.questions_at_once,
            "max_tokens": options.max_tokens,
        },
        sampling=sampling,
        overwrite=values.overwrite,
        shard=shard,
    )

    def work(load_engine: Callable[[], Any]) -> dict[str, Any]:
        _check_summary(summary_file, {"input": values.input, "output": output})
        summary = run_batch(job, load_engine)
        print("\n".join(summary.lines()), flush=True)
        if summary_file:
            _write_summary(summary_file, summary.to_json())
        return summary.to_json()

    summary = Summary(**run_together(lambda: model_flags.load_engine(values, mesh, options), work))
    return 1 if summary.documents and summary.failed == summary.documents else 0


def _join(values: Any) -> None:
    """Joins the other processes of the job to one model, unless each is a job of its own.

    It is where --shard takes an index that differs from process to process. One that is spelled
    out, or that of a Slurm array, is a part of the input for all of them together.
    """
    from v4jax.errors import UnsupportedError
    from v4jax.parallel import hosts

    found = host_flags.find_hosts(values)
    by_process = hosts.find_index_variable() != hosts.ARRAY_VARIABLE
    if found.count == 1 or not ((values.shard or "").startswith("auto") and by_process):
        host_flags.start_serving(values)
    elif found.environment.endswith("Tpu"):
        raise UnsupportedError(
            f"{found}: the hosts of a TPU slice serve one model, and --shard={values.shard} would "
            "give each another part of the input; name the part of the whole slice, as in "
            "--shard=3/16"
        )


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


def _write_summary(path: str, content: dict[str, Any]) -> None:
    from v4jax.errors import V4JaxError
    from v4jax.files import to_path

    try:
        to_path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise V4JaxError(f"cannot write {path}: {error.strerror or error}") from error
