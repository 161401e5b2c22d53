"""What the processes of a job tell each other, so that all of them do the same.

Messages travel over the devices: every process has to call the same function at the same point of
the program. With one process nothing is sent.
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
_SMALLEST_BYTES = 1024  # of a message; each size compiles a program, so sizes are powers of two
_WAIT_SECONDS = 60.0  # for the others, after something went wrong here


def gather_json(value: Any) -> list[Any]:
    """Returns every process' value, in order of the processes; values are what JSON can express."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    rows = multihost_utils.process_allgather(_pad(text, int(sizes.max())))
    rows = np.reshape(rows, (sizes.size, -1))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def share_json(value: Any) -> Any:
    """Returns the value of process 0 on every process; those of the others are not looked at."""
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
    """Returns call() if it succeeded on every process; if not, raises on every process.

    Args:
      fails: which errors the others are told of; any other one ends this process at once, and JAX
        then ends the others.
      as_error: what is raised where the call succeeded on this process and not on another.
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
    """Returns what an error says; of one that is not ours, which may be long, the first line."""
    return str(error) if isinstance(error, V4JaxError) else str(error).partition("\n")[0]


def meet(layout: Layout | None) -> None:
    """Lets all groups of devices that collectives can name meet once, while the hosts are in step.

    On CPUs a group has 30 s to meet for the first time (gloo). Hosts that compile a large program
    for longer than others would miss that; later they wait for each other as long as it takes.
    """
    if layout is None or jax.process_count() == 1:
        return
    axes = [axis for axis, size in layout.mesh.shape.items() if size > 1]
    groups = [g for count in range(len(axes)) for g in itertools.combinations(axes, count + 1)]

    def run() -> jax.Array:
        # Of another value on each device: the sum of equal ones is known without a meeting.
        own = jax.lax.axis_index(axes).astype(jnp.float32)
        return functools.reduce(lambda x, group: own + jax.lax.psum(x, group), groups, own)[None]

    together = jax.shard_map(
        run, mesh=layout.mesh, in_specs=(), out_specs=P(tuple(axes)), check_vma=False
    )
    jax.block_until_ready(jax.jit(together)())


@contextlib.contextmanager
def _does_not_wait_forever(error: Exception | None) -> Iterator[None]:
    """Ends the process if others do not come to hear of an error.

    They may be in a program that waits for the devices of this process: then only its end frees
    them.
    """
    if error is None:
        yield
        return

    def end() -> None:
        log.warning(
            f"process {jax.process_index()} failed, and the others did not come to hear of it: "
            f"{_describe(error)}. It ends the job; start it again, and it continues"
        )
        os._exit(1)

    timer = threading.Timer(_WAIT_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
