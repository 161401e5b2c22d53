"""Messages between the processes of a job, by which all of them do the same.

Messages travel over the devices. Every process has to call the same function at the same point of
the program. One process sends nothing.
"""

import contextlib
import functools
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from v4jax import log
from v4jax.errors import V4JaxError
from v4jax.parallel.layout import Layout

Result = TypeVar("Result")
_SMALLEST_BYTES = 1024  # smallest message; each size compiles a program: sizes are powers of two
_WAIT_SECONDS = 60.0  # time for the other processes to hear of an error


def gather_json(value: Any) -> list[Any]:
    """Returns the values of all processes in their order. A value is what JSON can express."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    rows = multihost_utils.process_allgather(_pad(text, int(sizes.max())))
    rows = np.reshape(rows, (sizes.size, -1))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def share_json(value: Any) -> Any:
    """Returns the value of process 0 on every process; the others' values are ignored."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    first = jax.process_index() == 0
    text = np.frombuffer(json.dumps(value).encode() if first else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    return json.loads(multihost_utils.broadcast_one_to_all(_pad(text, size))[:size].tobytes())


def _pad(text: np.ndarray, size: int) -> np.ndarray:
    return np.pad(text, (0, max(_SMALLEST_BYTES, 1 << (size - 1).bit_length()) - text.size))


def on_all(
    call: Callable[[], Result],
    *,
    fails: Callable[[Exception], bool] = lambda error: isinstance(error, V4JaxError),
    as_error: type[V4JaxError] = V4JaxError,
) -> Result:
    """Returns call() if it succeeds on every process; otherwise raises on every process.

    Args:
      fails: says which errors are told to the others. Any other error ends this process at once,
        and JAX then ends the others.
      as_error: the error to raise here when the call succeeded here and failed on another process.
    """
    if jax.process_count() == 1:
        return call()
    error = result = None
    try:
        result = call()
    except Exception as caught:
        if not fails(caught):
            raise
        error = caught
    with _does_not_wait_forever(error):
        reasons = gather_json(None if error is None else _describe(error))
    if error is not None:
        raise error
    for process, reason in enumerate(reasons):
        if reason is not None:
            raise as_error(f"process {process}: {reason}")
    return result


def _describe(error: Exception) -> str:
    """Returns the text of our own error; the first line of another, which may be long."""
    return str(error) if isinstance(error, V4JaxError) else str(error).partition("\n")[0]


def warm_up_collectives(layout: Layout | None) -> None:
    """Runs one collective over every combination of mesh axes, while the hosts are in step.

    On CPUs the members of a group must connect within 30 s of the first call (Gloo). Hosts that
    compile a large program for longer than others would miss that. Once connected, they wait for
    each other as long as it takes.
    """
    if layout is None or jax.process_count() == 1:
        return
    axes = [axis for axis, size in layout.mesh.shape.items() if size > 1]
    groups = [g for count in range(len(axes)) for g in itertools.combinations(axes, count + 1)]

    def run() -> jax.Array:
        # The value differs on each device: XLA computes a sum of equal values without messages.
        own = jax.lax.axis_index(axes).astype(jnp.float32)
        return functools.reduce(lambda x, group: own + jax.lax.psum(x, group), groups, own)[None]

    together = jax.shard_map(
        run, mesh=layout.mesh, in_specs=(), out_specs=P(tuple(axes)), check_vma=False
    )
    jax.block_until_ready(jax.jit(together)())


@contextlib.contextmanager
def _does_not_wait_forever(error: Exception | None) -> Iterator[None]:
    """Ends this process if the others do not come to hear of its error.

    They may be inside a program that waits for the devices of this process. Then only its end
    frees them.
    """
    if error is None:
        yield
        return

    def end() -> None:
        log.warning(
            f"process {jax.process_index()} failed, and the others did not come to hear of it: "
            f"{_describe(error)}. This ends the job; start it again, and it continues"
        )
        os._exit(1)

    timer = threading.Timer(_WAIT_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
