"""The TPU compiler's final bundles as a tree of loops, and what one run of them does.

A bundle is what a core issues in one cycle. In the compiler's text a bundle is a line
`0x2a LB: >> { … ;; … }`; `sbr.rel (predicate) target = $region7` branches to the line whose comment
says `Start region 7` or `Start/End empty region 7`. A branch backwards closes a loop; a branch
forwards inside a loop may skip the bundles it jumps over.

The text has no waiting for memory and none for the matrix units. On v5e and v5p the compiler issues
products faster than units of the published peak can take them; a loop therefore takes at least the
time that its products need there.

`read_program` finds loops, skippable regions and the number of rounds where the text states it.
`Program.total` multiplies by rounds, which must be given for loops that depend on data.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from v4jax.errors import UnsupportedError

# Bundles after a branch that run whether or not it is taken.
DELAY_BUNDLES = 4
# A Pallas grid is one loop that runs its body one round late and drains one round later.
GRID_EXTRA_ROUNDS = 2
# Rows of the left operand that one matrix instruction takes: a register of 8 sublanes of 32 bits.
_ROWS = {"f32": 8, "bf16": 16, "f8e4m3": 32, "f8e5m2": 32, "s8": 32, "u8": 32}

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+([LPC][A-Z])?\s*:\s*>*\s*\{")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)%(\w+)\) )?target = \$region(\d+)")
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")
_MATMUL = re.compile(r"= vmatmul\.(?:mubr\.)?(?:msk\.)?([a-z0-9]+)\.")
_SPILL = re.compile(r"= (?:vst|vld)[a-z0-9.]* \[vmem:\[#allocation\d+_spill")
# Scalar instructions that count rounds; (%p) before the operands makes one conditional.
_IF = r"(?:\(!?%\w+\), )?"
_EXIT = re.compile(rf"%(\w+) = scmp\.(ge|lt|ne|eq)\.[su]32\.totalorder {_IF}%(\w+), (\d+)")
_PHI = re.compile(r"%(\w+) = sphi %(\w+), %(\w+)")
_CONSTANT = re.compile(rf"%(\w+) = smov {_IF}(\d+) /\* copy for cssa")
_STEP = re.compile(rf"%(\w+) = sadd\.s32 {_IF}(\d+), %(\w+)")
_LOAD = re.compile(r"%(\w+) = sld \[smem:\[#(allocation\d+_spill)\]\]")
_STORE = re.compile(r"sst \[smem:\[#(allocation\d+_spill)\]\] %(\w+)")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stretch of bundles does: sums over bundles, times the rounds they run."""

    cycles: float
    issued_flops: float  # of the matrix units, padded rows and columns included
    spills: float  # vector registers written to or read from the spill area


@dataclasses.dataclass(frozen=True)
class Units:
    """The matrix units of one core.

    width: rows and columns of one unit. flops_per_cycle: of all units, full. depth: channels that
    every product sums over, where they do not fill a unit; an instruction takes no less time.
    """

    width: int
    flops_per_cycle: int
    depth: int | None = None

    @property
    def filled(self) -> float:
        """The part of a unit that the depth fills."""
        return min(self.depth or self.width, self.width) / self.width


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A loop or a skippable region: bundles begin … end−1.

    name: loop "0.1" is the second loop inside the first; region "0.1?2" is the third skippable
    region whose innermost loop is "0.1" ("?2" outside all loops).
    """

    name: str
    begin: int
    end: int
    rounds: int | None = None  # of a loop, where the text states it
    is_grid: bool = False

    def contains(self, other: "Stretch") -> bool:
        """Whether `other` is inside, or the stretch itself."""
        return self.begin <= other.begin and other.end <= self.end


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One kernel: the work of every bundle, its loops and skippable regions in program order."""

    work_n3: np.ndarray  # per bundle: 1, FLOPs if the units were full, spills
    loops: tuple[Stretch, ...]
    regions: tuple[Stretch, ...]
    units: Units

    @property
    def whole(self) -> Stretch:
        """All bundles."""
        return Stretch("", 0, len(self.work_n3))

    def unknown_loops(self, rounds: Mapping[str, float]) -> list[Stretch]:
        """Returns the loops whose rounds neither the text nor `rounds` states."""
        return [loop for loop in self.loops if loop.rounds is None and loop.name not in rounds]

    def total(
        self, rounds: Mapping[str, float], entered: Mapping[str, float], root: Stretch | None = None
    ) -> Work:
        """Returns the work of one run of the program, or of one round of the loop `root`.

        Args:
          rounds: loop → rounds each time it is entered; others run as often as the text states.
          entered: loop or region → share of the visits in which it runs at all; else always.

        Raises:
          KeyError: a loop's rounds are stated nowhere.
        """
        root = root or self.whole
        factors_n = np.ones(len(self.work_n3))
        for loop in self.loops:
            if root.contains(loop) and loop != root:
                times = rounds.get(loop.name, loop.rounds)
                if times is None:
                    raise KeyError(loop.name)
                factors_n[loop.begin : loop.end] *= times
        for stretch in (*self.loops, *self.regions):
            if root.contains(stretch) and stretch != root:
                factors_n[stretch.begin : stretch.end] *= entered.get(stretch.name, 1.0)
        inside = [root, *(loop for loop in self.loops if root.contains(loop) and loop != root)]
        parts = [self._add(factors_n * self._owns(loop)) for loop in inside]
        return Work(*(sum(column) for column in zip(*map(dataclasses.astuple, parts), strict=True)))

    def busiest_loop(
        self, rounds: Mapping[str, float], entered: Mapping[str, float]
    ) -> Stretch | None:
        """Returns the loop with most of the matrix work, or of the cycles if there is none.

        Its own bundles count, those of loops inside it do not. Unknown rounds count as one.
        """

        def weight(loop: Stretch) -> tuple[float, float]:
            own, runs = self.own(loop), self.runs(loop, rounds, entered)
            return (own.issued_flops * runs, own.cycles * runs)

        return max(self.loops, key=weight, default=None)

    def runs(
        self, loop: Stretch, rounds: Mapping[str, float], entered: Mapping[str, float]
    ) -> float:
        """Returns the rounds of a loop in one run of the program; unknown ones count as one."""
        runs = 1.0
        for outer in (*self.loops, *self.regions):
            if outer.contains(loop):
                runs *= rounds.get(outer.name, outer.rounds or 1) * entered.get(outer.name, 1.0)
        return runs

    def own(self, loop: Stretch, *, around_matrix_work: bool = False) -> Work:
        """Returns the work of one round without the loops inside; every region runs.

        Args:
          around_matrix_work: only from the first matrix instruction to the last.
        """
        factors_n = self._owns(loop)
        if around_matrix_work:
            places = np.flatnonzero(factors_n * self.work_n3[:, 1])
            first, last = (places[0], places[-1]) if len(places) else (0, -1)
            factors_n[:first] = 0
            factors_n[last + 1 :] = 0
        return self._add(factors_n)

    def _owns(self, loop: Stretch) -> np.ndarray:
        """Returns 1 for each bundle of a loop that no loop inside it has, else 0."""
        owns_n = np.zeros(len(self.work_n3))
        owns_n[loop.begin : loop.end] = 1
        for other in self.loops:
            if loop.contains(other) and other != loop:
                owns_n[other.begin : other.end] = 0
        return owns_n

    def _add(self, factors_n: np.ndarray) -> Work:
        """Returns the work of bundles of one loop; the units may need longer than the bundles."""
        bundles, flops, spills = (float(x) for x in factors_n @ self.work_n3)
        cycles = max(bundles, flops / self.units.flops_per_cycle)
        return Work(cycles, flops * self.units.filled, spills)


def read_program(text: str, units: Units) -> Program:
    """Returns the program of a `*final_bundles.txt`.

    Raises:
      UnsupportedError: the text is not what this reader knows.
    """
    lines = _join_bundles(text)
    if not lines:
        raise UnsupportedError("the text holds no bundles; expected lines like '0x2a : > { … }'")
    loops, jumps = _find_branches(lines)
    names = _name_loops(loops)
    found = []
    for (begin, end), name in names.items():
        is_grid = "iteration index, stage" in lines[begin]
        rounds = _stated_rounds(lines, begin, end)
        if rounds is not None and is_grid:
            rounds -= GRID_EXTRA_ROUNDS
        found.append(Stretch(name, begin, end, rounds, is_grid))
    work_n3 = np.array([_work_of(line, units.width) for line in lines], float)
    return Program(work_n3, tuple(found), _find_regions(jumps, names), units)


def _join_bundles(text: str) -> list[str]:
    """Returns one string per bundle: a bundle's comments may run over several lines."""
    bundles: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += "\n" + line
    return bundles


def _work_of(line: str, width: int) -> tuple[int, int, int]:
    """Returns 1, a bundle's FLOPs and its spills."""
    flops = 0
    for dtype in _MATMUL.findall(line):
        if dtype not in _ROWS:
            raise UnsupportedError(f"unknown matrix instruction of type {dtype!r}: {line[:200]}")
        flops += 2 * _ROWS[dtype] * width * width
    return 1, flops, len(_SPILL.findall(line))


def _find_branches(lines: list[str]):
    """Returns loops (begin, end) and jumps (branch, begin, end of what it skips)."""
    regions = {name: i for i, line in enumerate(lines) for name in _REGION.findall(line)}
    loops, jumps = set(), []
    for i, line in enumerate(lines):
        after = min(i + 1 + DELAY_BUNDLES, len(lines))
        for _, _, name in _BRANCH.findall(line):
            # An empty region behind the last bundle is not in the text.
            target = regions.get(name, len(lines))
            if target <= i:
                loops.add((target, after))
            elif target > after:
                jumps.append((i, after, target))
    marked = {i for i, line in enumerate(lines) if _BUNDLE.match(line)[2] == "LB"}
    if marked != {begin for begin, _ in loops}:
        raise UnsupportedError(
            f"the text marks loops at bundles {sorted(marked)}, its branches close loops at "
            f"{sorted(begin for begin, _ in loops)}"
        )
    return loops, jumps


def _name_loops(loops: set[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Returns (begin, end) → name of each loop, outer loops first."""
    names: dict[tuple[int, int], str] = {}
    counts: dict[str, int] = {}
    for begin, end in sorted(loops, key=lambda loop: (loop[0], -loop[1])):
        outer = _innermost(names, begin, end)
        count = counts.get(outer, 0)
        counts[outer] = count + 1
        names[begin, end] = f"{outer}.{count}" if outer else str(count)
    return names


def _innermost(names: dict[tuple[int, int], str], begin: int, end: int) -> str:
    around = [loop for loop in names if loop[0] <= begin and end <= loop[1]]
    return names[min(around, key=lambda loop: loop[1] - loop[0])] if around else ""


def _find_regions(jumps, names) -> tuple[Stretch, ...]:
    """Returns the skippable regions; a jump out of its own loop ends the loop."""
    counts: dict[str, int] = {}
    regions = []
    for branch, begin, end in sorted(jumps):
        loop = _innermost(names, branch, branch + 1)
        if loop != _innermost(names, branch, end):
            continue
        count = counts.get(loop, 0)
        counts[loop] = count + 1
        regions.append(Stretch(f"{loop}?{count}", begin, end))
    return tuple(regions)


def _stated_rounds(lines: list[str], begin: int, end: int) -> int | None:
    """Returns the rounds of a loop that counts from a constant to a constant, else None."""
    tested = None
    for line in lines[max(begin, end - 1 - DELAY_BUNDLES) : end]:
        for negated, predicate, _ in _BRANCH.findall(line):
            tested = (negated, predicate)
    if tested is None:
        return None
    body = "\n".join(lines[begin:end])
    tests = [match for match in _EXIT.findall(body) if match[0] == tested[1]]
    if not tests:
        return None
    _, compare, counter, bound = tests[-1]
    if (compare, tested[0]) not in (("ge", "!"), ("eq", "!"), ("lt", ""), ("ne", "")):
        return None
    steps = {name: (int(step), before) for name, step, before in _STEP.findall(body)}
    constants = dict(_CONSTANT.findall("\n".join(lines[:begin])))
    step, before = steps.get(_origin(counter, body), (0, ""))
    # The counter is what the phi becomes, or what follows from the phi.
    phis = _PHI.findall(lines[begin])
    starts = {start for phi, start, after in phis if counter == after or before == phi}
    first = constants.get(starts.pop()) if len(starts) == 1 else None
    if first is None or step == 0:
        return None
    span = int(bound) - int(first)
    return -(-span // step) if span > 0 else None


def _origin(name: str, body: str) -> str:
    """Returns the scalar that `name` reloads from the spill area, or `name`."""
    slot = dict(_LOAD.findall(body)).get(name)
    stored = {source for place, source in _STORE.findall(body) if place == slot}
    return stored.pop() if len(stored) == 1 else name
