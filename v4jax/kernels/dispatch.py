"""Which implementation of an operation runs: the only place that looks at the platform.

An operation offers its implementations in order of preference, each with a check that returns None
or the reason why it cannot run on these arguments. `"auto"` takes the first that can and says so
once, with the reason where one of this platform cannot; an implementation asked for by name runs
or raises with the reason.

    with dispatch.compiling_for("tpu"):  # ahead of time, on a machine without one
        compiled = jax.jit(step).lower(...).compile()
    with dispatch.using(indexer="reference"):  # for comparison
        selected = indexer.select(...)

The choice is made while a program is traced: what `jax.jit` has compiled before stays as it is.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping

import jax

from v4jax import log
from v4jax.errors import UnsupportedError

Check = Callable[[], str | None]

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)
_device: contextvars.ContextVar[str] = contextvars.ContextVar("device", default="")
_requested: contextvars.ContextVar[Mapping[str, str] | None] = contextvars.ContextVar(
    "requested", default=None
)


def platform() -> str:
    """Returns the platform that the traced program will run on: cpu, gpu or tpu."""
    return _platform.get() or jax.default_backend()


def device_kind() -> str:
    """Returns the kind of device that the traced program will run on, such as "TPU v6 lite".

    Empty while compiling for a platform without saying for which of its devices.
    """
    return _device.get() if _platform.get() else jax.devices()[0].device_kind


@contextlib.contextmanager
def compiling_for(name: str, device: str = "") -> Iterator[None]:
    """Makes `platform()` return `name`: programs traced inside are for another machine.

    Args:
      device: what `device_kind()` returns meanwhile.
    """
    tokens = _platform.set(name), _device.set(device)
    try:
        yield
    finally:
        _platform.reset(tokens[0])
        _device.reset(tokens[1])


@contextlib.contextmanager
def using(**implementations: str) -> Iterator[None]:
    """Asks for implementations by operation name; they run or raise."""
    token = _requested.set({**(_requested.get() or {}), **implementations})
    try:
        yield
    finally:
        _requested.reset(token)


def needs_platform(name: str) -> str | None:
    """Returns why an implementation for platform `name` cannot run here, or None."""
    here = platform()
    return None if here == name else f"it needs a {name}, this program is for {here}"


def choose(operation: str, checks: Mapping[str, Check]) -> str:
    """Returns the name of the implementation to run.

    Args:
      operation: for `using` and for messages.
      checks: implementation name → check, in order of preference.

    Raises:
      UnsupportedError: the one asked for is unknown or cannot run; the message has the reason.
    """
    wanted = (_requested.get() or {}).get(operation, "auto")
    if wanted != "auto":
        if wanted not in checks:
            raise UnsupportedError(
                f"{operation} has no implementation {wanted!r}; it has {list(checks)} and 'auto'"
            )
        reason = checks[wanted]()
        if reason is not None:
            raise UnsupportedError(f"{operation}={wanted} cannot run: {reason}; use 'auto'")
        return wanted
    refused = ""
    for name, check in checks.items():
        reason = check()
        if reason is None:
            log.once(f"kernels: {operation}={name} on {platform()}{refused}")
            return name
        # Names end in their platform: that those of others do not run goes without saying.
        if name.endswith(platform()):
            refused += f"; not {name}: {reason}"
    raise UnsupportedError(f"{operation} has no implementation for these arguments")
