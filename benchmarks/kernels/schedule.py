"""How the TPU compiler schedules the kernels: cycles of their loops, not a measurement.

A child process compiles a case for a topology, because the compiler writes its bundles only when
told so before it is loaded. `bundles` reads loops and branches from them, and `figures` counts.
Bundles do not show waiting for memory: `memory_cycles` says what the bytes alone would take.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jax

from benchmarks.kernels import cases
from benchmarks.kernels.cases import Case
from benchmarks.kernels.figures import Core, KernelFigures, Traced, core_of, count
from v4jax.errors import UnsupportedError
from v4jax.planning import ahead_of_time

_DUMP = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true " + (
    "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
)
_PALLAS = 'custom_call_target="tpu_custom_call"'


def measure(topology: str, case: Case, keep: pathlib.Path | None = None) -> list[KernelFigures]:
    """Returns the figures of every Pallas kernel of a case.

    Args:
      keep: folder that keeps the compiler's text; a temporary one is removed.

    Raises:
      UnsupportedError: libtpu is missing or knows no such topology, or refuses the case.
    """
    core = core_of(topology)
    reason = ahead_of_time.why_unavailable()
    if reason is not None:
        raise UnsupportedError(f"compiling for {topology} needs the TPU compiler: {reason}")
    folder = pathlib.Path(keep or tempfile.mkdtemp(prefix="v4jax-bench-"))
    try:
        _compile(topology, case, folder)
        return read_folder(folder, core, case)
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def _compile(topology: str, case: Case, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    root = pathlib.Path(__file__).parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(paths),
        "LIBTPU_INIT_ARGS": _DUMP.format(folder=folder),
    }
    command = [sys.executable, "-m", "benchmarks.kernels.schedule", topology, case.key]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-12:]
        raise UnsupportedError(
            f"{case.key} does not compile for {topology}; the compiler's last words:\n  "
            + "\n  ".join(line[:400] for line in last)
        )


def read_folder(folder: pathlib.Path, core: Core, case: Case) -> list[KernelFigures]:
    """Returns the figures of the Pallas kernels whose bundles are in `folder`."""
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
        figures.append(count(text.read_text(errors="replace"), core, case, name, call))
    if not figures:
        raise UnsupportedError(
            f"the compiler wrote no bundles of a Pallas kernel for {case.key}; the reference ran "
            "instead, or libtpu no longer writes them"
        )
    return figures


def _called(calls: list[Traced], name: str, result: tuple[int, ...]) -> Traced | None:
    """Returns the call that became the compiler's `name`, which contains the kernel's own name."""
    own = max((call.name for call in calls if call.name in name), key=len, default=None)
    found = [call for call in calls if call.name == own]
    return next((call for call in found if call.result == result), found[0] if found else None)


def trace(case: Case) -> list[Traced]:
    """Returns the Pallas calls of a case, in order."""
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
    """Compiles one case in the child process; the compiler's files are the result."""
    case = cases.find(key, core_of(topology).target)
    ahead_of_time.compile_for(topology, case.function, *case.arguments)


if __name__ == "__main__":
    _compile_here(*sys.argv[1:])
