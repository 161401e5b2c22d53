"""The TPU compiler's final bundles as a tree of loops, and what one run of them does.

A bundle is what a core issues in one cycle. In the compiler's text a bundle is a line
`0x2a LB: >> { … ;; … }`; `sbr.rel (predicate) target = $region7` branches to the line whose comment
says `Start region 7` or `Start/End empty region 7`. A branch backwards closes a loop; a branch
forwards inside a loop may skip the bundles it jumps over. Waiting for memory is not in the text.

`read_program` finds loops, skippable regions and the number of rounds where the text states it;
`Program.total` multiplies by rounds, which must be given for loops that depend on data.
"""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

from v4jax.errors import UnsupportedError

# Bundles after a branch that run whether it is taken or not.
DELAY_BUNDLES = 4
# A Pallas grid is one loop that runs its body one round late and drains one round later.
GRID_EXTRA_ROUNDS = 2
# Rows of the left operand that one matrix instruction takes: a register of 8 sublanes of 32 bits.
_ROWS = {"f32": 8, "bf16": 16, "f8e4m3": 32, "f8e5m2": 32, "s8": 32, "u8": 32}

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[LPC][A-Z]\s*)?:\s*>*\s*\{")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)%(\w+)\) )?target = \$region(\d+)")
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")
_MATMUL = re.compile(r"= vmatmul\.(?:mubr\.)?(?:msk\.)?([a-z0-9]+)\.")
_SPILL = re.compile(r"= (?:vst|vld)[a-z0-9.]* \[vmem:\[#allocation\d+_spill")
_EXIT = re.compile(
    r"%(\w+) = scmp\.(ge|lt|ne|eq)\.[su]32\.totalorder %(\w+), (\d+)(?: /\* loop exit test)?"
)
_PHI = re.compile(r"%\w+ = sphi %(\w+), %(\w+)")
_CONSTANT = re.compile(r"%(\w+) = smov (?:\(!?%\w+\), )?(\d+) /\* copy for cssa")
_STEP = re.compile(r"%(\w+) = sadd\.s32 (\d+), %\w+")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a stretch of bundles does; sums of bundles times the rounds they run."""

    cycles: float = 0.0
    issued_flops: float = 0.0  # of the matrix units, padding included
    spills: float = 0.0  # vector registers written to or read from the spill area

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.cycles + other.cycles,
            self.issued_flops + other.issued_flops,
            self.spills + other.spills,
        )

    def times(self, factor: float) -> "Work":
        """Returns `factor` times this."""
        return Work(self.cycles * factor, self.issued_flops * factor, self.spills * factor)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A loop or a skippable region: bundles begin … end−1.

    `name` is its place: loop "0.1" is the second loop inside the first; region "0.1?2" is the
    third skippable region whose innermost loop is "0.1" ("?2" outside all loops).
    """

    name: str
    begin: int
    end: int
    rounds: int | None = None  # of a loop, where the text states it
    is_grid: bool = False


@dataclasses.dataclass(frozen=True)
class Program:
    """One kernel: the work of every bundle, its loops and skippable regions in program order."""

    work: tuple[Work, ...]
    loops: tuple[Stretch, ...]
    regions: tuple[Stretch, ...]

    def unknown_loops(self, rounds: Mapping[str, float]) -> list[Stretch]:
        """Returns the loops whose rounds neither the text nor `rounds` states."""
        return [loop for loop in self.loops if loop.rounds is None and loop.name not in rounds]

    def total(
        self,
        rounds: Mapping[str, float],
        entered: Mapping[str, float] = MappingProxyType({}),
        root: Stretch | None = None,
    ) -> Work:
        """Returns the work of one run of the program, or of one round of the loop `root`.

        Args:
          rounds: loop → rounds each time it is entered; others run as often as the text states.
          entered: loop or region → share of the visits in which it runs at all; else always.

        Raises:
          KeyError: a loop's rounds are stated nowhere.
        """
        begin, end = (0, len(self.work)) if root is None else (root.begin, root.end)
        factors = [1.0] * (end - begin)
        for stretch in (*self.loops, *self.regions):
            inside = begin <= stretch.begin and stretch.end <= end and stretch is not root
            if not inside:
                continue
            factor = entered.get(stretch.name, 1.0)
            if stretch in self.loops:
                times = rounds.get(stretch.name, stretch.rounds)
                if times is None:
                    raise KeyError(stretch.name)
                factor *= times
            for i in range(stretch.begin - begin, stretch.end - begin):
                factors[i] *= factor
        total = Work()
        for work, factor in zip(self.work[begin:end], factors, strict=True):
            total += work.times(factor)
        return total

    def busiest_loop(
        self, rounds: Mapping[str, float], entered: Mapping[str, float] = MappingProxyType({})
    ) -> Stretch | None:
        """Returns the innermost loop with most of the matrix work, or of the cycles without any.

        Its own bundles count, those of loops inside it do not.
        """

        def weight(loop):
            own = self.total({**rounds, **dict.fromkeys(self._inside(loop), 0)}, entered, loop)
            runs = 1.0
            for outer in self.loops:
                if outer.begin <= loop.begin and loop.end <= outer.end:
                    runs *= rounds.get(outer.name, outer.rounds) or 0
                    runs *= entered.get(outer.name, 1.0)
            return (own.issued_flops * runs, own.cycles * runs)

        return max(self.loops, key=weight, default=None)

    def _inside(self, loop: Stretch) -> list[str]:
        return [other.name for other in self.loops if other.name.startswith(loop.name + ".")]


def read_program(text: str, *, unit: int) -> Program:
    """Returns the program of a `*final_bundles.txt`.

    Args:
      unit: rows and columns of one matrix unit.

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
    return Program(
        tuple(_work_of(line, unit) for line in lines), tuple(found), _find_regions(jumps, names)
    )


def _join_bundles(text: str) -> list[str]:
    """Returns one string per bundle: a bundle's comments may run over several lines."""
    bundles: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            bundles.append(line)
        elif bundles:
            bundles[-1] += "\n" + line
    return bundles


def _work_of(line: str, unit: int) -> Work:
    flops = 0
    for dtype in _MATMUL.findall(line):
        if dtype not in _ROWS:
            raise UnsupportedError(f"unknown matrix instruction of type {dtype!r}: {line[:200]}")
        flops += 2 * _ROWS[dtype] * unit * unit
    return Work(1, flops, len(_SPILL.findall(line)))


def _find_branches(lines: list[str]):
    """Returns loops (begin, end) and jumps (branch, begin, end of what it skips)."""
    regions = {name: i for i, line in enumerate(lines) for name in _REGION.findall(line)}
    loops, jumps = {}, []
    for i, line in enumerate(lines):
        for _, _, name in _BRANCH.findall(line):
            if name not in regions:
                raise UnsupportedError(f"a branch leads to region {name}, which is not in the text")
            after = min(i + 1 + DELAY_BUNDLES, len(lines))
            if regions[name] <= i:
                loops[regions[name]] = max(after, loops.get(regions[name], 0))
            elif regions[name] > after:
                jumps.append((i, after, regions[name]))
    return sorted(loops.items()), jumps


def _name_loops(loops: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """Returns (begin, end) → place among the loops, outer loops first."""
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
    """Returns the skippable regions; a jump out of the loop it stands in ends the loop."""
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
    starts = [first for first, following in _PHI.findall(lines[begin]) if following == counter]
    steps = dict(_STEP.findall(body))
    constants = dict(_CONSTANT.findall("\n".join(lines[:begin])))
    if len(starts) != 1 or starts[0] not in constants or counter not in steps:
        return None
    span, step = int(bound) - int(constants[starts[0]]), int(steps[counter])
    return -(-span // step) if span > 0 and step > 0 else None
