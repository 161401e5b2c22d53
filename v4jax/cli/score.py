"""`v4jax score`: the log-probability and perplexity of given texts."""

import dataclasses

from v4jax.cli.batch import carry_out, check_work, join
from v4jax.cli.hosts import HostFlags
from v4jax.config.inference import InferenceConfig

SUMMARY = "log-probabilities and perplexity of texts"
USAGE = """
Reads every text of a JSONL file and appends its log-probability under the model to another JSONL
file. It continues, fails and divides its input as v4jax batch does. A text begins a document: it
follows BOS, and no turn of a conversation. With a context, the text that follows it is scored.

  v4jax score --model=/models/v4-flash --input=texts.jsonl --output=scores.jsonl
  v4jax score --model=nano --input=texts.jsonl --output=scores.jsonl --logprobs

Lines of the input:

  {"text": "It was a dark night …"}
  {"id": "a7", "path": "reports/a7.txt"}
  {"id": "q1-A", "context": "The capital of France is", "text": " Paris"}

Lines of the output, for a text and for one that failed. logprob is the natural logarithm, in all;
perplexity is that of a token; greedy says whether greedy decoding would have written the text.
With --logprobs, logprobs has each token:

  {"line": 3, "id": "q1-A", "tokens": 1, "bytes": 6, "logprob": -0.11, "perplexity": 1.12,
   "bits_per_byte": 0.03, "greedy": true, "input": "…", "job": "…"}
  {"line": 4, "id": null, "error": {"kind": "RequestError", "message": "…"}, …}

The summary counts all tokens of all texts alike.

Exit status: 0 the job is finished, 1 it is finished and every text failed, 2 an error.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """What `v4jax score` is told.

    Attributes:
      input: JSONL file of texts. Required.
      output: JSONL file that scores are appended to. Required.
      logprobs: Write the log-probability of every token too.
      overwrite: Start again instead of continuing the output.
      retry_failed: Try texts again that failed before; their error lines are taken out of the
        output.
      documents_under: Folder that every text's path must lead into, links followed. Without it a
        line can name any file that this user can read.
      summary: File for the summary as JSON, which is also printed as text.
      shard: Which part of the input to score: INDEX/COUNT, indices from 0. auto/COUNT takes the
        index from JOB_COMPLETION_INDEX (Kubernetes), SLURM_ARRAY_TASK_ID or SLURM_PROCID.
    """

    config: InferenceConfig = dataclasses.field(
        metadata={"without": ("sampling", "frame", "questions_at_once", "speculate")}
    )
    input: str
    output: str
    logprobs: bool = False
    overwrite: bool = False
    retry_failed: bool = False
    documents_under: str | None = None
    summary: str | None = None
    shard: str | None = None
    hosts: HostFlags


def run(flags: Flags) -> int:
    """Runs the job and prints its summary."""
    from v4jax.cli import engine
    from v4jax.inference import (
        BatchJob,
        SamplingOptions,
        ScoreSummary,
        Shard,
        parse_shard,
        run_scores,
    )

    check_work(flags)
    shard = parse_shard(flags.shard) if flags.shard else Shard()
    output = shard.name_file(flags.output)
    summary_file = shard.name_file(flags.summary) if flags.summary else None
    join(flags)
    config = engine.complete(dataclasses.replace(flags.config, speculate="off"))
    mesh, options = engine.plan_engine(config, asks=False)
    job = BatchJob(
        input=flags.input,
        output=output,
        settings={
            "verb": "score",
            "model": engine.identify_model(config, mesh),
            "numerics": config.numerics,
            "weights_seed": config.weights_seed,
            "max_tokens": options.max_tokens,
        },
        sampling=SamplingOptions(logprobs=flags.logprobs),
        overwrite=flags.overwrite,
        retry_failed=flags.retry_failed,
        documents_under=flags.documents_under,
        shard=shard,
        scores=True,
    )

    return carry_out(
        job,
        run_scores,
        ScoreSummary,
        summary_file,
        lambda: engine.load_engine(config, mesh, options),
    )
