"""The same step, compiled by the real TPU compiler: what it needs, and the collectives it chose.

The program is the sharded one that would run: `Transformer.extend` on a mesh of described devices.
Nothing is executed, so these are the compiler's statements, not measurements.
"""

import collections
import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax import log
from v4jax.cache import init_cache
from v4jax.cache.hybrid import cache_axes
from v4jax.errors import UnsupportedError
from v4jax.kernels import dispatch
from v4jax.model import abstract_transformer, transformer
from v4jax.parallel.layout import Layout
from v4jax.parallel.mesh import make_mesh
from v4jax.parallel.shard import entry_shares
from v4jax.parallel.weights import place, weight_shardings
from v4jax.planning import ahead_of_time
from v4jax.planning.memory import DeviceBytes
from v4jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind in a step: how many, and the bytes of their results."""

    kind: str
    count: int
    result_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device's program.

    argument_bytes: weights, cache and inputs. output_bytes: of these not written over arguments.
    flops: by the compiler's cost analysis, which sees neither into kernels nor how often a loop of
    unknown length runs. seconds: of compiling.
    """

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    code_bytes: int
    flops: float
    collectives: list[Collective]
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of a device while the step runs."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.code_bytes


def compile_step(work: Workload) -> Compiled:
    """Compiles one decode or prefill step of a workload for its topology; takes minutes.

    Raises:
      UnsupportedError: libtpu is missing, the chip is no TPU, or the regime has no step to compile.
      jax.errors.JaxRuntimeError: the compiler refuses, as where memory overflows; it says why.
    """
    if work.topology.chip.platform != "tpu":
        raise UnsupportedError(
            f"--compile needs a TPU topology, got {work.topology.name}; there is no compiler for "
            "GPUs without a GPU"
        )
    if work.regime == "train":
        raise UnsupportedError(
            "--compile has no training step to compile; use --regime=prefill or decode"
        )
    if work.topology.slices > 1:
        raise UnsupportedError("--compile takes one slice; leave --slices away")
    devices = ahead_of_time.describe(work.topology.name).devices
    layout = Layout(make_mesh(**work.sizes, devices=devices), work.regime)
    start = time.perf_counter()
    with log.phase("plan", f"compiling for {work.topology.name}") as phase:
        with dispatch.compiling_for("tpu", devices[0].device_kind):
            compiled = _lower(work, layout).compile()
        phase.note("compiled")
    text = compiled.as_text()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        collectives=count_collectives(text),
        seconds=time.perf_counter() - start,
    )


def _lower(work: Workload, layout: Layout):
    """Returns the step on abstract arguments, lowered: abstract first, then shardings."""
    config, numerics = work.config, work.numerics
    model = place(abstract_transformer(config, numerics, storage=work.storage), layout)
    model.layout = layout
    model = _abstract(model, weight_shardings(model, layout))
    sizes = work.batch, work.context, entry_shares(layout)
    cache = jax.eval_shape(lambda: init_cache(config, numerics, *sizes))

    def sharding(*names: str | None, regime: str = "prefill") -> NamedSharding:
        axes = (layout.array_axes(regime, name) or None for name in names)
        return NamedSharding(layout.mesh, P(*axes))

    cache = _abstract(cache, jax.tree.map(lambda names: sharding(*names), cache_axes(cache)))
    tokens = jax.ShapeDtypeStruct(
        (work.batch, work.chunk),
        jnp.int32,
        sharding=sharding("batch", "tokens", regime=work.regime),
    )
    lengths = jax.ShapeDtypeStruct((work.batch,), jnp.int32, sharding=sharding("batch"))

    # The very function that `Transformer.extend(…, donate=True)` calls after checking arguments.
    return transformer._extend_donating.lower(model, tokens, cache, lengths, "last")


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(tree, shardings),
    )


_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"= (?P<shape>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{.*?\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4}


def as_text(compiled: Compiled, held: DeviceBytes) -> str:
    """Returns the compiler's statements, its bytes beside the plan's."""
    size = log.format_bytes
    arguments = sum(held.weights.values()) + sum(held.cache.values())
    lines = [
        f"compiled in {log.format_seconds(compiled.seconds)} (the compiler's statements, not a "
        "measurement)",
        f"  {'':<13}{'compiler':>10}{'plan':>11}",
        f"  {'arguments':<13}{size(compiled.argument_bytes):>10}{size(arguments):>11}"
        "  weights and cache",
        f"  {'temporaries':<13}{size(compiled.temporary_bytes):>10}"
        f"{size(sum(held.activations.values())):>11}  activations",
        f"  {'outputs':<13}{size(compiled.output_bytes):>10}{'':>11}  not written over arguments",
        f"  {'code':<13}{size(compiled.code_bytes):>10}",
        f"  {'total':<13}{size(compiled.total):>10}{size(held.total):>11}",
        f"  operations outside kernels, loops once: {compiled.flops / 1e9:,.3f} GFLOP",
    ]
    for item in compiled.collectives:
        lines.append(
            f"  {item.kind:<19}{item.count:>5} times{size(item.result_bytes):>11} of results"
        )
    return "\n".join(lines)


def count_collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program's text, those in loops times their rounds.

    A loop whose rounds the text does not say counts once; of a conditional every branch counts.
    """
    bodies: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name = header["name"]
            bodies[name] = []
            entry = name if header["entry"] else entry
        elif name:
            bodies[name].append(line)
    counts: collections.Counter = collections.Counter()
    sizes: collections.Counter = collections.Counter()

    def visit(name: str, times: int) -> None:
        for line in bodies.get(name, ()):
            found = _COLLECTIVE.search(line)
            if found:
                counts[found["kind"]] += times
                sizes[found["kind"]] += times * _largest_bytes(found["shape"])
            rounds = _rounds(line, bodies) if " while(" in line else 1
            for called in _CALLED.findall(line):
                for inner in re.findall(r"%?([\w.\-]+)", called.strip("{}")):
                    visit(inner, times * rounds)

    visit(entry, 1)
    return [Collective(kind, counts[kind], sizes[kind]) for kind in sorted(counts)]


def _rounds(line: str, bodies: dict[str, list[str]]) -> int:
    """Returns the rounds of a loop: as stated, or the bound of a condition `counter < constant`."""
    stated = _TRIPS.search(line)
    if stated:
        return int(stated[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], []) if condition else []
    bounds = [found[1] for found in map(_BOUND.search, lines) if found]
    counts_up = any("direction=LT" in text for text in lines)
    return int(bounds[0]) if counts_up and len(bounds) == 1 else 1


def _largest_bytes(shape: str) -> int:
    """Returns the bytes of the largest array of a type: (bf16[4,8]{1,0}, bf16[16,8]{1,0}): 256."""
    largest = 0
    for dtype, dims in _ARRAY.findall(shape):
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype) or (int(digits[0]) if digits else 0)
        elements = 1
        for size in filter(None, dims.split(",")):
            elements *= int(size)
        largest = max(largest, elements * bits // 8)
    return largest
