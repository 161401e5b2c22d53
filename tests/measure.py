"""Where the suite's time goes, by file: a Markdown table of all it takes at least a second for.

    python -m tests.measure -n 2 --dist loadfile -m "not slow and not oracle and not tpu_compiler"

Arguments go to pytest. A program counts as repeated where another test or process has compiled the
same one. Tests are timed with what they start; programs of processes they start are not counted.
"""

import collections
import hashlib
import json
import os
import pathlib
import sys
import tempfile
import time

import pytest

_FOLDER = "V4JAX_MEASURED"
_TRACING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")


def pytest_configure(config):
    """Counts what JAX traces and compiles in this process from here on."""
    import jax
    from jax._src import compiler

    compile_or_get_cached, spans = compiler.compile_or_get_cached, []

    def compile_counted(backend, computation, *arguments, **options):
        text = computation.operation.get_asm(enable_debug_info=False).encode()
        begin = time.perf_counter()
        program = compile_or_get_cached(backend, computation, *arguments, **options)
        seconds = time.perf_counter() - begin
        _write(config.measured, hash=hashlib.sha1(text).hexdigest(), compile=seconds)
        return program

    def add_span(event, seconds, **_):
        if event.endswith(_TRACING):
            begin = time.perf_counter() - seconds
            while spans and spans[-1][0] >= begin:  # functions traced within this one
                spans.pop()
            spans.append((begin, seconds))

    compiler.compile_or_get_cached = compile_counted
    jax.monitoring.register_event_duration_secs_listener(add_span)
    config.measured, config.spans = None, spans


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    """Writes what a test took."""
    config, begin, cpu = item.config, time.perf_counter(), _cpu_seconds()
    config.measured = item.nodeid.split("::")[0]
    config.spans.clear()
    yield
    traced = sum(seconds for _, seconds in config.spans)
    spent = dict(wall=time.perf_counter() - begin, cpu=_cpu_seconds() - cpu, trace=traced)
    _write(config.measured, tests=1, **spent)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _write(file, **fields):
    with open(f"{os.environ[_FOLDER]}/{os.getpid()}", "a") as lines:
        lines.write(json.dumps({"file": file} | fields) + "\n")


def main() -> int:
    """Runs pytest and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[_FOLDER], begin = folder, time.perf_counter()
        status = pytest.main(["-p", "tests.measure", *sys.argv[1:]])
        elapsed = time.perf_counter() - begin
        parts = [path.read_text().splitlines() for path in pathlib.Path(folder).iterdir()]
    totals, seen = collections.defaultdict(collections.Counter), set()
    for record in (json.loads(line) for part in parts for line in part):
        counts, found = totals[record.pop("file")], record.pop("hash", None)
        counts.update(record)
        if found:
            counts.update(programs=1, repeated=found in seen)
            seen.add(found)
    print("\n| file | tests | wall s | CPU s | tracing s | compiling s | programs | repeated |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    _print_row(f"all, in {elapsed:,.0f} s", sum(totals.values(), collections.Counter()))
    for file, counts in sorted(totals.items(), key=lambda item: -item[1]["cpu"]):
        if max(counts["cpu"], counts["wall"]) >= 1:
            _print_row(f"`{file.removeprefix('tests/')}`", counts)
    return status


def _print_row(name, counts):
    names = ("tests", "wall", "cpu", "trace", "compile", "programs", "repeated")
    print(f"| {name} |", " | ".join(f"{counts[name]:,.0f}" for name in names), "|")


if __name__ == "__main__":
    sys.exit(main())
