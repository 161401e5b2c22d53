"""Documents in, answers out: what makes a service of a model, for one request after another.

Read `engine.py` first.

    request.py     Document, Question, SamplingOptions: what is asked, checked
    prompt.py      Frame: system message and mode; the prompt, split where a document ends
    engine.py      Engine: reads a document once, answers its questions from the state
    steps.py       the two loops around the model's call: prefill and decode
    sampling.py    the choice of the next token
    answer.py      from ids to an answer, piece by piece
    documents.py   the input of a job, line by line
    answer_log.py  the records of its output: which answers are there
    answer_output.py   the output on a disk or in a bucket: appended safely, continued after a crash
    shards.py      the part of the input that one of several processes answers
    document_files.py   the files that lines name: bounded, confined, identified
    scoring.py     log-probabilities of given tokens
    meter.py       tokens and seconds: rates, forecast, summary
    batch.py       the job
    hosts.py       one engine on several hosts: process 0 leads
"""

import importlib
from typing import Any

_HOMES = {
    "Answer": "answer",
    "BatchJob": "batch",
    "Document": "request",
    "Engine": "engine",
    "EngineOptions": "engine",
    "Frame": "prompt",
    "Question": "request",
    "SamplingOptions": "request",
    "Score": "scoring",
    "ScoreSummary": "meter",
    "Shard": "shards",
    "Summary": "meter",
    "parse_shard": "shards",
    "run_batch": "batch",
    "run_scores": "batch",
    "run_together": "hosts",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Imported when used: `--help` must not load JAX.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
