"""A job killed with SIGKILL at any moment and started again gives the same output."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import folder_bucket
import pytest

from v4jax.inference import BatchJob, SamplingOptions, run_batch

from .fake_model import make_engine

WORKER = Path(__file__).with_name("batch_worker.py")
ROOT = Path(__file__).parents[2]


def write_input(path: Path) -> None:
    """Writes documents with one to five questions, some sampled, one of them broken."""
    lines = [
        {
            "id": f"d{i}",
            "text": f"Document {i}. " * (i + 1),
            "questions": [f"Question {j}?" for j in range(1 + i % 5)],
            "temperature": i % 2,
        }
        for i in range(10)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text + "{broken\n" + text)


def make_environment(tmp_path: Path) -> dict[str, str]:
    """Returns the environment of a worker, which compiles once and not at every start."""
    return os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    source, whole, output = (tmp_path / name for name in ("docs.jsonl", "whole", "answers"))
    write_input(source)
    options = SamplingOptions(max_new_tokens=10)
    run_batch(BatchJob(str(source), str(whole), {"model": "fake"}, options), make_engine)

    environment = make_environment(tmp_path)
    command = [sys.executable, str(WORKER), str(source), str(output), "0.01"]
    moments, sizes = random.Random(0), [0]
    for _ in range(5):
        worker = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        # Starting takes a while: the moment counts from the first new byte.
        deadline = time.monotonic() + 60
        while worker.poll() is None and time.monotonic() < deadline:
            if output.exists() and output.stat().st_size > sizes[-1]:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.6))
        worker.kill()
        worker.wait()
        sizes.append(output.stat().st_size)
        assert whole.read_bytes().startswith(output.read_bytes())
        if moments.random() < 0.5:  # as if the machine had stopped within a write
            torn = moments.randrange(1, 60)
            os.truncate(output, max(sizes[-1] - torn, 0))
            sizes[-1] = output.stat().st_size
    assert len(set(sizes)) > 3, "the moments were too early or too late to show anything"

    done = subprocess.run([*command[:-1], "0"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert output.read_bytes() == whole.read_bytes()
    keys = Counter(
        (r["line"], r.get("question_index")) for r in map(json.loads, output.open(encoding="utf-8"))
    )
    assert len(keys) == 2 * (1 + 2 + 3 + 4 + 5) * 2 + 1 and set(keys.values()) == {1}


@pytest.mark.slow
def test_killed_while_it_writes_to_a_bucket(tmp_path):
    """What was answered stays, and in the end the output is that of a job nobody disturbed."""
    source, whole, root = (tmp_path / name for name in ("docs.jsonl", "whole", "bucket"))
    write_input(source)
    options = SamplingOptions(max_new_tokens=10)
    run_batch(BatchJob(str(source), str(whole), {"model": "fake"}, options), make_engine)

    output, environment = "s3://bucket/answers.jsonl", make_environment(tmp_path)
    command = [sys.executable, str(WORKER), str(source), output, "0.01", str(root)]
    folder_bucket.install(root)
    try:
        moments, answered = random.Random(1), b""
        for _ in range(3):
            worker = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 60
            while worker.poll() is None and time.monotonic() < deadline:
                if len(read_parts(output)) > len(answered):
                    break
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.4))
            worker.kill()
            worker.wait()
            before, answered = answered, read_parts(output)
            assert answered.startswith(before) and whole.read_bytes().startswith(answered)
            assert len(answered) > len(before)
        assert answered != whole.read_bytes(), "the moments were too late to show anything"
        done = subprocess.run(
            [*command[:4], "0", str(root)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert folder_bucket.read(output) == whole.read_bytes()
        assert folder_bucket.names("s3://bucket") == ["answers.jsonl"]
    finally:
        folder_bucket.uninstall()


def read_parts(output: str) -> bytes:
    """Returns the answers of all parts."""
    names = folder_bucket.names(f"{output}.parts")
    parts = [folder_bucket.read(f"{output}.parts/{name}") for name in names]
    return b"".join(part for part in parts if not part.startswith(b'{"writer"'))
