"""The collectives of a program: read off its trace, or from the text that a compiler made of it."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Primitive of a trace → its name in reports.
_PRIMITIVES = {
    "psum": "all-reduce",
    "psum_invariant": "all-reduce",
    "pmax": "all-reduce",
    "pmin": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_invariant": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "all_to_all": "all-to-all",
    "ragged_all_to_all": "all-to-all",
    "ppermute": "permute",
}

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"= (?P<shape>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_SCATTER = re.compile(r"= (?P<shape>.*?) fusion\(.*calls=%?all-reduce-scatter")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{.*?\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BOUND = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_BITS = {"pred": 8, "s4": 4, "u4": 4}


@dataclasses.dataclass(frozen=True)
class Message:
    """What one device puts into one collective: its operand, before anything is exchanged."""

    kind: str
    axes: tuple[str, ...]
    operand_bytes: int


def trace_collectives(
    jaxpr: Any, mesh: Mapping[str, int], rounds: int
) -> collections.Counter[Message]:
    """Returns what one device sends, and how often.

    Args:
      jaxpr: of a trace, closed or open.
      mesh: axis → devices along it; collectives along axes of size 1 are left out.
      rounds: of loops whose length the trace does not say: those that send tokens to experts.
    """
    messages: collections.Counter[Message] = collections.Counter()

    def collect(jaxpr, times: int, into: collections.Counter[Message]) -> None:
        for equation in jaxpr.eqns:
            name, p = equation.primitive.name, equation.params
            if name in _PRIMITIVES:
                message = _describe(_PRIMITIVES[name], equation, mesh)
                if message is not None:
                    into[message] += times
            elif name == "scan":
                collect(p["jaxpr"].jaxpr, times * p["length"], into)
            elif name == "cond":
                # Only an uneven load takes a branch that sends more than the least.
                branches = []
                for branch in p["branches"]:
                    branches.append(collections.Counter())
                    collect(branch.jaxpr, times, branches[-1])
                into.update(min(branches, key=_sum_bytes))
            elif name == "while":
                collect(p["body_jaxpr"].jaxpr, times * rounds, into)
            elif name != "pallas_call":
                for inner in _bodies(p):
                    collect(inner, times, into)

    collect(getattr(jaxpr, "jaxpr", jaxpr), 1, messages)
    return messages


def _describe(kind: str, equation, mesh: Mapping[str, int]) -> Message | None:
    axes = equation.params.get("axes", equation.params.get("axis_name"))
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    axes = tuple(axis for axis in axes if mesh[axis] > 1)
    operands = equation.invars if kind != "all-to-all" else equation.invars[:1]
    size = sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in operands)
    return Message(kind, axes, size) if axes else None


def _sum_bytes(messages: collections.Counter[Message]) -> int:
    return sum(message.operand_bytes * count for message, count in messages.items())


def _bodies(parameters: Mapping[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of a kind in a step: how many, and the bytes of their results."""

    kind: str
    count: int
    result_bytes: int


def count_collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program's text, those in loops times their rounds.

    A loop whose rounds the text does not say counts once; of a conditional every branch counts. On
    TPU a reduce-scatter may be a fusion of that name: an all-reduce and a slice. It sends what a
    reduce-scatter sends, and counts as one.
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
            scatters = _SCATTER.search(line)
            if scatters:
                counts["reduce-scatter"] += times
                sizes["reduce-scatter"] += times * _largest_bytes(scatters["shape"])
                continue
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
