"""What would make a plan fit: another split of the mesh, fewer or shorter sequences, more chips.

Candidates are ranked with weights, cache and optimizer counted and activations scaled by tokens;
the one proposed is traced, so that its figure is as good as the plan's own.
"""

import dataclasses
import math
from collections.abc import Iterator

from v4jax.costs import chips
from v4jax.errors import ConfigError
from v4jax.parallel.axes import MESH_AXES
from v4jax.parallel.mesh import divisors
from v4jax.planning import memory
from v4jax.planning.memory import DeviceBytes
from v4jax.planning.workload import Workload

_TRIALS = 3  # candidates traced before a kind of change is given up


@dataclasses.dataclass(frozen=True)
class Remedy:
    """One change that makes the plan fit: what to change, and the bytes of a device then."""

    change: str
    device_bytes: int


def find_remedies(work: Workload, needed: DeviceBytes) -> list[Remedy]:
    """Returns the smallest change of each kind that would fit, cheapest kind first.

    Args:
      needed: bytes of `work` itself, with its activations.
    """
    activations = sum(needed.activations.values())
    kinds = (
        ("mesh", _other_meshes(work), lambda w: f"--mesh={w.mesh_name}"),
        ("chunk", _shorter_chunks(work), lambda w: f"--chunk={w.chunk}"),
        ("batch", _smaller_batches(work, needed), lambda w: f"--batch={w.batch}"),
        ("context", _shorter_contexts(work), lambda w: f"--context={w.context}"),
        ("chips", _more_chips(work), _describe_chips),
    )
    found = []
    for _, candidates, describe in kinds:
        fitting = _first_fitting(work, candidates, activations)
        if fitting is not None:
            found.append(Remedy(describe(fitting[0]), fitting[1]))
    return found


def _describe_chips(work: Workload) -> str:
    topology = work.topology
    size = "x".join(map(str, topology.shape))
    return f"--topology={topology.chip.name}:{size} --mesh={work.mesh_name}"


def _first_fitting(
    work: Workload, candidates: Iterator[Workload], activations: int
) -> tuple[Workload, int] | None:
    limit, trials = work.topology.chip.device_limit_bytes, 0
    for candidate in candidates:
        if quick_bytes(candidate, work, activations) > limit:
            continue
        total = memory.count_bytes(candidate).total
        if total <= limit:
            return candidate, total
        trials += 1
        if trials == _TRIALS:
            return None
    return None


def quick_bytes(candidate: Workload, known: Workload, activations: int) -> float:
    """Returns the bytes of a candidate, its activations scaled from those of a traced plan."""
    tokens = candidate.local_batch * candidate.local_tokens
    scale = tokens / (known.local_batch * known.local_tokens)
    return memory.count_bytes(candidate, traced=False).total + activations * scale


def largest_batch(work: Workload, needed: DeviceBytes) -> int:
    """Returns the largest number of sequences that would fit, activations scaled; 0 if none."""
    step = work.parts("batch")
    activations = sum(needed.activations.values())

    def fits(count: int) -> bool:
        candidate = dataclasses.replace(work, batch=count * step)
        return quick_bytes(candidate, work, activations) <= work.topology.chip.device_limit_bytes

    low, high = 0, 1
    while high <= 2**20 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * step


def _checked(build) -> Workload | None:
    try:
        work = build()
        memory.weight_bytes(work)
        return work
    except ConfigError:
        return None


def _other_meshes(work: Workload) -> Iterator[Workload]:
    """Yields valid meshes of the same devices, those nearest to the mesh asked for first."""

    def distance(sizes: dict[str, int]) -> float:
        return sum(abs(math.log2(sizes[axis] / work.sizes[axis])) for axis in MESH_AXES)

    meshes = [sizes for sizes in split_devices(work.topology.devices) if sizes != work.sizes]
    for sizes in sorted(meshes, key=distance):
        candidate = _checked(lambda sizes=sizes: work.with_mesh(sizes))
        if candidate is not None:
            yield candidate


def split_devices(devices: int) -> Iterator[dict[str, int]]:
    """Yields every mesh of so many devices."""
    for data in divisors(devices):
        for expert in divisors(devices // data):
            for context in divisors(devices // data // expert):
                tensor = devices // data // expert // context
                yield dict(zip(MESH_AXES, (data, expert, context, tensor), strict=True))


def _shorter_chunks(work: Workload) -> Iterator[Workload]:
    chunk = work.chunk
    while work.regime == "prefill" and chunk % 2 == 0:
        chunk //= 2
        candidate = _checked(lambda chunk=chunk: work.with_chunk(chunk))
        if candidate is None:
            return
        yield candidate


def _smaller_batches(work: Workload, needed: DeviceBytes) -> Iterator[Workload]:
    step = work.parts("batch")
    largest = largest_batch(work, needed)
    for batch in range(largest, max(0, largest - _TRIALS * step), -step):
        yield dataclasses.replace(work, batch=batch)


def _shorter_contexts(work: Workload) -> Iterator[Workload]:
    context = work.context
    while context >= 2 * max(1024, work.context // 64):
        context //= 2
        candidate = _checked(lambda context=context: work.with_context(context))
        if candidate is not None:
            yield candidate


def _more_chips(work: Workload) -> Iterator[Workload]:
    for topology in chips.larger(work.topology):
        factor, rest = divmod(topology.devices, work.topology.devices)
        if rest:
            continue
        for axis in ("expert", "context", "data", "tensor"):
            sizes = work.sizes | {axis: work.sizes[axis] * factor}
            candidate = _checked(lambda sizes=sizes, to=topology: work.with_mesh(sizes, to))
            if candidate is not None:
                yield candidate
