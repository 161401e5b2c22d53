"""The step of a workload, compiled by the real TPU compiler: its bytes and its collectives.

The program is the sharded one that would run, on a mesh of described devices. Nothing is executed:
these are the compiler's statements, not measurements.
"""

import dataclasses
import time

from v4jax import log
from v4jax.errors import UnsupportedError
from v4jax.parallel.mesh import make_mesh
from v4jax.planning import ahead_of_time
from v4jax.planning.collectives import Collective, count_collectives
from v4jax.planning.memory import DeviceBytes
from v4jax.planning.programs import build_program
from v4jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one device's program.

    argument_bytes: weights, cache and inputs. output_bytes: results that are not written over
    arguments. peak_bytes: arguments, outputs and temporaries at the fullest moment. flops: by the
    compiler's cost analysis, which sees neither into kernels nor how often a loop of unknown length
    runs. seconds: of tracing and compiling, by the clock. cpu_seconds: the same in the time of
    processor cores, which other work on the machine does not lengthen.
    """

    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    peak_bytes: int
    code_bytes: int
    flops: float
    collectives: list[Collective]
    seconds: float
    cpu_seconds: float

    @property
    def total(self) -> int:
        """Bytes of a device while the step runs."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes + self.code_bytes


def compile_step(work: Workload) -> Compiled:
    """Compiles one step of a workload for its topology; takes minutes.

    Raises:
      UnsupportedError: libtpu is missing, the chip is no TPU, or there are several slices.
      jax.errors.JaxRuntimeError: the compiler refuses, as where memory overflows; it says why.
    """
    if work.topology.chip.platform != "tpu":
        raise UnsupportedError(
            f"--compile needs a TPU topology, got {work.topology.name}; there is no compiler for "
            "GPUs without a GPU"
        )
    if work.topology.slices > 1:
        raise UnsupportedError("--compile takes one slice; leave --slices away")
    devices = ahead_of_time.describe(work.topology.name).devices
    layout = dataclasses.replace(work.layout, mesh=make_mesh(**work.sizes, devices=devices))
    start, cpu_start = time.perf_counter(), time.process_time()
    with log.phase("plan", f"compiling for {work.topology.name}") as phase:
        function, arguments = build_program(work, layout)
        compiled = function.lower(*arguments).compile()
        phase.note("compiled")
    text = compiled.as_text()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Compiled(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        collectives=count_collectives(text),
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
    )


def as_text(compiled: Compiled, held: DeviceBytes) -> str:
    """Returns the compiler's statements, its bytes beside the plan's."""
    size = log.format_bytes
    arguments = held.arguments
    lines = [
        f"compiled in {log.format_seconds(compiled.seconds)}, "
        f"{log.format_seconds(compiled.cpu_seconds)} of a core (the compiler's statements, not a "
        "measurement)",
        f"  {'':<13}{'compiler':>10}{'plan':>11}",
        f"  {'arguments':<13}{size(compiled.argument_bytes):>10}{size(arguments):>11}"
        "  weights, cache, optimizer state",
        f"  {'temporaries':<13}{size(compiled.temporary_bytes):>10}"
        f"{size(held.total - arguments):>11}  activations, gradients",
        f"  {'outputs':<13}{size(compiled.output_bytes):>10}{'':>11}  not written over arguments",
        f"  {'code':<13}{size(compiled.code_bytes):>10}",
        f"  {'total':<13}{size(compiled.total):>10}{size(held.total):>11}",
        f"  {'at its peak':<13}{size(compiled.peak_bytes):>10}"
        f"{'':>11}  arguments, outputs and temporaries at once",
        f"  operations outside kernels, loops once: {compiled.flops / 1e9:,.3f} GFLOP",
    ]
    for item in compiled.collectives:
        lines.append(
            f"  {item.kind:<19}{item.count:>5} times{size(item.result_bytes):>11} of results"
        )
    return "\n".join(lines)
