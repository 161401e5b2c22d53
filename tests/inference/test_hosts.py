"""Two processes serve one model: they stay in step whatever one of them sees, and equal one."""

import json
import time
from pathlib import Path

import pytest
from small_models import make_config, write_folder
from two_processes import run_two, start_two, wait

from v4jax.cli import batch, hosts, main
from v4jax.cli.hosts import HostFlags
from v4jax.config.inference import InferenceConfig
from v4jax.errors import ConfigError
from v4jax.inference import BatchJob, SamplingOptions, run_batch
from v4jax.parallel.hosts import Hosts

from .fake_model import make_engine

WORKER = Path(__file__).with_name("hosts_worker.py")
LINES = [
    {"id": "a", "text": "First text.", "questions": ["Who?", "When?", "Where?"]},
    {"id": "b", "path": "none.txt", "question": "Why?"},
    {"id": "c", "text": "Second text.", "question": "Why?", "temperature": 1.0},
    {"id": "d", "text": "Too long for process 1. " * 9, "questions": ["Why?", "How?"]},
    {"id": "e", "text": "Third text.", "question": "How?"},
]


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_a_job_continues_and_fails_what_fails_on_one(source):
    """Process 1 sees neither input nor output, and has no memory for the fourth document."""
    alone, output = source.with_name("alone.jsonl"), source.with_name("answers.jsonl")
    options = SamplingOptions(max_new_tokens=6)
    run_batch(BatchJob(str(source), str(alone), {"model": "fake"}, options), make_engine)
    expected = alone.read_text().splitlines(keepends=True)
    output.write_text(expected[0] + expected[1][:30])  # killed while it wrote
    ended = run_two([str(WORKER), str(source), str(output)], devices=1)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert [out.splitlines()[-1] for _, out, _ in ended] == ["[5, 2, 5, 1]"] * 2
    lines = output.read_text().splitlines(keepends=True)
    failed = json.loads(lines.pop(5))
    assert (failed["line"], failed["error"]["kind"]) == (4, "RequestError")
    assert failed["error"]["message"] == "process 1: RESOURCE_EXHAUSTED: Out of memory"
    assert lines == [line for line in expected if json.loads(line)["line"] != 4]
    assert sorted(path.name for path in source.parent.iterdir()) == [
        "alone.jsonl",
        "answers.jsonl",
        "docs.jsonl",
    ]


@pytest.mark.slow
def test_an_error_of_one_ends_both(source):
    """A share of the model that cannot be loaded; the message says on which process."""
    output = source.with_name("answers.jsonl")
    ended = run_two([str(WORKER), str(source), str(output), "-"], devices=1)
    assert [status for status, _, _ in ended] == [1, 1], ended
    reason = "process 1: tensor head is missing here"
    assert f"v4jax: error: {reason}\n" in ended[0][2]
    assert f"v4jax: error: process 0: {reason}\n" in ended[1][2]
    assert output.read_text() == ""


@pytest.mark.slow
def test_the_command_over_two_processes_equals_one(tmp_path):
    """Four devices each, `data` over both; an output cut off in a line, a missing document."""
    write_folder(tmp_path / "model", make_config("csa", mtp=True))  # drafts, on both
    lines = [
        {"text": "It was a dark and stormy night. " * 20, "questions": ["Who?", "Why?", "How?"]},
        {"path": "none.txt", "question": "Why?"},
        {"id": "c", "text": "Short.", "questions": ["Why?", "Where?"], "temperature": 0.9},
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [f"--model={tmp_path}/model", f"--input={tmp_path}/docs.jsonl", "--max_new_tokens=6"]
    given += ["--max_tokens=1024", "--chunk_tokens=512", "--questions_at_once=2"]
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main.run(["batch", *given, f"--output={one}", "--mesh=data=1"]) == 0
    whole = one.read_bytes()
    two.write_bytes(whole[: whole.index(b"\n") + 30])
    command = ["batch", *given, f"--output={two}", "--mesh=data=2,expert=2,context=2"]
    ended = run_two(["-m", "v4jax.cli.main", *command], devices=4)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert two.read_bytes() == whole
    (_, said, log), (_, others_said, others_log) = ended
    assert "documents  3, of them failed 1\nquestions  5 answered (1 before" in said
    assert "warning: batch: line 2: cannot read" in log
    # On stdout Gloo says whom it reaches, from several threads at once; no summary is there.
    assert "documents" not in others_said and "batch" not in others_log


@pytest.mark.slow
def test_a_signal_to_one_ends_both(tmp_path):
    """Process 0 says how to go on; the other does not wait for it."""
    source, output = tmp_path / "docs.jsonl", tmp_path / "answers.jsonl"
    lines = [{"text": f"Text {i}.", "questions": ["Who?", "Why?"]} for i in range(1000)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--model=nano", f"--input={source}", f"--output={output}", "--max_new_tokens=9"]
    command = [str(WORKER), "batch", *given, "--mesh=data=2", "--questions_at_once=2"]
    with start_two(command, devices=1) as workers:
        while not (output.exists() and output.stat().st_size):
            assert [worker.poll() for worker in workers] == [None, None]
            time.sleep(0.1)
        workers[0].terminate()
        (status, _, said), (other, _, _) = wait(workers)
    assert status == 143 and other != 0
    assert "answers, and the same command continues\nv4jax: terminated\n" in said


def test_flags_that_differ(monkeypatch):
    """Processes of one model with another part of the input each."""
    given = batch.Flags(
        config=InferenceConfig("nano"),
        input="docs.jsonl",
        output="answers.jsonl",
        shard="0/2",
        hosts=HostFlags(process_count=2),
    )
    monkeypatch.setattr(hosts, "start_hosts", lambda flags: Hosts("explicit", 0, 2, "h:1"))
    monkeypatch.setattr(
        "v4jax.parallel.agreement.gather_json", lambda said: [said, said | {"shard": "1/2"}]
    )
    with pytest.raises(ConfigError) as error:
        hosts.start_serving(given)
    assert str(error.value) == (
        "--shard is '0/2' for process 0 and '1/2' for process 1, which are to serve one model; "
        "give all of them the same flags. Separate jobs, each with its part of the input, take "
        "--shard=auto/COUNT"
    )
