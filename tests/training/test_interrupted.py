"""`v4jax train` ended from outside, again and again: the end is that of the uninterrupted run.

V4JAX_KILLS=20 pytest tests/training/test_interrupted.py
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from v4jax.training.metrics import read_metrics

from . import small_run
from .test_trainer import lines_of

ROOT = pathlib.Path(__file__).parents[2]
KILLS = int(os.environ.get("V4JAX_KILLS", 2))
STEPS = 8 * KILLS  # room for what every start makes before it is killed


def start(output: str) -> subprocess.Popen:
    """Starts the run in the working folder; what was compiled once is read from `cache`."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": os.path.abspath("cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    flags = [f"--config={small_run.__file__}", f"--output={output}", f"--set=steps={STEPS}"]
    with open(f"{output}.log", "a") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "v4jax.cli.main", "train", *flags],
            env=environment,
            stdout=said,
            stderr=said,
        )


def count_steps(output: str) -> int:
    """Returns the last step that is logged."""
    path = pathlib.Path(output) / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return lines[-1]["step"] if lines else 0


def wait_for(output: str, worker: subprocess.Popen, step: int) -> bool:
    """Waits until a step is logged; False where the process ended before."""
    while count_steps(output) < step:
        if worker.poll() is not None:
            return False
        time.sleep(0.02)
    return True


@pytest.mark.slow
def test_ended_at_random_moments(tmp_path, monkeypatch):
    """kill -9, and in the end SIGTERM: every byte of the model and every line as uninterrupted."""
    monkeypatch.chdir(tmp_path)
    small_run.write_text(tmp_path)
    assert start("whole").wait() == 0, pathlib.Path("whole.log").read_text()
    chance, kills = random.Random(KILLS), 0
    while kills < KILLS:
        begun = count_steps("run")
        worker = start("run")
        # Anywhere: before the model is read, while a step is made, while a checkpoint is written.
        seen = wait_for("run", worker, min(begun + chance.randrange(-1, 4), STEPS - 2))
        time.sleep(chance.uniform(0.0, 0.7))
        assert seen and worker.poll() is None, pathlib.Path("run.log").read_text()
        worker.kill()
        worker.wait()
        kills += 1
    compiled = pathlib.Path("run.log").read_text().count("train: compiled")
    worker = start("run")
    # From then on the run listens: before, the signal ends the process at once, as a kill does.
    while pathlib.Path("run.log").read_text().count("train: compiled") == compiled:
        assert worker.poll() is None, pathlib.Path("run.log").read_text()
        time.sleep(0.02)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait() in (143, 0), pathlib.Path("run.log").read_text()
    said = pathlib.Path("run.log").read_text()
    if worker.returncode == 143:
        assert "with a checkpoint; the same command goes on" in said
        assert start("run").wait() == 0, pathlib.Path("run.log").read_text()
    assert lines_of("run") == lines_of("whole")
    assert read_state("run") == read_state("whole")
    assert read_model("run") == read_model("whole")


def read_model(output: str) -> dict[str, bytes]:
    """Returns the files of the finished model."""
    folder = pathlib.Path(output) / "model"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_state(output: str) -> dict:
    """Returns the last checkpoint: arrays as bytes, position in the data."""
    import orbax.checkpoint as ocp

    folder = (pathlib.Path(output) / "checkpoints" / str(STEPS)).absolute()
    arrays = ocp.PyTreeCheckpointer().restore(folder / "state")
    (extra,) = (folder / "extra").glob("*metadata")
    return {name: array.tobytes() for name, array in arrays.items()} | {"extra": extra.read_text()}
