"""`v4jax bench`: how fast, and what is known about it without the chip."""

import dataclasses
import json
import pathlib
from typing import Any

SUMMARY = "cycles of each TPU kernel, from the compiler's own schedule"
USAGE = """
v4jax bench kernels compiles each kernel for a TPU that need not be there (libtpu, the [tpu] extra)
and reads the compiler's final schedule. It is not a measurement: one bundle counts as one cycle, a
loop as long as the matrix units need for its products, and waiting for memory is not in it; what
the bytes alone would take stands in the last column.

  v4jax bench kernels --topology=v6e:2x2
  v4jax bench kernels --topology=v5p:2x2x1 --model=v4_pro --only=dense_attention,indexer
  v4jax bench kernels --only=grouped_matmul/v4_flash/prefill_fp4 --loops
  v4jax bench kernels --json > figures.json

share    FLOPs that the result needs over cycles times the peak of one core: 131,072 per cycle on
         v5e and v5p, 524,288 on v6e and tpu7x. Every loop counts with its rounds.
inner    the loop that does most of the matrix work, one round of it: FLOPs as issued, padded rows
         included; a loop with others inside counts its own bundles from the first product to the
         last. "of all cycles" is its part of the whole kernel.
bound    what the shape allows: 64 rows of heads on a unit 256 wide fill a quarter of it.
≥        the share to reach; the figure before it is green when it does, else red.
A core is meant: v5p and its like have two to a device, and share a kernel whose grid is parallel.

Rounds that depend on data are stated with the case and printed below the table; where they are not
known the figures of the whole are left out. --loops shows every loop by its place.
"""
WHAT = ("kernels",)
PLAIN_WIDTH = 160  # columns where the output is no terminal


def define(flags: Any, values: Any) -> None:
    """Defines the flags."""
    flags.DEFINE_string(
        "topology",
        "v6e:2x2",
        "TPU to compile for, such as v5e:2x2, v5p:2x2x1, v6e:2x2 or tpu7x:2x2x1.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "model",
        ["v4_flash"],
        "Released models whose sizes are compiled: v4_flash, v4_pro, or both.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "only",
        [],
        "Cases whose name (operation/model/shape) contains one of these words.",
        flag_values=values,
    )
    flags.DEFINE_boolean(
        "loops", False, "Print every loop of every kernel below the table.", flag_values=values
    )
    flags.DEFINE_boolean("list", False, "Print the cases; compile nothing.", flag_values=values)
    flags.DEFINE_string(
        "keep", None, "Folder that keeps the compiler's text, by case.", flag_values=values
    )
    flags.DEFINE_boolean("json", False, "Print JSON instead of a table.", flag_values=values)


def run(values: Any, positional: list[str]) -> int:
    """Prints the table; 1 if a case did not compile."""
    from v4jax.errors import RequestError, UnsupportedError
    from v4jax.kernels import dispatch
    from v4jax.planning import ahead_of_time, kernel_cases, schedule

    if positional != ["kernels"]:
        got = " ".join(positional) or "nothing"
        raise RequestError(f"say what to bench, one of {WHAT}, got {got}; v4jax bench kernels")
    unknown = [model for model in values.model if model not in kernel_cases.MODELS]
    if unknown:
        raise RequestError(f"--model must be among {kernel_cases.MODELS}, got {unknown[0]!r}")
    core = schedule.core_of(values.topology)
    with dispatch.compiling_for("tpu", core.device):  # tiles and loops may depend on it
        cases = kernel_cases.select(tuple(values.model), tuple(values.only))
    if values.list:
        print("\n".join(case.key for case in cases))
        return 0
    reason = ahead_of_time.why_unavailable()
    if reason is not None:
        raise UnsupportedError(f"bench kernels needs the TPU compiler: {reason}")
    figures, failures = [], {}
    for case in _progress(cases):
        keep = values.keep and pathlib.Path(values.keep, case.key.replace("/", "-"))
        try:
            figures += schedule.measure(values.topology, case, keep)
        except UnsupportedError as error:
            failures[case.key] = str(error)
    if values.json:
        _print_json(values.topology, core, figures, failures)
    else:
        _print_table(values.topology, figures, failures, values.loops)
    return 1 if failures else 0


def _progress(cases: list) -> Any:
    """Yields the cases; announces each on stderr, since one takes up to some minutes."""
    from v4jax import log

    for number, case in enumerate(cases, 1):
        log.info(f"bench: {number} of {len(cases)}, compiling {case.key}")
        yield case


def _print_json(topology: str, core: Any, figures: list, failures: dict[str, str]) -> None:
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


def _print_table(topology: str, figures: list, failures: dict[str, str], loops: bool) -> None:
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


def _cells(row: Any) -> list[str]:
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


def _describe_loops(row: Any) -> list[str]:
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
