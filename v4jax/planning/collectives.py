"""The collectives of a compiled program, read from its text."""

import collections
import dataclasses
import re

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
class Collective:
    """All collectives of a kind in a step: how many, and the bytes of their results."""

    kind: str
    count: int
    result_bytes: int


def count_collectives(text: str) -> list[Collective]:
    """Returns the collectives of a compiled program's text, those in loops times their rounds.

    A loop whose rounds the text does not say counts once; of a conditional every branch counts. On
    TPU a reduce-scatter may be a fusion named so that holds an all-reduce and takes its slice: it
    sends what a reduce-scatter sends, and counts as one.
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
