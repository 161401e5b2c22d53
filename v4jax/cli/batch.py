"""`v4jax batch`: long documents in, answers out."""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from v4jax.cli import outputs
from v4jax.cli.hosts import HostFlags, find_hosts, start_serving
from v4jax.config.inference import InferenceConfig
from v4jax.errors import RequestError, UnsupportedError
from v4jax.files import is_remote

SUMMARY = "reads documents and answers questions about each"
USAGE = """
Reads every document of a JSONL file once, answers its questions from the state after reading, and
appends the answers to another JSONL file. If it is killed, at any moment, the same command
continues. A document that fails becomes a line with the reason; --retry_failed tries it again.

  v4jax batch --model=/models/v4-flash --input=docs.jsonl --output=answers.jsonl
  v4jax batch --model=nano --input=docs.jsonl --output=answers.jsonl --summary=summary.json

A line of the input has the text or a path to it, one question or several, and optionally values
that replace flags (temperature, top_p, top_k, seed, max_new_tokens, logprobs):

  {"text": "It was a dark night …", "question": "What was the weather?"}
  {"id": "a7", "path": "reports/a7.txt", "questions": ["Who?", "When?"], "max_new_tokens": 64}

Lines of the output, for an answer and for a document that failed:

  {"line": 2, "id": "a7", "question_index": 0, "question": "Who?", "answer": "…",
   "finish_reason": "stop", "tokens": {"document": 64000, "question": 9, "answer": 40}, …}
  {"line": 3, "id": null, "error": {"kind": "RequestError", "message": "…"}, …}

All devices serve one model, on --mesh. On a slice of several hosts, every host runs the same
command. The first host reads the input and writes the output; all hosts read the model:

  v4jax batch --model=/models/v4-pro --mesh=expert=32,tensor=2 --input=docs.jsonl --output=…

Several machines can divide the input. With --shard=3/16 a process answers every 16th line,
beginning with the fourth, and writes answers-00003-of-00016.jsonl (and likewise the --summary). The
files together are the whole output:

  v4jax batch --model=… --input=docs.jsonl --output=answers.jsonl --shard=auto/16
  cat answers-*-of-00016.jsonl > answers.jsonl

All files may be in buckets (gs://, s3://). There the answers are in answers.jsonl.parts/ while the
job runs, and become answers.jsonl at its end. If two jobs write the same output, the one that began
last goes on, and the other ends with an error.

  v4jax batch --model=gs://models/v4-flash --input=gs://texts/docs.jsonl --output=gs://texts/a.jsonl

Exit status: 0 the job is finished, 1 it is finished and every document failed, 2 an error.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What `v4jax batch` is told.

    Attributes:
      input: JSONL file of documents. Required.
      output: JSONL file that answers are appended to. Required.
      overwrite: Start again instead of continuing the output.
      retry_failed: Try documents again that failed before; their error lines are taken out of the
        output.
      documents_under: Folder that every document's path must lead into, links followed. Without it
        a line can name any file that this user can read.
      summary: File for the summary as JSON, which is also printed as text.
      shard: Which part of the input to answer: INDEX/COUNT, indices from 0. auto/COUNT takes the
        index from JOB_COMPLETION_INDEX (Kubernetes), SLURM_ARRAY_TASK_ID or SLURM_PROCID.
    """

    config: InferenceConfig
    input: str
    output: str
    overwrite: bool = False
    retry_failed: bool = False
    documents_under: str | None = None
    summary: str | None = None
    shard: str | None = None
    hosts: HostFlags


def run(flags: Flags) -> int:
    """Runs the job and prints its summary."""
    from v4jax.cli import engine
    from v4jax.inference import BatchJob, Shard, Summary, parse_shard, run_batch

    check_work(flags)
    shard = parse_shard(flags.shard) if flags.shard else Shard()
    output = shard.name_file(flags.output)
    summary_file = shard.name_file(flags.summary) if flags.summary else None
    sampling = engine.build_sampling(flags.config)
    join(flags)
    config = engine.complete(flags.config)
    mesh, options = engine.plan_engine(config)
    job = BatchJob(
        input=flags.input,
        output=output,
        settings={
            # A mesh, and the chunks it brings by default, change no more than the last bits: a job
            # may continue on another.
            "model": engine.identify_model(config, mesh),
            "numerics": config.numerics,
            "weights_seed": config.weights_seed,
            "frame": vars(options.frame),
            "chunk_tokens": config.chunk_tokens or engine.CHUNK_TOKENS,
            "questions_at_once": options.questions_at_once,
            "max_tokens": options.max_tokens,
            # Drafts leave greedy answers as they are, and draw sampled ones with other numbers.
            **({"speculate": config.speculate} if sampling.temperature else {}),
        },
        sampling=sampling,
        overwrite=flags.overwrite,
        retry_failed=flags.retry_failed,
        documents_under=flags.documents_under,
        shard=shard,
    )

    return carry_out(
        job, run_batch, Summary, summary_file, lambda: engine.load_engine(config, mesh, options)
    )


def carry_out(
    job: Any, run: Callable, kind: type, summary_file: str, load_engine: Callable[[], Any]
) -> int:
    """Runs a job on all hosts, prints and writes its summary; returns the exit status.

    Args:
      run: (job, load_engine) → summary.
      kind: the class of summaries.
      summary_file: empty: it is printed only.
    """
    from v4jax.inference import run_together

    def work(load_engine: Callable[[], Any]) -> dict[str, Any]:
        outputs.check_apart(summary=summary_file, input=job.input, output=job.output)
        if summary_file:
            outputs.check_writable("summary", summary_file)
        summary = run(job, load_engine)
        print("\n".join(summary.lines()), flush=True)
        if summary_file:
            outputs.write(summary_file, json.dumps(summary.to_json(), indent=2) + "\n")
        return summary.to_json()

    summary = kind(**run_together(load_engine, work))
    return 1 if summary.documents and summary.failed == summary.documents else 0


def check_work(flags: Any) -> None:
    """Raises RequestError where flags of a job contradict each other or name no folder."""
    if flags.overwrite and flags.retry_failed:
        raise RequestError(
            "--overwrite answers everything anew, failed or not: leave out "
            "--retry_failed, or --overwrite to keep the answers"
        )
    under = flags.documents_under
    if under is not None and not (is_remote(under) or os.path.isdir(under)):
        raise RequestError(f"--documents_under must be a folder or a bucket's, got {under!r}")


def join(flags: Any) -> None:
    """Joins the other processes of the job to one model, unless each is a job of its own.

    It is where --shard takes an index that differs from process to process. One that is spelled
    out, or that of a Slurm array, is a part of the input for all of them together.
    """
    from v4jax.parallel import hosts

    found = find_hosts(flags.hosts)
    by_process = hosts.find_index_variable() != hosts.ARRAY_VARIABLE
    if found.count == 1 or not ((flags.shard or "").startswith("auto") and by_process):
        start_serving(flags)
    elif found.environment.endswith("Tpu"):
        raise UnsupportedError(
            f"{found}: the hosts of a TPU slice serve one model, and --shard={flags.shard} would "
            "give each another part of the input; name the part of the whole slice, as in "
            "--shard=3/16"
        )
