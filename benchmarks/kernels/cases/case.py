"""What a case is: one call of an operation, and what each of its kernels must do."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

CONTEXT, CHUNK = 1_048_576, 2_048
spec = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Pallas kernel of a case."""

    name: str  # the one given to `pallas_call`
    result: tuple[int, ...] = ()  # shape of the first result, where two kernels share a name
    flops: float | None = None  # FLOPs that the result needs; None: not stated
    moved_bytes: float | None = None  # every operand and result once, at least
    # Sizes of the grid's dimensions that are known on device only, in order.
    grid: tuple[int, ...] = ()
    # Rounds of the loops for which the compiler's text states none (the grid aside), in program
    # order: the mean each time they are entered.
    rounds: tuple[float, ...] = ()
    # First and last of these loops → share of the visits in which the smallest skippable region
    # around both runs.
    visits: Mapping[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    # Name of a loop or region → share of the visits in which it runs at all.
    entered: Mapping[str, float] = dataclasses.field(default_factory=dict)
    depth: int | None = None  # channels a product sums over, where fewer than the unit is wide
    rows: int | None = None  # rows or columns of a product, where fewer than the unit is wide
    goal: float | None = None  # share of the peak to reach
    goal_of_bound: float | None = None  # or share of what the shape allows
    goal_inner: float | None = None  # or share of the peak in the inner loop
    goal_inner_part: float | None = None  # and the inner loop's part of all cycles
    assumes: str = ""

    def bound_for(self, unit: int) -> float:
        """Returns the share of the peak that the shape allows on matrix units of this width."""
        return min(1.0, (self.rows or unit) / unit) * min(1.0, (self.depth or unit) / unit)

    def goal_for(self, unit: int) -> float | None:
        """Returns the share of the peak to reach on matrix units of this width."""
        return self.goal_of_bound * self.bound_for(unit) if self.goal_of_bound else self.goal


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an operation."""

    op: str
    model: str
    shape: str  # a few words
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: tuple[Kernel, ...]

    @property
    def key(self) -> str:
        """The case's name on the command line: op/model/shape."""
        return f"{self.op}/{self.model}/{self.shape.replace(' ', '_')}"


def stored_weight(shape: tuple[int, ...], kind: str) -> Any:
    from v4jax.quant import quantize_weight

    if kind == "bfloat16":
        return spec(shape, jnp.bfloat16)
    return jax.eval_shape(lambda: quantize_weight(jnp.zeros(shape, jnp.bfloat16), kind))


def count_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
