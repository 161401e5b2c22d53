"""A command run by two processes of one job on this machine."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent


@contextlib.contextmanager
def start_two(command: Sequence[str], devices: int) -> Iterator[list[subprocess.Popen]]:
    """Starts Python with these arguments twice; each process has `devices` of its own."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
        "V4JAX_COORDINATOR": f"localhost:{port}",
        "V4JAX_PROCESS_COUNT": "2",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment | {"V4JAX_PROCESS_INDEX": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()


def wait(workers: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Returns (status, stdout, stderr) of each process when all have ended."""
    said = [worker.communicate(timeout=900) for worker in workers]
    return [(worker.returncode, *text) for worker, text in zip(workers, said, strict=True)]


def run_two(command: Sequence[str], devices: int) -> list[tuple[int, str, str]]:
    """Returns (status, stdout, stderr) of the two."""
    with start_two(command, devices) as workers:
        return wait(workers)
