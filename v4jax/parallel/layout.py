"""`Layout`: where a model lies; and which layout the code that is being traced runs under."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from jax.sharding import Mesh

from v4jax.parallel.axes import COMPUTED_ON, RULES, Regime


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How tokens travel to their experts.

    transport: "all_to_all" runs everywhere and sends whole buffers; "ragged" (TPU) sends only what
      is in them; "gather" sends every token everywhere, for the few tokens of decoding. "auto"
      takes "gather" where tokens are on every device of the experts already, else "all_to_all".
    payload: what travels to the experts, "activations" or "fp8" (e4m3 in blocks of 128, which
      numerics that round the experts' inputs so do not notice).
    slack: rows of a buffer over those of an even load, of many tokens over an even round of them. A
      fuller load takes more rounds, nothing is dropped.
    """

    transport: Literal["auto", "all_to_all", "ragged", "gather"] = "auto"
    payload: Literal["activations", "fp8"] = "activations"
    slack: float = 1.5


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the regime by whose rules the weights lie on it.

    A model carries its layout as a static attribute, so that a program compiled for one layout is
    never taken for another.
    """

    mesh: Mesh
    regime: Regime = "prefill"
    dispatch: Dispatch = Dispatch()

    @property
    def trains(self) -> bool:
        """Whether weights are also split for storage, and gathered where they are used."""
        return self.regime == "train"

    def size(self, axes: tuple[str, ...]) -> int:
        """Returns the number of devices along these mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def array_axes(self, regime: Regime, name: str | None) -> tuple[str, ...]:
        """Returns the mesh axes that split a logical axis of an array; those of size 1 left out."""
        axes = RULES[regime].arrays.get(name, ())
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def weight_axes(self, name: str | None) -> tuple[str, ...]:
        """Returns the mesh axes that split a logical axis of a weight."""
        axes = RULES[self.regime].weights.get(name, ())
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)


@dataclasses.dataclass(frozen=True)
class Active:
    """The layout of the code that is being traced.

    regime: of the call; it says how the call's arrays are split. per_device: whether the code sees
      one device's share of everything (inside `on_shards`) or whole arrays.
    """

    layout: Layout
    regime: Regime
    per_device: bool = False


_active: contextvars.ContextVar[Active | None] = contextvars.ContextVar("active", default=None)


def active() -> Active | None:
    """Returns the layout in force, or None on a single device."""
    return _active.get()


@contextlib.contextmanager
def activate(
    layout: Layout | None, regime: Regime = "prefill", per_device: bool = False
) -> Iterator[None]:
    """Puts a layout in force for the code traced inside; None changes nothing."""
    token = _active.set(None if layout is None else Active(layout, regime, per_device))
    try:
        yield
    finally:
        _active.reset(token)


def split_axes(name: str) -> tuple[str, ...]:
    """Returns the mesh axes over which per-device code has a share of the logical axis `name`.

    Names of `COMPUTED_ON` follow the weights' rules, all others the call's.
    """
    now = _active.get()
    if now is None or not now.per_device:
        return ()
    if name in COMPUTED_ON:
        return now.layout.weight_axes(name)
    return now.layout.array_axes(now.regime, name)
