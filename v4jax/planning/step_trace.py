"""The step of a workload, traced as one device runs it: its memory and its collectives.

The program is the one that would run, with the chip's kernels, on a mesh without devices. What it
holds and sends is read off the trace.
"""

import dataclasses
import functools
import math

import jax

from v4jax.costs.inventory import device_bytes
from v4jax.parallel.expert_parallel import even_rounds
from v4jax.planning.collectives import Message, trace_collectives
from v4jax.planning.liveness import peak_bytes
from v4jax.planning.programs import build_program
from v4jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """A step on one device.

    peak_bytes: at its fullest moment, beside its arguments. messages: what it puts into
    collectives, and how often; an even load of the experts is assumed.
    """

    peak_bytes: int
    messages: tuple[tuple[Message, int], ...]


@functools.lru_cache(maxsize=64)
def trace_step(work: Workload) -> StepTrace:
    """Returns the trace of one step; takes some seconds."""
    function, arguments = build_program(work, work.layout)
    traced = function.trace(*arguments)
    arrays = [leaf for leaf in jax.tree.leaves(arguments) if hasattr(leaf, "shape")]
    donated = [info.donated for info in jax.tree.leaves(traced.args_info)]
    tokens = work.local_batch * math.ceil(work.chunk / work.parts("tokens"))
    rounds = even_rounds(tokens * work.config.num_experts_per_tok)
    return StepTrace(
        peak_bytes(traced.jaxpr, [device_bytes(array) for array in arrays], donated),
        tuple(trace_collectives(traced.jaxpr, work.layout.mesh.shape, rounds).items()),
    )
