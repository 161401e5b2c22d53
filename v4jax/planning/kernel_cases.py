"""The shapes at which `v4jax bench kernels` reads the compiler's schedule: the table, as data.

A case is one call of an operation with abstract arguments, at the released models' sizes and a
context of 1,048,576 tokens; each of its Pallas kernels says what it must compute and move, and how
often loops run whose rounds depend on data. `loads are even` and other assumptions are printed.

To add a case, write a function that returns a `Case` and list it in `cases`. Loops and regions are
named by their place, as `v4jax bench kernels --loops` prints them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from v4jax.config.loading import load_model_config
from v4jax.config.model import ModelConfig
from v4jax.errors import RequestError
from v4jax.shapes import ceil_div

CONTEXT, CHUNK = 1_048_576, 2_048
MODELS = ("v4_flash", "v4_pro")
_S = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Pallas kernel of a case."""

    name: str  # as `pallas_call` is told
    flops: float | None = None  # that the result needs; None: not stated
    moved_bytes: float | None = None  # every operand and result once, at least
    # Sizes of the grid's dimensions that are known on device only, in order.
    grid: tuple[int, ...] = ()
    # Loop → rounds each time it is entered, where the compiler's text does not state them.
    rounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Loop or region → share of the visits in which it runs at all.
    entered: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Rows that a matrix unit's width is filled with, where the shape has fewer than the unit.
    rows: int | None = None
    goal: float | None = None  # share of the peak to reach
    goal_of_bound: float | None = None  # or share of what the shape allows
    assumes: str = ""

    def bound_for(self, unit: int) -> float:
        """Returns the share of the peak that the shape allows on matrix units of this width."""
        return 1.0 if self.rows is None else min(1.0, self.rows / unit)

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


def find(key: str) -> Case:
    """Returns the case of a key.

    Raises:
      RequestError: there is none.
    """
    for build in _BUILDERS:
        for model in MODELS:
            for case in build(model, _config(model)):
                if case.key == key:
                    return case
    raise RequestError(f"there is no benchmark case {key!r}")


def select(models: tuple[str, ...], only: tuple[str, ...] = ()) -> list[Case]:
    """Returns the cases of some models, and if `only` is given those whose key contains a word."""
    found = [
        case for build in _BUILDERS for model in models for case in build(model, _config(model))
    ]
    if not only:
        return found
    for word in only:
        if not any(word in case.key for case in found):
            known = sorted({case.op for case in found})
            raise RequestError(f"no case contains {word!r}; operations are {', '.join(known)}")
    return [case for case in found if any(word in case.key for word in only)]


@functools.cache
def _config(model: str) -> ModelConfig:
    return load_model_config(model)


def _stored(shape: tuple[int, ...], kind: str) -> Any:
    from v4jax.quant import quantize_weight

    if kind == "bfloat16":
        return _S(shape, jnp.bfloat16)
    return jax.eval_shape(lambda: quantize_weight(jnp.zeros(shape, jnp.bfloat16), kind))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _grouped_matmul(model: str, config: ModelConfig) -> list[Case]:
    """Routed experts: gate and up in one kernel, down in another."""
    experts = config.n_routed_experts
    share = experts // 8
    return [
        *(
            _experts(model, config, f"prefill {kind}", CHUNK, share, kind, goal=0.65)
            for kind in ("fp4", "bfloat16")
        ),
        _experts(model, config, "prefill all experts fp4", CHUNK, experts, "fp4"),
        _experts(model, config, "decode 16 fp4", 16, experts, "fp4"),
    ]


def _experts(model, config, shape, tokens, experts, kind, goal=None) -> Case:
    """`tokens` times top-k assignments, spread evenly over the experts held here.

    FLOPs: assignments · 2 · hidden · 2 · inner for gate and up, half of it for down.
    """
    from v4jax.kernels import grouped_matmul
    from v4jax.kernels.grouped_matmul import pallas_tpu

    width, inner, chosen = (
        config.hidden_size,
        config.moe_intermediate_size,
        config.num_experts_per_tok,
    )
    gate_up, down = (
        _stored(weight, kind) for weight in ((experts, 2, inner, width), (experts, width, inner))
    )
    assignments = tokens * chosen
    used = min(experts, assignments)
    tile = pallas_tpu.choose_tile(assignments, experts)
    tiles = used * ceil_div(assignments // used, tile)
    assumes = f"{assignments} rows spread evenly over {used} experts: {tiles} tiles of {tile}"
    options = {"grid": (tiles,), "goal": goal, "assumes": assumes}
    # Weights are expanded by the loops before the last one, once per expert and block of outputs.
    once = used / tiles
    expands = [{"0.0": once, "0.1": once}, {"0.0": once}] if kind != "bfloat16" else [{}, {}]
    weights = used / experts

    def run(x, ids, routing, gate_up, down):
        return grouped_matmul.apply_experts(
            x, ids, routing, gate_up, down, limit=config.swiglu_limit
        )

    return Case(
        "grouped_matmul",
        model,
        shape,
        run,
        (
            _S((tokens, width), jnp.bfloat16),
            _S((tokens, chosen), jnp.int32),
            _S((tokens, chosen), jnp.float32),
            gate_up,
            down,
        ),
        (
            Kernel(
                f"grouped_matmul_gated_{kind}",
                flops=assignments * 4 * width * inner,
                moved_bytes=weights * _bytes(gate_up) + 2 * assignments * (width + inner),
                entered=expands[0],
                **options,
            ),
            Kernel(
                f"scaled_matmul_{kind}",
                flops=assignments * 2 * width * inner,
                moved_bytes=weights * _bytes(down) + 2 * assignments * (width + inner),
                entered=expands[1],
                **options,
            ),
        ),
    )


_BUILDERS = (_grouped_matmul,)
