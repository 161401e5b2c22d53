"""What the devices of a mesh send each other in a step, read off its trace.

Times are at best: every link of a chip is busy, and latency is not counted.
"""

import dataclasses

from v4jax.costs.chips import Topology
from v4jax.planning.collectives import Message
from v4jax.planning.step_trace import trace_step
from v4jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of a step of one kind over the same mesh axes.

    count: collectives in a step. sent_bytes: by one device, over links and network. network_bytes:
    those over the data-center network between slices. seconds: one collective after the other.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    sent_bytes: float
    network_bytes: float
    seconds: float


def count_traffic(work: Workload) -> list[Traffic]:
    """Returns what a step sends, slowest first. An even load of the experts is assumed."""
    sums: dict[tuple, list[float]] = {}
    for message, count in trace_step(work).messages:
        sent, network, seconds = send(message, work.topology, work.sizes)
        row = sums.setdefault((message.kind, message.axes), [0, 0.0, 0.0, 0.0])
        for place, value in enumerate((1, sent, network, seconds)):
            row[place] += value * count
    rows = [Traffic(kind, axes, int(row[0]), *row[1:]) for (kind, axes), row in sums.items()]
    return sorted(rows, key=lambda traffic: -traffic.seconds)


def send(message: Message, topology: Topology, mesh: dict[str, int]) -> tuple[float, float, float]:
    """Returns (bytes sent, bytes sent between slices, seconds) of one collective on one device.

    For an operand of s bytes, a device in a ring of n sends (n−1)·s in an all-gather, (n−1)/n·s in
    a reduce-scatter, twice that in an all-reduce, and (n−1)/n·s over `mean_hops` links each in an
    all-to-all. Slices split the axis `data`; what crosses them is reduced inside a slice first, or
    spread there afterwards.
    """
    devices = 1
    for axis in message.axes:
        devices *= mesh[axis]
    slices = topology.slices if "data" in message.axes else 1
    inner, size = devices // slices, float(message.operand_bytes)
    per_device = topology.chip.link_bytes_per_second / topology.chip.devices
    network_rate = topology.chip.network_bytes_per_second / topology.chip.devices
    sent = _ring_bytes(message.kind, size, inner)
    network = 0.0
    if slices > 1:
        crossing = size / inner if message.kind in ("all-reduce", "reduce-scatter") else size
        network = _ring_bytes(message.kind, crossing, slices)
        if message.kind == "all-gather":  # what came over the network is spread inside the slice
            sent = _ring_bytes("all-gather", size * slices, inner)
    hops = _hops(topology, inner) if message.kind == "all-to-all" else 1.0
    return sent + network, network, sent * hops / per_device + network / network_rate


def _ring_bytes(kind: str, size: float, devices: int) -> float:
    if devices == 1:
        return 0.0
    return {
        "all-gather": size * (devices - 1),
        "reduce-scatter": size * (devices - 1) / devices,
        "all-reduce": 2 * size * (devices - 1) / devices,
        "all-to-all": size * (devices - 1) / devices,
        "permute": size,
    }[kind]


def _hops(topology: Topology, devices: int) -> float:
    """Returns the mean hops in the usual slice of as many chips as the collective spans."""
    chips = -(-devices // topology.chip.devices)
    if chips == topology.chips // topology.slices:
        return dataclasses.replace(topology, slices=1).mean_hops
    shape = topology.chip.shapes.get(chips)
    return Topology(topology.chip, shape).mean_hops if shape else topology.mean_hops
