"""From bundles to figures: cycles, FLOPs, share of the peak and spills of one kernel on one core.

    share of peak = FLOPs the result needs / (cycles · FLOPs per cycle and core)

Every loop counts with its rounds. What is not known is None.
"""

import dataclasses
import math

from benchmarks.kernels import bundles
from benchmarks.kernels.cases import Case, Kernel
from v4jax.costs import chips
from v4jax.errors import UnsupportedError
from v4jax.kernels import Target


@dataclasses.dataclass(frozen=True)
class Core:
    """One core of a generation, and how many of them share a device's grid."""

    device: str  # its kind, as JAX calls it
    unit: int  # rows and columns of a matrix unit
    flops_per_cycle: int  # bfloat16
    cores: int  # of one device
    bytes_per_cycle: float  # of HBM, per core, at the published bandwidth and peak

    @property
    def target(self) -> Target:
        """What programs for the core are made for."""
        return Target("tpu", self.device)


def _core(name: str, unit: int, flops_per_cycle: int, cores: int = 1) -> Core:
    chip = chips.CHIPS[name]
    # Both rates are per chip: the clock that the peak implies and the number of cores cancel.
    bytes_per_flop = chip.hbm_bytes_per_second / chip.bf16_flops_per_second
    return Core(chip.device_kind, unit, flops_per_cycle, cores, bytes_per_flop * flops_per_cycle)


CORES = {
    "v5e": _core("v5e", 128, 131_072),
    "v5p": _core("v5p", 128, 131_072, cores=2),
    "v6e": _core("v6e", 256, 524_288),
    "tpu7x": _core("tpu7x", 256, 524_288),
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


def core_of(topology: str) -> Core:
    """Returns the core that a topology such as "v6e:2x2" consists of.

    Raises:
      UnsupportedError: no figures are known for it.
    """
    generation = topology.partition(":")[0]
    if generation not in CORES:
        raise UnsupportedError(
            f"no peak is known for topology {topology!r}; known generations: {sorted(CORES)}"
        )
    return CORES[generation]


def count(text: str, core: Core, case: Case, name: str, call: Traced | None) -> KernelFigures:
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
    units = bundles.Units(core.unit, core.flops_per_cycle, kernel.depth)
    program = bundles.read_program(text, units)
    notes = [kernel.assumes] if kernel.assumes else []
    if not described:
        notes.append("not described in cases/: FLOPs, bytes and rounds are not stated")
    rounds, entered, cores = _rounds(program, core, kernel, call, notes)
    unknown = program.unknown_loops(rounds)
    total = None if unknown else program.total(rounds, entered)
    flops = None if kernel.flops is None else kernel.flops / cores
    moved = None if kernel.moved_bytes is None else kernel.moved_bytes / cores
    share = None
    if total is not None and flops is not None:
        share = flops / (total.cycles * core.flops_per_cycle)
        if flops > total.issued_flops * 1.001:
            notes.append(
                f"rounds do not explain the FLOPs: {flops:.4g} needed, {total.issued_flops:.4g} "
                "issued; the case's rounds or its formula are wrong"
            )
            share = None
    inner, inner_part = _inner(program, rounds, entered, core), None
    if inner is not None and total is not None:
        loop = program.busiest_loop(rounds, entered)
        inner_part = inner.cycles * program.runs(loop, rounds, entered) / total.cycles
    return KernelFigures(
        op=case.op,
        case=case.key,
        kernel=kernel.name,
        inner=inner,
        loops=tuple(_count_loop(program, rounds, entered, loop, core) for loop in program.loops),
        regions=tuple((region.name, region.end - region.begin) for region in program.regions),
        bundles=len(program.work_n3),
        cycles=total and total.cycles,
        flops=flops,
        issued_flops=total and total.issued_flops,
        share=share,
        bound=kernel.bound_for(core.unit),
        goal=kernel.goal_for(core.unit),
        moved_bytes=moved,
        memory_cycles=moved and moved / core.bytes_per_cycle,
        spills=total and total.spills,
        inner_part=inner_part,
        goal_inner=kernel.goal_inner,
        goal_inner_part=kernel.goal_inner_part,
        notes=tuple(notes),
    )


def _rounds(program, core: Core, kernel: Kernel, call: Traced | None, notes: list[str]):
    """Returns rounds by loop, shares of visits by loop or region, and how many cores run."""
    rounds: dict[str, float] = {}
    entered = dict(kernel.entered)
    places = {stretch.name for stretch in (*program.loops, *program.regions)}
    missing = sorted(set(kernel.entered) - places)
    if missing:
        notes.append(f"the case names {', '.join(missing)}, which this program does not have")
    cores = 1
    grids = [loop for loop in program.loops if loop.is_grid]
    sizes = iter(kernel.grid)
    grid = [next(sizes, None) if size is None else size for size in call.grid] if call else [None]
    if None not in grid:
        steps = math.prod(grid)
        stated = grids[0].rounds if grids else 1  # one step needs no loop
        splits = any(many and size > 1 for many, size in zip(call.parallel, grid, strict=True))
        cores = (core.cores if splits else 1) if stated is None else round(steps / stated)
        if grids:
            rounds[grids[0].name] = steps / cores
        if cores < core.cores:
            notes.append(f"runs on {cores} of {core.cores} cores")
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
    """Returns the smallest region that holds two loops, or the first loop where none does."""
    around = [r for r in program.regions if r.contains(first) and r.contains(last)]
    return min(around, key=lambda region: region.end - region.begin, default=first)


def _inner(program, rounds: dict, entered: dict, core: Core) -> LoopFigures | None:
    """Returns the loop with most of the matrix work, without the loops inside it."""
    loop = program.busiest_loop(rounds, entered)
    if loop is None:
        return None
    if not any(loop.contains(other) and other != loop for other in program.loops):
        return _count_loop(program, rounds, entered, loop, core)
    work = program.own(loop, around_matrix_work=True)
    place = dataclasses.replace(loop, name=f"{loop.name}, around its own matrix work")
    return (
        _loop_figures(place, rounds.get(loop.name, loop.rounds), work, core)
        if work.cycles
        else None
    )


def _count_loop(program, rounds: dict, entered, loop, core: Core) -> LoopFigures:
    try:
        work = program.total(rounds, entered, loop)
    except KeyError:
        work = None
    return _loop_figures(loop, rounds.get(loop.name, loop.rounds), work, core)


def _loop_figures(loop, runs: float | None, work: bundles.Work | None, core: Core) -> LoopFigures:
    size = loop.end - loop.begin
    if work is None:
        return LoopFigures(loop.name, size, runs, None, None, None, None)
    share = work.issued_flops / (work.cycles * core.flops_per_cycle)
    return LoopFigures(loop.name, size, runs, work.cycles, work.issued_flops, share, work.spills)
