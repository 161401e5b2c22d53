"""The job with the real model in its smallest configuration."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from v4jax.cli import main
from v4jax.inference import (
    BatchJob,
    Document,
    Engine,
    EngineOptions,
    Question,
    SamplingOptions,
    run_batch,
)
from v4jax.inference.steps import prefill

GREEDY = SamplingOptions(max_new_tokens=8)
TEXT = "It was a dark and stormy night; the rain fell in torrents. " * 6
# One capacity, few shapes: compiling is most of the time here.
OPTIONS = EngineOptions(chunk_tokens=128, short_tokens=32, questions_at_once=2, max_tokens=512)

# Chunks change the order of float32 sums; logits have a standard deviation near 1.
CHUNK_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def engine():
    return Engine(v4jax.load("tiny", seed=1), OPTIONS)


def test_answers_are_what_the_whole_model_says(engine):
    questions = tuple(Question(text, GREEDY) for text in ("Who?", "What was the weather?"))
    encoded = engine.encode(Document(TEXT, questions))
    state = engine.read(encoded)
    assert state.lengths.tolist() == [len(encoded.tokens)]
    [group] = encoded.groups(engine.options)
    written: dict[int, list[str]] = {0: [], 1: []}
    answers = engine.answer(encoded, state, group, lambda i, piece: written[i].append(piece.text))
    for index, answer in enumerate(answers):
        assert "".join(written[index]) == answer.text
    assert answers == engine.answer(encoded, state, group), "the state serves again, unchanged"

    # In chunks (of a shape that is compiled), against the model reading everything at once.
    forks = state.take(jnp.array([0, 0]))
    logits_bv, cache = prefill(engine.model, encoded.question_tokens, forks, chunk_tokens=32)
    prompt = [*encoded.tokens, *encoded.question_tokens[0]]
    whole = engine.model(jnp.array([prompt]))[0, -1]
    np.testing.assert_allclose(logits_bv[0], whole, atol=CHUNK_TOLERANCE)
    assert cache.lengths[0] == len(prompt)


def test_an_interrupted_job_ends_the_same(engine, tmp_path):
    source, output = tmp_path / "docs.jsonl", tmp_path / "answers.jsonl"
    lines = [
        {"text": TEXT, "questions": ["Who?", "When?", "Where?"], "temperature": 0.9},
        {"text": "Short.", "question": "Why?"},
        {"text": "", "question": "Why?"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = BatchJob(str(source), str(output), {"model": "tiny"}, GREEDY)
    summary = run_batch(job, lambda: engine)
    assert (summary.documents, summary.failed, summary.questions) == (3, 1, 4)
    assert summary.cache_bytes > 0 and summary.read_tokens_per_second > 0
    data = output.read_bytes()
    for end in (len(data) - 10, data.index(b"\n") + 40):  # within a group of two, and elsewhere
        output.write_bytes(data[:end])
        run_batch(job, lambda: engine)
        assert output.read_bytes() == data


ONE = "--mesh=data=1"  # of the eight simulated devices


def test_generate_from_the_command_line(capsys):
    command = ["generate", "--model=tiny", "--prompt=Hello", "--max_new_tokens=4", ONE]
    assert main.run([*command, "--chunk_tokens=128", "--max_tokens=512"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "tiny has random weights" in err and "finish reason" in err
