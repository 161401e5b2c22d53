"""What would make a plan fit: another mesh, fewer or shorter sequences, more chips.

Arguments of a candidate are counted. Its temporaries are those of the traced plan, scaled by the
tokens of a device: nothing is traced again.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from v4jax.costs import chips
from v4jax.errors import ConfigError
from v4jax.parallel.axes import MESH_AXES
from v4jax.parallel.mesh import divisors
from v4jax.planning import memory
from v4jax.planning.memory import DeviceBytes
from v4jax.planning.workload import Workload

Change = dict[str, Any]  # fields of a workload → their new values


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One change that makes the plan fit: what to change, and about how many bytes a device has."""

    change: str
    device_bytes: int


def find_remedies(work: Workload, held: DeviceBytes) -> list[Remedy]:
    """Returns the smallest change of each kind that would fit, cheapest kind first.

    Args:
      held: bytes of `work` itself.
    """
    kinds = (
        (_other_meshes(work), lambda w: f"--mesh={w.mesh_name}"),
        (_shorter_chunks(work), lambda w: f"--chunk={w.chunk}"),
        ([{"batch": largest_batch(work, held)}], lambda w: f"--batch={w.batch}"),
        (_shorter_contexts(work), lambda w: f"--context={w.context}"),
        (_more_chips(work), _describe_chips),
    )
    found = [_first_fitting(work, held, changes, describe) for changes, describe in kinds]
    return [remedy for remedy in found if remedy is not None]


def _first_fitting(
    work: Workload,
    held: DeviceBytes,
    changes: Iterable[Change],
    describe: Callable[[Workload], str],
) -> Remedy | None:
    for change in changes:
        try:
            candidate = work.changed(**change)
            size = expect_bytes(candidate, work, held)
        except ConfigError:  # a mesh that does not divide it, or no sequence at all
            continue
        if size <= work.topology.chip.device_limit_bytes:
            return Remedy(describe(candidate), round(size))
    return None


def expect_bytes(candidate: Workload, work: Workload, held: DeviceBytes) -> float:
    """Returns about how many bytes a device has of a candidate.

    Raises:
      ConfigError: a mesh axis does not divide what the code computes on.
    """
    tokens = candidate.local_batch * candidate.local_tokens
    scale = tokens / (work.local_batch * work.local_tokens)
    fixed = memory.count_arguments(candidate).arguments
    fixed += sum(memory.fixed_temporaries(candidate).values())
    return fixed + held.temporaries["activations"] * scale


def largest_batch(work: Workload, held: DeviceBytes) -> int:
    """Returns the largest number of sequences that would fit on the same mesh; 0 if none."""
    grows = sum(held.cache.values()) + held.temporaries["activations"]
    free = work.topology.chip.device_limit_bytes - (held.total - grows)
    return max(math.floor(free / grows * work.local_batch), 0) * work.parts("batch")


def _describe_chips(work: Workload) -> str:
    topology = work.topology
    size = "x".join(map(str, topology.shape))
    return f"--topology={topology.chip.name}:{size} --mesh={work.mesh_name}"


def _other_meshes(work: Workload) -> Iterator[Change]:
    """Yields meshes of the same devices, those nearest to the mesh asked for first."""

    def distance(sizes: dict[str, int]) -> float:
        return sum(abs(math.log2(sizes[axis] / work.sizes[axis])) for axis in MESH_AXES)

    meshes = [sizes for sizes in split_devices(work.topology.devices) if sizes != work.sizes]
    yield from ({"mesh": sizes} for sizes in sorted(meshes, key=distance))


def split_devices(devices: int) -> Iterator[dict[str, int]]:
    """Yields every mesh of so many devices."""
    for data in divisors(devices):
        for expert in divisors(devices // data):
            for context in divisors(devices // data // expert):
                tensor = devices // data // expert // context
                yield dict(zip(MESH_AXES, (data, expert, context, tensor), strict=True))


def _shorter_chunks(work: Workload) -> Iterator[Change]:
    chunk = work.chunk
    while work.regime == "prefill" and chunk % 2 == 0:
        chunk //= 2
        yield {"chunk": chunk}


def _shorter_contexts(work: Workload) -> Iterator[Change]:
    context = work.context
    while context >= 2 * max(1024, work.context // 64):
        context //= 2
        yield {"context": context}


def _more_chips(work: Workload) -> Iterator[Change]:
    for topology in chips.larger(work.topology):
        factor, rest = divmod(topology.devices, work.topology.devices)
        if rest:
            continue
        for axis in ("expert", "context", "data", "tensor"):
            sizes = work.sizes | {axis: work.sizes[axis] * factor}
            yield {"mesh": sizes, "topology": topology}
