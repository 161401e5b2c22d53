"""Lower bounds of a step's time: operations, memory bytes and link bytes at the chip's peaks.

A device does its share of a step's operations: its tokens and sequences, heads, experts and
entries. Work that the mesh does not split is repeated on every device.
"""

import dataclasses
from collections.abc import Callable

from v4jax.cache.formats import entry_format
from v4jax.config import LayerKind
from v4jax.costs import flops
from v4jax.costs.inventory import MTP, count_layers, device_bytes
from v4jax.model import take_inventory
from v4jax.planning import communication, memory
from v4jax.planning.programs import sharded_weights
from v4jax.planning.workload import Workload

# Rules (of weights) over which a component's products are split; others repeat along them.
_SPLIT_BY = {
    "attention projections": ("heads",),
    "sparse attention": ("heads",),
    "dense attention": ("heads",),
    "shared expert": ("expert_width",),
    "head": ("vocab",),
}
_STREAM_PASSES = 3  # a site reads the streams to mix them, reads and writes them to expand


@dataclasses.dataclass(frozen=True)
class Times:
    """Lower bounds of a step's seconds; the largest one counts.

    flops: operations of one device by component. memory_bytes: what one device reads and writes.
    traffic: collectives. draft_bytes, draft_seconds: what a draft of all sequences reads on one
    device, and how long that takes; not part of the step.
    """

    flops: dict[str, float]
    memory_bytes: dict[str, float]
    traffic: list[communication.Traffic]
    compute_seconds: float
    memory_seconds: float
    link_seconds: float
    draft_bytes: float = 0.0
    draft_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """The lower bound of a step, with everything overlapped."""
        return max(self.compute_seconds, self.memory_seconds, self.link_seconds)

    @property
    def bound(self) -> str:
        """What sets the bound."""
        pairs = (
            (self.compute_seconds, "compute"),
            (self.memory_seconds, "memory"),
            (self.link_seconds, "links"),
        )
        return max(pairs)[1]


def estimate(work: Workload) -> Times:
    """Returns the floor of a step: the last one of a decode, the mean chunk of a prefill."""
    chip = work.topology.chip
    operations = device_flops(work)
    moved = device_traffic(work)
    traffic = communication.count_traffic(work)
    # All products run in bfloat16; FP8 and FP4 are expanded before the matrix unit.
    peak = chip.bf16_flops_per_second / chip.devices
    bytes_per_second = chip.hbm_bytes_per_second / chip.devices
    drafted = _draft_read(work) if work.regime == "decode" else 0.0
    return Times(
        flops=operations,
        memory_bytes=moved,
        traffic=traffic,
        compute_seconds=sum(operations.values()) / peak,
        memory_seconds=sum(moved.values()) / bytes_per_second,
        link_seconds=sum(item.seconds for item in traffic),
        draft_bytes=drafted,
        draft_seconds=drafted / bytes_per_second,
    )


def count_sequence(work: Workload) -> list[flops.Work]:
    """Returns the operations of one sequence in one step."""
    inventory, context = take_inventory(work.config, work.storage), work.context
    if work.regime == "decode":
        return flops.count_tokens(inventory, context - 1, context, draft_keys=True)
    if work.regime == "train":
        return flops.count_training(inventory, context, remat=True)
    whole = flops.count_tokens(inventory, 0, context, draft_keys=True)
    return [item.times(min(work.chunk / context, 1.0)) for item in whole]


def device_flops(work: Workload) -> dict[str, float]:
    """Returns the operations of one device in a step, by component."""
    sums: dict[str, float] = {}
    for component, total in flops.by_component(count_sequence(work)).items():
        sums[component] = total * work.batch / _parts(work, component)
    return sums


def _parts(work: Workload, component: str) -> float:
    """Returns over how many devices the work of a step is spread."""
    sequences = work.parts("batch") * work.parts("tokens")
    if component == "routed experts":
        # Devices that share experts and have different tokens compute for each other.
        axes = {*work.layout.array_axes("batch", work.tokens)}
        axes |= {*work.layout.array_axes("tokens", work.tokens)}
        experts = work.layout.weight_axes("experts")
        repeated = tuple(axis for axis in experts if axis not in axes)
        return sequences * work.layout.size(repeated) * work.weight_parts("expert_width")
    parts = sequences
    for name in _SPLIT_BY.get(component, ()):
        parts *= work.weight_parts(name)
    if component in ("index scores", "selection", "sparse attention", "dense attention"):
        parts *= work.parts("read_entries")
    return parts


def device_traffic(work: Workload) -> dict[str, float]:
    """Returns the bytes of memory that one device reads and writes in a step, by kind.

    Each pass reads every weight once, but only those routed experts that some token chose. Selected
    entries are read once per query, everything else in the cache once.
    """
    passes = 3 if work.regime == "train" else 1
    config = work.config
    tokens = work.local_batch * work.local_tokens
    width = config.hc_mult * config.hidden_size * 2
    moved = {
        "weights": passes * _weights_read(work),
        "streams": passes * _STREAM_PASSES * 2.0 * config.num_hidden_layers * tokens * width,
    }
    if work.regime != "decode":
        moved["selected entries"] = passes * _selected_bytes(work, tokens)
    if work.regime == "train":
        state = memory.count_arguments(work).optimizer
        gradients = memory.fixed_temporaries(work)["gradients"]
        moved["optimizer"] = 2.0 * (sum(state.values()) + gradients)
    else:
        moved["cache"] = float(_cache_read(work))
    return moved


def _weights_read(work: Workload) -> float:
    """Returns bytes of weights that a step reads on one device.

    An MTP block runs in training. In serving, and of a draft module, only what makes keys does.
    """

    def reads(weight) -> bool:
        if weight.component == MTP and work.regime == "train":
            return True
        if weight.drafts:
            return work.regime != "train" and weight.makes_draft_keys
        return weight.component != "embedding"

    return _read(work, reads, work.step_tokens)


def _draft_read(work: Workload) -> float:
    """Returns bytes of weights that a draft of every sequence reads on one device."""
    rows = work.batch * work.config.draft_tokens
    return _read(work, lambda weight: weight.drafts or weight.path == "head", rows) if rows else 0.0


def _read(work: Workload, reads: Callable, tokens: int) -> float:
    """Returns the bytes of the weights that `reads` says; of experts, those that tokens chose."""
    config = work.config
    miss = (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
    sizes = (
        device_bytes(weight.value) * (1 - miss if weight.is_routed else 1)
        for weight in sharded_weights(work)
        if reads(weight)
    )
    return float(sum(sizes))


def _selected_bytes(work: Workload, tokens: int) -> float:
    layers = count_layers(work.config, LayerKind.CSA)
    entry_bytes = entry_format(work.config, work.numerics).bytes_per_entry
    return float(layers * tokens * work.config.index_topk * entry_bytes)


def _cache_read(work: Workload) -> float:
    """Returns the cache bytes that a step reads on one device, at the full context."""
    read = 0.0
    for array in memory.sharded_cache(work):
        parts = work.parts("batch") * (work.parts("read_entries") if array.entries else 1)
        size = array.bytes / parts
        if array.holds == "csa":
            size *= min(1.0, work.config.index_topk / array.entries)
        read += size
    return read
