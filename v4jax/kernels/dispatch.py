"""Which implementation of an operation runs: the only place that looks at platforms.

A `Target` says for which devices a program is made; every operation takes one. A model carries it
(`model.target`), and its layers find it in the `Context` of a call. An implementation is a module
of its operation's room. `portable` runs everywhere; a name that ends in a platform runs there, if
the module's `supported` finds no reason against it.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TypeVar

import jax

from v4jax import log
from v4jax.errors import UnsupportedError

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a program is made for, and implementations that are asked for by name.

    platform: cpu, gpu or tpu.
    device_kind: such as "TPU v6 lite"; empty for any device of the platform.
    implementations: pairs of operation and implementation, which run or raise.
    interpret: whether Pallas kernels are interpreted, as tests do on a machine without a TPU.
    """

    platform: str
    device_kind: str = ""
    implementations: tuple[tuple[str, str], ...] = ()
    interpret: bool = False

    @classmethod
    def here(cls) -> "Target":
        """Returns the target of the devices that JAX finds."""
        return cls(jax.default_backend(), jax.devices()[0].device_kind)

    def using(self, **implementations: str) -> "Target":
        """Returns this target with implementations asked for, by operation."""
        asked = dict(self.implementations) | implementations
        return dataclasses.replace(self, implementations=tuple(sorted(asked.items())))

    def sized(self, size: Value, *, gpu: Value) -> Value:
        """Returns how much a portable implementation takes at once.

        A CPU is fastest with what its caches hold; a GPU takes more, as each step costs.
        """
        return gpu if self.platform == "gpu" else size

    @property
    def multiplies_bfloat16(self) -> bool:
        """Whether products of bfloat16 are faster than those of float32."""
        return self.platform != "cpu"

    @property
    def multiplies_float32_slowly(self) -> bool:
        """Whether a float32 product is better made of several bfloat16 products."""
        return self.platform == "gpu"

    @property
    def waits_for_host(self) -> bool:
        """Whether loops of unknown length and choices between branches wait for the host."""
        return self.platform == "gpu"

    @property
    def sorts_in_parallel(self) -> bool:
        """Whether sorting a row uses the whole device."""
        return self.platform == "gpu"


def pick(
    target: Target,
    operation: str,
    room: str,
    *arguments,
    names: Sequence[str] = ("pallas_tpu", "portable"),
) -> ModuleType:
    """Returns the implementation to run: a module.

    Without a request it is the first that can run. The log says so once, with the reason where
    another one of this platform cannot.

    Args:
      operation: its name in `Target.implementations` and in messages.
      room: the package that holds the implementations.
      arguments: of `supported`, which returns None or why a module cannot run on them.
      names: modules of the room in order of preference.

    Raises:
      UnsupportedError: the one asked for is unknown or cannot run; the message has the reason.
    """
    wanted = dict(target.implementations).get(operation, "auto")
    if wanted != "auto":
        if wanted not in names:
            raise UnsupportedError(
                f"{operation} has no implementation {wanted!r}; it has {list(names)} and 'auto'"
            )
        module, reason = _load(target, room, wanted, arguments)
        if module is None:
            raise UnsupportedError(f"{operation}={wanted} cannot run: {reason}; use 'auto'")
        return module
    refused = ""
    for name in names:
        module, reason = _load(target, room, name, arguments)
        if module is not None:
            log.once(f"kernels: {operation}={name} on {target.platform}{refused}")
            return module
        if _platform_of(name) == target.platform:
            refused += f"; not {name}: {reason}"
    raise UnsupportedError(f"{operation} has no implementation for these arguments")


def _load(target, room, name, arguments) -> tuple[ModuleType | None, str | None]:
    """Returns (module, None), or (None, the reason why it cannot run)."""
    platform = _platform_of(name)
    if platform not in (None, target.platform):
        return None, f"it needs a {platform}, this program is for {target.platform}"
    module = importlib.import_module(f"{room}.{name}")
    reason = module.supported(*arguments) if platform else None
    return (module, None) if reason is None else (None, reason)


def _platform_of(name: str) -> str | None:
    """Returns the platform that an implementation needs, by its name's ending; None: any."""
    return next((x for x in ("tpu", "gpu") if name.endswith(f"_{x}")), None)
