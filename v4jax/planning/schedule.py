"""How the TPU compiler schedules the kernels: cycles of their loops, not a measurement.

A case of `kernel_cases` is compiled for a topology by a child process, because the compiler dumps
its bundles only when told so before it is loaded. `bundles` reads them; this module counts:

    share of peak = FLOPs the result needs / (cycles · FLOPs per cycle and core)

with every loop multiplied by its rounds. Bundles do not show waiting for memory: what the bytes
alone would take stands beside, as `memory_cycles`.
"""

import dataclasses
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jax

from v4jax.errors import UnsupportedError
from v4jax.kernels import dispatch
from v4jax.planning import ahead_of_time, bundles, kernel_cases
from v4jax.planning.kernel_cases import Case, Kernel

_DUMP = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true " + (
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
)
_CHILD = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs: several compilers do not disturb each other
}
_PALLAS = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Chip:
    """One core of a generation: matrix units, peak, memory."""

    unit: int  # rows and columns of a matrix unit
    flops_per_cycle: int  # of one core, bfloat16
    cores: int  # of one device; a kernel with a parallel grid runs on all
    bytes_per_cycle: float  # of HBM, per core: published bandwidth / clock / cores


# Clocks are those that the published peaks imply: 1.5, 1.75, 1.75 and 2.2 GHz.
CHIPS = {
    "v5e": Chip(128, 131_072, 1, 819 / 1.5),
    "v5p": Chip(128, 131_072, 2, 2765 / 1.75 / 2),
    "v6e": Chip(256, 524_288, 1, 1640 / 1.75),
    "tpu7x": Chip(256, 524_288, 1, 7370 / 2.2 / 2),
}


@dataclasses.dataclass(frozen=True)
class LoopFigures:
    """One loop of a kernel; loops inside it are counted with their rounds."""

    name: str
    bundles: int
    rounds: float | None  # each time it is entered; None: stated nowhere
    cycles: float | None  # of one round; more than bundles where the matrix units need longer
    flops: float | None  # issued to the matrix units in one round
    share: float | None  # of the peak, issued FLOPs
    spills: float | None  # vector registers in one round


@dataclasses.dataclass(frozen=True)
class KernelFigures:
    """One Pallas kernel on one core; a figure is None where a loop's rounds are unknown."""

    op: str
    case: str
    kernel: str
    inner: LoopFigures | None  # the loop with most of the matrix work
    loops: tuple[LoopFigures, ...]
    regions: tuple[tuple[str, int], ...]  # (name, bundles), skippable
    bundles: int
    cycles: float | None  # of the whole kernel
    flops: float | None  # that the result needs, on this core
    issued_flops: float | None  # to the matrix units, padding included
    share: float | None  # of the peak, FLOPs that the result needs
    bound: float  # the share that the shape allows
    goal: float | None
    moved_bytes: float | None  # between HBM and this core, at least
    memory_cycles: float | None  # what these bytes take at the published bandwidth
    spills: float | None  # vector registers spilled or filled in the whole kernel
    inner_part: float | None  # of the whole's cycles, spent in the inner loop
    goal_inner: float | None
    goal_inner_part: float | None
    notes: tuple[str, ...]

    @property
    def share_of_bound(self) -> float | None:
        """Share of the peak over what the shape allows."""
        return None if self.share is None else self.share / self.bound


@dataclasses.dataclass(frozen=True)
class Traced:
    """A Pallas call as JAX describes it."""

    name: str
    grid: tuple[int | None, ...]  # None: known on device only
    parallel: tuple[bool, ...]
    result: tuple[int, ...]  # shape of the first result


def chip_of(topology: str) -> Chip:
    """Returns the core that a topology such as "v6e:2x2" consists of.

    Raises:
      UnsupportedError: no figures are known for it.
    """
    generation = topology.partition(":")[0]
    if generation not in CHIPS:
        raise UnsupportedError(
            f"no peak is known for topology {topology!r}; known generations: {sorted(CHIPS)}"
        )
    return CHIPS[generation]


def measure(topology: str, case: Case, keep: pathlib.Path | None = None) -> list[KernelFigures]:
    """Returns the figures of every Pallas kernel of a case.

    Args:
      keep: folder that keeps the compiler's text; a temporary one is removed.

    Raises:
      UnsupportedError: libtpu is missing or knows no such topology, or refuses the case.
    """
    chip = chip_of(topology)
    reason = ahead_of_time.why_unavailable()
    if reason is not None:
        raise UnsupportedError(f"compiling for {topology} needs the TPU compiler: {reason}")
    folder = pathlib.Path(keep or tempfile.mkdtemp(prefix="v4jax-bench-"))
    try:
        _compile(topology, case, folder)
        return read_folder(folder, chip, case)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _compile(topology: str, case: Case, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    root = pathlib.Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        **_CHILD,
        "PYTHONPATH": os.pathsep.join(paths),
        "LIBTPU_INIT_ARGS": _DUMP.format(folder=folder),
    }
    command = [sys.executable, "-m", "v4jax.planning.schedule", topology, case.key]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-12:]
        raise UnsupportedError(
            f"{case.key} does not compile for {topology}; the compiler's last words:\n  "
            + "\n  ".join(line[:400] for line in last)
        )


def read_folder(folder: pathlib.Path, chip: Chip, case: Case) -> list[KernelFigures]:
    """Returns the figures of the Pallas kernels whose bundles lie in `folder`."""
    calls = trace(case)
    figures = []
    for path in sorted(folder.glob("*final_bundles.txt")):
        match = re.fullmatch(r"(\d+)-(.+)-(\d+)-schedule-analysis_final_bundles\.txt", path.name)
        if not match or match[2] == "TLP":  # TLP is the program that calls the kernels
            continue
        analysis = path.read_text(errors="replace")
        if _PALLAS not in analysis:
            continue
        stamp, name, number = match.groups()
        shape = re.search(r"= \(?\w+\[([\d,]*)\]", analysis)
        result = tuple(int(size) for size in shape[1].split(",") if size) if shape else ()
        call = _called(calls, name, result)
        text = folder / f"{stamp}-{name}-{int(number) + 1:0{len(number)}}-final_bundles.txt"
        figures.append(count(text.read_text(errors="replace"), chip, case, name, call))
    if not figures:
        raise UnsupportedError(
            f"the compiler wrote no bundles of a Pallas kernel for {case.key}; the reference ran "
            "instead, or libtpu no longer dumps them"
        )
    return figures


def _called(calls: list[Traced], name: str, result: tuple[int, ...]) -> Traced | None:
    """Returns the call that became the compiler's `name`, which holds the kernel's own."""
    own = max((call.name for call in calls if call.name in name), key=len, default=None)
    found = [call for call in calls if call.name == own]
    return next((call for call in found if call.result == result), found[0] if found else None)


def count(text: str, chip: Chip, case: Case, name: str, call: Traced | None) -> KernelFigures:
    """Returns the figures of one program.

    Args:
      text: the final bundles.
      name: the compiler's, such as "transpose_jvp_dense_attention_backward__.1".
      call: what JAX says about it.
    """
    described = [
        kernel
        for kernel in case.kernels
        if call and kernel.name == call.name and kernel.result in ((), call.result)
    ]
    kernel = described[0] if described else Kernel(call.name if call else name)
    units = bundles.Units(chip.unit, chip.flops_per_cycle, kernel.depth)
    program = bundles.read_program(text, units)
    notes = [kernel.assumes] if kernel.assumes else []
    if not described:
        notes.append("not described in kernel_cases.py: FLOPs, bytes and rounds are not stated")
    rounds, entered, cores = _rounds(program, chip, kernel, call, notes)
    unknown = program.unknown_loops(rounds)
    total = None if unknown else program.total(rounds, entered)
    flops = None if kernel.flops is None else kernel.flops / cores
    moved = None if kernel.moved_bytes is None else kernel.moved_bytes / cores
    share = None
    if total is not None and flops is not None:
        share = flops / (total.cycles * chip.flops_per_cycle)
        if flops > total.issued_flops * 1.001:
            notes.append(
                f"rounds do not explain the FLOPs: {flops:.4g} needed, {total.issued_flops:.4g} "
                "issued; the case's rounds or its formula are wrong"
            )
            share = None
    inner, inner_part = _inner(program, rounds, entered, chip), None
    if inner is not None and total is not None:
        loop = program.busiest_loop(rounds, entered)
        inner_part = inner.cycles * program.runs(loop, rounds, entered) / total.cycles
    return KernelFigures(
        op=case.op,
        case=case.key,
        kernel=kernel.name,
        inner=inner,
        loops=tuple(_count_loop(program, rounds, entered, loop, chip) for loop in program.loops),
        regions=tuple((region.name, region.end - region.begin) for region in program.regions),
        bundles=len(program.work_n3),
        cycles=total and total.cycles,
        flops=flops,
        issued_flops=total and total.issued_flops,
        share=share,
        bound=kernel.bound_for(chip.unit),
        goal=kernel.goal_for(chip.unit),
        moved_bytes=moved,
        memory_cycles=moved and moved / chip.bytes_per_cycle,
        spills=total and total.spills,
        inner_part=inner_part,
        goal_inner=kernel.goal_inner,
        goal_inner_part=kernel.goal_inner_part,
        notes=tuple(notes),
    )


def _rounds(program, chip: Chip, kernel: Kernel, call: Traced | None, notes: list[str]):
    """Returns rounds by loop, shares of visits by loop or region, and how many cores run."""
    rounds: dict[str, float] = {}
    entered = dict(kernel.entered)
    places = {stretch.name for stretch in (*program.loops, *program.regions)}
    missing = sorted(set(kernel.entered) - places)
    if missing:
        notes.append(f"the case speaks of {', '.join(missing)}, which this program does not have")
    cores = 1
    grids = [loop for loop in program.loops if loop.is_grid]
    sizes = iter(kernel.grid)
    grid = [next(sizes, None) if size is None else size for size in call.grid] if call else [None]
    if None not in grid:
        steps = math.prod(grid)
        stated = grids[0].rounds if grids else 1  # one step needs no loop
        splits = any(many and size > 1 for many, size in zip(call.parallel, grid, strict=True))
        cores = (chip.cores if splits else 1) if stated is None else round(steps / stated)
        if grids:
            rounds[grids[0].name] = steps / cores
        if cores < chip.cores:
            notes.append(f"runs on {cores} of {chip.cores} cores")
    silent = [loop for loop in program.unknown_loops(rounds) if not loop.is_grid]
    if len(silent) == len(kernel.rounds):
        rounds |= {loop.name: each for loop, each in zip(silent, kernel.rounds, strict=True)}
        for (first, last), share in kernel.visits.items():
            entered[_region_around(program, silent[first], silent[last]).name] = share
    else:
        listed = ", ".join(f"{loop.name} ({loop.end - loop.begin} bundles)" for loop in silent)
        notes.append(
            f"the text states no rounds of {len(silent)} loops, the case of {len(kernel.rounds)}: "
            f"no figures of the whole; {listed}"
        )
    return rounds, entered, cores


def _region_around(program, first, last):
    """Returns the smallest region that holds two loops, or the first loop if it stands alone."""
    around = [r for r in program.regions if r.contains(first) and r.contains(last)]
    return min(around, key=lambda region: region.end - region.begin, default=first)


def _inner(program, rounds: dict, entered: dict, chip: Chip) -> LoopFigures | None:
    """Returns the loop with most of the matrix work; if it has others inside, its own bundles."""
    loop = program.busiest_loop(rounds, entered)
    if loop is None:
        return None
    if not any(loop.contains(other) and other != loop for other in program.loops):
        return _count_loop(program, rounds, entered, loop, chip)
    work = program.own(loop, around_matrix_work=True)
    place = dataclasses.replace(loop, name=f"{loop.name}, around its own matrix work")
    return (
        _loop_figures(place, rounds.get(loop.name, loop.rounds), work, chip)
        if work.cycles
        else None
    )


def _count_loop(program, rounds: dict, entered, loop, chip: Chip) -> LoopFigures:
    try:
        work = program.total(rounds, entered, loop)
    except KeyError:
        work = None
    return _loop_figures(loop, rounds.get(loop.name, loop.rounds), work, chip)


def _loop_figures(loop, runs: float | None, work: bundles.Work | None, chip: Chip) -> LoopFigures:
    size = loop.end - loop.begin
    if work is None:
        return LoopFigures(loop.name, size, runs, None, None, None, None)
    share = work.issued_flops / (work.cycles * chip.flops_per_cycle)
    return LoopFigures(loop.name, size, runs, work.cycles, work.issued_flops, share, work.spills)


def trace(case: Case) -> list[Traced]:
    """Returns the Pallas calls of a case, in order, as traced for TPU."""
    with dispatch.compiling_for("tpu"):
        return list(_pallas_calls(jax.make_jaxpr(case.function)(*case.arguments).jaxpr))


def _pallas_calls(jaxpr: Any):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield _describe(equation.params, equation.outvars[0].aval.shape)
            continue
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda node: hasattr(node, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _pallas_calls(inner)


def _describe(params: dict, result: tuple[int, ...]) -> Traced:
    grid = tuple(size if isinstance(size, int) else None for size in params["grid_mapping"].grid)
    compiler = params.get("compiler_params")
    compiler = compiler.get("mosaic_tpu", compiler) if isinstance(compiler, dict) else compiler
    semantics = getattr(compiler, "dimension_semantics", None) or ("arbitrary",) * len(grid)
    parallel = tuple(getattr(kind, "value", kind) == "parallel" for kind in semantics)
    name = params.get("name") or params["name_and_src_info"].name
    return Traced(name, grid, parallel, tuple(result))


def _compile_here(topology: str, key: str) -> None:
    """What the child does: compiles one case; the dump is the result."""
    case = kernel_cases.find(key)
    ahead_of_time.compile_for(topology, case.function, *case.arguments)


if __name__ == "__main__":
    _compile_here(*sys.argv[1:])
