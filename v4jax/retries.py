"""Calls that are made again when a network or a disk failed for a moment."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from v4jax import log

Result = TypeVar("Result")
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt
_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "EBUSY", "ESTALE", "EREMOTEIO", "EPIPE", "ETIMEDOUT"),
        *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "ENOTCONN", "ENETDOWN", "ENETUNREACH"),
        *("ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
)
_LASTING = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)


def is_passing(error: OSError) -> bool:
    """Whether the same call may succeed a little later.

    What a cloud's library raised has no number (`v4jax.files`); it counts as passing unless its
    type says otherwise.
    """
    if isinstance(error, (*_LASTING, NotADirectoryError)):
        return False
    return error.errno is None or error.errno in _PASSING


def retry(call: Callable[[], Result], what: str) -> Result:
    """Returns call(), tried again after 1, 2, 4 and 8 seconds while errors are passing ones.

    Args:
      call: may be made twice without harm.
      what: names the attempt in the log, such as `read gs://texts/a.txt`.

    Raises:
      OSError: that of the last attempt, or one that lasts.
    """
    for seconds in WAITS:
        try:
            return call()
        except OSError as error:
            if not is_passing(error):
                raise
            reason = error.strerror or error
            log.warning(f"could not {what}: {reason}; trying again in {seconds:.0f} s")
            time.sleep(seconds)
    return call()
