"""`v4jax batch`, with the fake model."""

import dataclasses
import json
import signal

import pytest

from v4jax import log
from v4jax.cli import engine, main
from v4jax.config.inference import FrameConfig, InferenceConfig
from v4jax.config.run import MeshConfig


@pytest.fixture
def command(tmp_path, fake_model):
    (tmp_path / "docs.jsonl").write_text(
        '{"text": "A text.", "questions": ["Who?", "When?"]}\n{broken\n'
    )
    return [
        "batch",
        "--model=nano",
        "--chunk_tokens=64",
        "--max_new_tokens=5",
        f"--input={tmp_path}/docs.jsonl",
        f"--output={tmp_path}/answers.jsonl",
        f"--summary={tmp_path}/summary.json",
    ]


def test_answers_and_summary(command, tmp_path, capsys):
    assert main.run(command) == 0
    out, err = capsys.readouterr()
    assert "documents  2, of them failed 1\nquestions  2 answered\n" in out
    assert "warning: batch: line 2: the line is not JSON" in err
    assert "nano has random weights" in err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["documents"], summary["failed"], summary["questions"]) == (2, 1, 2)
    lines = (tmp_path / "answers.jsonl").read_text()
    assert main.run(command) == 0  # nothing left to do
    assert (tmp_path / "answers.jsonl").read_text() == lines


def test_other_flags_need_overwrite(command, capsys):
    assert main.run(command) == 0
    other = [*command, "--temperature=1"]
    assert main.run(other) == 2
    assert "another model or other settings" in capsys.readouterr().err
    assert main.run([*other, "--overwrite"]) == 0


def test_status_when_every_document_failed(command, tmp_path):
    (tmp_path / "docs.jsonl").write_text("{broken\n")
    assert main.run(command) == 1


SUMMARIES = {
    "no folder": ("none/summary.json", "name a file in a folder that exists"),
    "a folder": ("", "name a file in a folder that exists"),
    "the input": ("docs.jsonl", "--summary and --input are the same file"),
    "the output": ("answers.jsonl", "--summary and --output are the same file"),
}


@pytest.mark.parametrize("name, message", SUMMARIES.values(), ids=SUMMARIES.keys())
def test_bad_summary_is_found_before_the_work(command, tmp_path, capsys, name, message):
    assert main.run([*command, f"--summary={tmp_path}/{name}"]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, which a shell has ignored behind `nohup` and `&`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum, status, word", [(15, 143, "terminated"), (2, 130, "interrupted")])
def test_stopped_in_the_middle(command, tmp_path, capsys, fake_model, signum, status, word):
    extend, calls = fake_model.extend, []

    def stop_at_the_sixth(*arguments, **options):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signum)
        return extend(*arguments, **options)

    fake_model.extend = stop_at_the_sixth
    assert main.run(command) == status
    err = capsys.readouterr().err
    assert f"{tmp_path}/answers.jsonl holds 0 answers, and the same command continues" in err
    assert err.endswith(f"v4jax: {word}\n")
    assert main.run(command) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_empty_input_is_said(command, tmp_path, capsys):
    (tmp_path / "docs.jsonl").write_text("\n")
    assert main.run(command) == 0
    assert "docs.jsonl holds no documents" in capsys.readouterr().err


def test_shards_name_their_own_files(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    assert main.run([*command, "--shard=auto/2"]) == 0
    assert "documents  1, of them failed 0\nquestions  2 answered\n" in capsys.readouterr().out
    assert main.run([*command, "--shard=1/2"]) == 1  # its only line is broken
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "answers-00000-of-00002.jsonl",
        "answers-00001-of-00002.jsonl",
        "docs.jsonl",
        "summary-00000-of-00002.json",
        "summary-00001-of-00002.json",
    ]


HOSTS = {
    "TPU_WORKER_HOSTNAMES": "localhost,b",
    "TPU_WORKER_ID": "0",
    "MEGASCALE_NUM_SLICES": "",
    "MEGASCALE_SLICE_ID": "",
    "MEGASCALE_COORDINATOR_ADDRESS": "",
}
ARRAY = {"SLURM_ARRAY_TASK_ID": "1"}
TWO = {"V4JAX_COORDINATOR": "h:1", "V4JAX_PROCESS_INDEX": "1", "V4JAX_PROCESS_COUNT": "2"}
JOINED = {
    "processes": (TWO, []),
    "hosts of a slice": (HOSTS, []),
    "their part of the input": (HOSTS, ["--shard=0/2"]),
    "a task of an array": (TWO | ARRAY, ["--shard=auto/2"]),
}
APART = {
    "indexed": TWO | {"JOB_COMPLETION_INDEX": "0"},
    "tasks of a step": TWO | {"SLURM_PROCID": "0"},
}


class JoinedError(Exception):
    """Stands for the start of a job of several processes."""


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; a job that would join others raises JoinedError."""

    def start_hosts(hosts):
        if hosts.count > 1:
            raise JoinedError(str(hosts))
        return hosts

    monkeypatch.setattr("v4jax.parallel.hosts.start_hosts", start_hosts)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    return lambda variables: [monkeypatch.setenv(*pair) for pair in variables.items()]


@pytest.mark.parametrize("variables, given", JOINED.values(), ids=JOINED.keys())
def test_processes_that_serve_one_model(command, environment, tmp_path, variables, given):
    environment(variables)
    with pytest.raises(JoinedError, match="of 2"):
        main.run([*command, *given])
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


@pytest.mark.parametrize("variables", APART.values(), ids=APART.keys())
def test_processes_with_a_shard_each_are_jobs_of_their_own(
    command, environment, tmp_path, variables
):
    environment(variables)
    assert main.run([*command, "--shard=auto/2"]) == 0
    assert (tmp_path / "answers-00000-of-00002.jsonl").exists()


def test_hosts_of_a_slice_cannot_have_a_shard_each(command, environment, tmp_path, capsys):
    environment(HOSTS | {"JOB_COMPLETION_INDEX": "0"})
    assert main.run([*command, "--shard=auto/2"]) == 2
    assert (
        "process 0 of 2 (GkeTpu), coordinator localhost:8482: the hosts of a TPU slice serve one "
        "model, and --shard=auto/2 would give each another part of the input; name the part of the "
        "whole slice, as in --shard=3/16"
    ) in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["docs.jsonl"]


CHUNKS = {
    "all devices by default": (
        {},
        "expert=8, all 8 devices; --mesh names another, --mesh=data=1",
        8192,
    ),
    "few share a sequence": (
        dict(mesh=MeshConfig(data=4, expert=2)),
        "data=4,expert=2, all 8 devices\n",
        4096,
    ),
    "one device": (dict(mesh=MeshConfig()), "one device, as --mesh=data=1 says; 8 are", 4096),
    "as asked for": (dict(mesh=MeshConfig(context=8), chunk_tokens=256), "context=8, all", 256),
}


@pytest.mark.parametrize("given, said, chunk_tokens", CHUNKS.values(), ids=CHUNKS.keys())
def test_the_mesh_and_its_chunks(monkeypatch, capsys, fake_model, given, said, chunk_tokens):
    monkeypatch.setattr(log, "_said", set())
    config = InferenceConfig("nano", **given)
    mesh, options = engine.plan_engine(config)
    assert options.chunk_tokens == chunk_tokens
    assert capsys.readouterr().err == ""
    assert engine.load_model(config, mesh) is fake_model
    assert capsys.readouterr().err.startswith(f"mesh: {said}")
    # Trained weights are the same on every mesh, random ones are not.
    assert engine.identify_model(config, mesh) == "nano"
    random = dataclasses.replace(config, weights_seed=0)
    assert engine.identify_model(random, mesh) == ("nano on a mesh" if mesh else "nano")
    beside = dataclasses.replace(config, adapters="gs://x/adapters")
    assert engine.identify_model(beside, mesh) == "nano with gs://x/adapters"


def test_what_follows_from_the_model():
    """Numerics and the texts of efforts are chosen by the model's files; what is named stays."""
    thinking = FrameConfig(thinking=True)
    large = engine.complete(InferenceConfig("v4_flash_0731", frame=thinking))
    assert (large.numerics, large.frame.profile) == ("released", "0731")
    small = engine.complete(InferenceConfig("tiny", frame=thinking))
    assert (small.numerics, small.frame.profile) == ("float32", "preview")
    named = InferenceConfig("tiny", numerics="released", frame=FrameConfig(profile="0731"))
    assert engine.complete(named) == named


def test_a_job_continues_on_another_mesh(command, tmp_path):
    assert main.run([*command, "--mesh=data=1"]) == 0
    lines = (tmp_path / "answers.jsonl").read_text()
    assert main.run([*command, "--mesh=expert=8"]) == 0
    assert (tmp_path / "answers.jsonl").read_text() == lines
