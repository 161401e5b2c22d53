"""The TPU compiler's schedule of every kernel, on a machine without a TPU.

    python -m benchmarks.kernels --topology=v6e:2x2
    python -m benchmarks.kernels --topology=v5p:2x2x1 --model=v4_pro --only=dense_attention,indexer
    python -m benchmarks.kernels --only=grouped_matmul/v4_flash/prefill_fp4 --loops
    python -m benchmarks.kernels --json > figures.json

Each kernel is compiled by libtpu (the [tpu] extra), and the compiler's final schedule is read. This
is not a measurement. One bundle counts as one cycle, and a loop takes at least as long as the
matrix units need for its products. Waiting for memory is not in the schedule: the last column says
what the bytes alone would take.

share    FLOPs that the result needs, over cycles times the peak of one core: 131,072 FLOPs a cycle
         on v5e and v5p, 524,288 on v6e and tpu7x. Every loop counts with its rounds.
inner    one round of the loop that does most of the matrix work: FLOPs as issued, padded rows
         included. A loop with other loops inside counts its own bundles from the first product to
         the last. "of all cycles" is its part of the whole kernel.
bound    the share that the shape allows: 64 rows of heads fill a quarter of a unit 256 wide.
≥        the share to reach; the figure before it is green when it reaches it, else red.

Figures are for one core. v5p has two cores to a device; they share a kernel whose grid is parallel.
Rounds that depend on data are stated with the case and printed below the table. Where they are not
known, the figures of the whole kernel are left out. --loops lists every loop.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

from benchmarks.kernels import cases, schedule
from benchmarks.kernels.cases import Case
from benchmarks.kernels.figures import Core, KernelFigures
from v4jax import log
from v4jax.errors import RequestError, UnsupportedError, V4JaxError
from v4jax.planning import ahead_of_time

PLAIN_WIDTH = 160  # columns where the output is no terminal


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table.

    Returns:
      Exit status: 0, 1 if a case did not compile, 2 for an error in the request.
    """
    options = _parse(arguments)
    try:
        return _run(options)
    except V4JaxError as error:
        print(f"benchmarks.kernels: error: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--topology",
        default="v6e:2x2",
        help="TPU to compile for: v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1",
    )
    parser.add_argument(
        "--model",
        type=_words,
        default=["v4_flash"],
        help="models whose sizes are compiled: v4_flash, v4_pro, or both with a comma between",
    )
    parser.add_argument(
        "--only",
        type=_words,
        default=[],
        help="only cases whose name (operation/model/shape) contains one of these words",
    )
    parser.add_argument("--loops", action="store_true", help="list every loop below the table")
    parser.add_argument("--list", action="store_true", help="print the cases; compile nothing")
    parser.add_argument("--keep", type=pathlib.Path, help="folder that keeps the compiler's text")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def _words(text: str) -> list[str]:
    return text.split(",")


def _run(options: argparse.Namespace) -> int:
    unknown = [model for model in options.model if model not in cases.MODELS]
    if unknown:
        raise RequestError(f"--model must be among {cases.MODELS}, got {unknown[0]!r}")
    core = schedule.core_of(options.topology)
    selected = cases.select(core.target, tuple(options.model), tuple(options.only))
    if options.list:
        print("\n".join(case.key for case in selected))
        return 0
    reason = ahead_of_time.why_unavailable()
    if reason is not None:
        raise UnsupportedError(f"benchmarks.kernels needs the TPU compiler: {reason}")
    figures, failures = [], {}
    for case in _progress(selected):
        keep = options.keep and options.keep / case.key.replace("/", "-")
        try:
            figures += schedule.measure(options.topology, case, keep)
        except UnsupportedError as error:
            failures[case.key] = str(error)
    if options.json:
        _print_json(options.topology, core, figures, failures)
    else:
        _print_table(options.topology, figures, failures, options.loops)
    return 1 if failures else 0


def _progress(selected: list[Case]) -> Iterator[Case]:
    """Yields the cases and announces each on stderr: one may take minutes."""
    for number, case in enumerate(selected, 1):
        log.info(f"kernels: {number} of {len(selected)}, compiling {case.key}")
        yield case


def _print_json(
    topology: str, core: Core, figures: list[KernelFigures], failures: dict[str, str]
) -> None:
    kernels = [dataclasses.asdict(row) | {"share_of_bound": row.share_of_bound} for row in figures]
    print(
        json.dumps(
            {
                "source": "compiler's schedule, not a measurement",
                "topology": topology,
                "flops_per_cycle": core.flops_per_cycle,
                "kernels": kernels,
                "failures": failures,
            },
            indent=2,
        )
    )


def _print_table(
    topology: str, figures: list[KernelFigures], failures: dict[str, str], loops: bool
) -> None:
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=PLAIN_WIDTH)
    table = rich.table.Table(
        title=f"{topology}, one core: compiler's schedule, not a measurement",
        box=rich.box.SIMPLE_HEAD,
    )
    for column, justify in (
        *(("case", "left"), ("kernel", "left"), ("inner\ncycles", "right")),
        *(("inner\nGFLOPs", "right"), ("inner\nshare", "right"), ("inner\nspills", "right")),
        ("of all\ncycles", "right"),
        *(("cycles", "right"), ("GFLOPs", "right"), ("share", "right")),
        *(("bound", "right"), ("MiB\nmoved", "right"), ("memory\ncycles", "right")),
    ):
        table.add_column(column, justify=justify, overflow="fold")
    for row in figures:
        table.add_row(*_cells(row))
    console.print(table)
    for row in figures:
        for note in row.notes:
            console.print(
                f"{row.case} {row.kernel}: {note}", highlight=False, markup=False, soft_wrap=True
            )
        if loops:
            for line in _describe_loops(row):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    for key, message in failures.items():
        console.print(
            f"{key}: {message}", style="red", highlight=False, markup=False, soft_wrap=True
        )


def _cells(row: KernelFigures) -> list[str]:
    inner = row.inner
    return [
        row.case,
        row.kernel,
        "-" if inner is None else _number(inner.cycles),
        "-" if inner is None else _number(inner.flops, 1e9, 3),
        "-" if inner is None else _judge(inner.share, row.goal_inner),
        "-" if inner is None else _number(inner.spills),
        _judge(row.inner_part, row.goal_inner_part),
        _number(row.cycles),
        _number(row.flops, 1e9, 2),
        _judge(row.share, row.goal),
        _percent(row.bound),
        _number(row.moved_bytes, 2**20, 1),
        _number(row.memory_cycles),
    ]


def _judge(value: float | None, goal: float | None) -> str:
    """Returns a share, and beside it the goal: green where it is reached."""
    if goal is None:
        return _percent(value)
    reached = value is not None and value >= goal - 0.0005  # as printed
    color = "green" if reached else "red"
    return f"[{color}]{_percent(value)}[/] ≥ {100 * goal:.0f} %"


def _describe_loops(row: KernelFigures) -> list[str]:
    lines = [f"{row.case} {row.kernel}: {row.bundles:,} bundles"]
    for loop in row.loops:
        rounds = "rounds unknown" if loop.rounds is None else f"{loop.rounds:,.6g} rounds"
        lines.append(
            f"  loop {loop.name:<10} {loop.bundles:>8,} bundles, {rounds}, "
            f"{_number(loop.flops, 1e9, 3)} GFLOPs a round, share {_percent(loop.share)}, "
            f"spills {_number(loop.spills)}"
        )
    lines += [f"  region {name:<8} {size:>8,} bundles" for name, size in row.regions]
    return lines


def _number(value: float | None, unit: float = 1, digits: int = 0) -> str:
    return "?" if value is None else f"{value / unit:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


if __name__ == "__main__":
    sys.exit(main())
