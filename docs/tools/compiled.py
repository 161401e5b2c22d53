"""The table of compiled steps in docs/planning.md, made by the TPU compiler (libtpu).

    python -m docs.tools.compiled                  compiles the cases that have no row yet
    python -m docs.tools.compiled flash_train_4k   compiles this one again
    python -m docs.tools.compiled --estimates      only plans all rows again

The document has the table between two marks; its rows are kept in the JSON file beside it. Both are
written after every case: a run that was interrupted continues with the next one. A case whose
description has changed counts as new.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from v4jax import log
from v4jax.config import get_numerics
from v4jax.config.loading import load_model_config
from v4jax.config.run import parse_mesh
from v4jax.costs import chips
from v4jax.errors import RequestError, V4JaxError
from v4jax.planning import memory, workload
from v4jax.planning.compile import compile_step
from v4jax.planning.workload import Workload

BEGIN, END = "<!-- docs.tools.compiled: begin -->", "<!-- docs.tools.compiled: end -->"
_GIB = 2**30
_MILLION = 1 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: `Workload` by its names; chips of a topology with two devices count once.

    offload: names with commas between.
    """

    model: str
    topology: str
    mesh: str
    regime: str
    context: int
    batch: int
    chunk: int | None = None
    training: str = "adamw"
    offload: str = ""

    def workload(self) -> Workload:
        """Returns what the row plans."""
        trains = self.regime == "train"
        return workload.build_workload(
            load_model_config(self.model),
            get_numerics("bfloat16" if trains else "released"),
            topology=chips.parse_topology(self.topology),
            mesh=parse_mesh(self.mesh).sizes,
            regime=self.regime,
            context=self.context,
            batch=self.batch,
            chunk=self.chunk,
            training=self.training,
            offload=tuple(filter(None, self.offload.split(","))),
        )


def _serving(model: str, topology: str, mesh: str, sequences: int) -> dict[str, Case]:
    """Returns the cases of a million tokens: a prefill chunk of one sequence, decode of several."""
    name = f"{model.removeprefix('v4_')}_{{}}_{topology}"
    shape = model, topology, mesh
    return {
        name.format("prefill"): Case(*shape, "prefill", _MILLION, 1),
        name.format("decode"): Case(*shape, "decode", _MILLION, sequences),
    }


# Training steps of 2¹⁹ tokens, 4096 on every chip whatever the length of a sequence.
_SHAPE = "v4_flash", "v5p:4x4x8", "data=4,expert=32", "train"
CASES: Mapping[str, Case] = {
    "flash_train_4k": Case(*_SHAPE, 4096, 128),
    "flash_train_32k": Case(*_SHAPE, 32768, 16),
    "flash_train_128k": Case(*_SHAPE, 131072, 4),
    **_serving("v4_flash", "v6e-16", "expert=16", 8),
    **_serving("v4_flash", "v5p-16", "expert=8", 32),
    **_serving("v4_flash", "tpu7x-8", "expert=8", 32),
    **_serving("v4_pro", "v6e-64", "expert=32,tensor=2", 8),
    **_serving("v4_pro", "v5p-64", "expert=32", 32),
    **_serving("v4_pro", "tpu7x-32", "expert=32", 32),
    "flash_lora_128k": Case(
        *("v4_flash", "v6e-16", "expert=16", "train", 131072, 1),
        training="lora",
        offload="streams",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles cases and prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m docs.tools.compiled",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a case to compile again")
    parser.add_argument(
        "--document",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parents[1] / "planning.md",
        help="page with the table; its rows are kept in the JSON file beside it",
    )
    parser.add_argument(
        "--estimates", action="store_true", help="compile nothing; plan all rows again"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    options = parser.parse_args(arguments)
    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")  # nothing runs: leave accelerators alone
    try:
        rows = (
            plan_again(options.document)
            if options.estimates
            else fill(options.document, options.names)
        )
    except V4JaxError as error:
        print(f"docs.tools.compiled: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=2) if options.json else as_markdown(rows))
    return 0


def fill(document: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """Compiles cases one after the other; returns all rows, which the document then shows.

    Args:
      document: Markdown with the marks `BEGIN` and `END`; its rows are kept in the JSON file beside
        it. Both are written after every case.
      names: cases to compile; none: all that have no row yet.

    Raises:
      RequestError: there is no case of a name, or no mark in the document.
    """
    unknown = sorted(set(names) - CASES.keys())
    if unknown:
        raise RequestError(f"no case {unknown[0]!r} in the table; it has {', '.join(CASES)}")
    kept = document.with_suffix(".json")
    rows = read(kept)
    write(document, rows)  # says that a mark is missing before hours of compiling
    wanted = names or [name for name in CASES if name not in rows]
    for number, name in enumerate(wanted, 1):
        log.info(f"plan: case {number} of {len(wanted)}: {name}")
        rows[name] = compile_case(CASES[name])
        rows = {name: rows[name] for name in CASES if name in rows}
        kept.write_text(json.dumps(rows, indent=1) + "\n")
        write(document, rows)
        jax.clear_caches()
    return rows


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the rows of a file whose cases have not changed; none without the file."""
    rows = json.loads(path.read_text()) if path.exists() else {}
    return {
        name: rows[name]
        for name, case in CASES.items()
        if name in rows and Case(**rows[name]["case"]) == case
    }


def plan_again(document: pathlib.Path) -> dict[str, Any]:
    """Returns all rows with today's estimates; nothing is compiled."""
    kept = document.with_suffix(".json")
    rows = read(kept)
    for number, (name, row) in enumerate(rows.items(), 1):
        log.info(f"plan: case {number} of {len(rows)}: {name}")
        row["estimate"] = estimate(CASES[name].workload())
    kept.write_text(json.dumps(rows, indent=1) + "\n")
    write(document, rows)
    return rows


def estimate(work: Workload) -> dict[str, Any]:
    """Returns the plan's bytes as a row keeps them."""
    held = memory.count_bytes(work)
    return dataclasses.asdict(held) | {"arguments": held.arguments, "total": held.total}


def compile_case(case: Case) -> dict[str, Any]:
    """Returns a row: the case, the compiler's statements or its refusal, and the estimate."""
    work = case.workload()
    row = {
        "case": dataclasses.asdict(case),
        "chunk": work.chunk,
        "chips": work.topology.chips,
        "limit_bytes": work.topology.chip.device_limit_bytes,
        "estimate": estimate(work),
        "versions": {name: _version(name) for name in ("jax", "libtpu")},
    }
    try:
        compiled = compile_step(work)
    except jax.errors.JaxRuntimeError as error:
        return row | {"refused": str(error).splitlines()[0]}
    return row | {"compiled": dataclasses.asdict(compiled) | {"total": compiled.total}}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def as_markdown(rows: Mapping[str, Any]) -> str:
    """Returns the table of rows; sizes in GiB of one device."""
    if not rows:
        return "No case is compiled yet."
    lines = [
        "| case | chips | mesh | a step | arguments | temporaries | at its peak | of | plan "
        "| compiled in |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        case = row["case"]
        first = f"| {name} | {row['chips']} {case['topology'].split('-')[0].split(':')[0]} "
        first += f"| {case['mesh']} | {_describe_step(row)} "
        limit, planned = _gib(row["limit_bytes"]), row["estimate"]
        plan = _gib(planned["arguments"]) + " + " + _gib(planned["total"] - planned["arguments"])
        if "refused" in row:
            said = row["refused"].replace("|", "/")
            lines.append(f"{first}| refused: {said} | | | {limit} | {plan} | |")
            continue
        found = row["compiled"]
        most, peak = _peak_bytes(found)
        temporaries = most + _gib(peak - found["argument_bytes"])
        spent = f"{found['seconds'] / 60:.1f} min, {found['cpu_seconds'] / 60:.1f} of a core"
        cells = _gib(found["argument_bytes"]), temporaries, f"**{most}{_gib(peak)}**"
        lines.append(first + "".join(f"| {cell} " for cell in (*cells, limit, plan, spent)) + "|")
    return "\n".join(lines)


def _peak_bytes(found: Mapping[str, Any]) -> tuple[str, float]:
    """Returns "" and the peak, or "≤ " and the sum of all bytes in rows without a peak."""
    return ("", found["peak_bytes"]) if "peak_bytes" in found else ("≤ ", found["total"])


def _describe_step(row: Mapping[str, Any]) -> str:
    case = row["case"]
    sequences = f"{case['batch']} sequence{'s' if case['batch'] > 1 else ''}"
    of = {"prefill": f"{row['chunk']:,} of ", "decode": "1 of ", "train": ""}[case["regime"]]
    how = f", {case['training']}" if case["regime"] == "train" else ""
    how += f", {case['offload']} offloaded" if case.get("offload") else ""
    return f"{case['regime']}: {of}{case['context'] // 1024:,} K tokens, {sequences}{how}"


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"


def write(path: pathlib.Path, rows: Mapping[str, Any]) -> None:
    """Puts the table between the marks of a document.

    Raises:
      RequestError: the document has no marks.
    """
    text = path.read_text() if path.exists() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise RequestError(
            f"{path} must hold the lines {BEGIN!r} and {END!r}; the table goes between"
        )
    path.write_text(f"{before}{BEGIN}\n{as_markdown(rows)}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
