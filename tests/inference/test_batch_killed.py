"""A job killed with SIGKILL at any moment and started again gives the same file."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

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


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    source, whole, output = (tmp_path / name for name in ("docs.jsonl", "whole", "answers"))
    write_input(source)
    options = SamplingOptions(max_new_tokens=10)
    run_batch(BatchJob(str(source), str(whole), {"model": "fake"}, options), make_engine)

    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),  # compile once, not at every start
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
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
