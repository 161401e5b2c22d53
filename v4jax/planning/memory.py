"""Bytes of one device by kind: weights, cache, optimizer, temporaries.

All but the temporaries are the arguments of the program that would run, split as it splits them.
Temporaries are an estimate from the traced step (`step_trace.py`); `v4jax plan --compile` asks the
compiler instead.
"""

import collections
import dataclasses

from v4jax.costs.inventory import DRAFT, CacheArray, device_bytes, list_cache
from v4jax.planning.programs import abstract_cache, sharded_weights, train_state
from v4jax.planning.step_trace import trace_step
from v4jax.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """What one device holds during a step, by kind and within a kind by what it is.

    weights: served or frozen ones. drafts: those of a draft module or an MTP block, which are held
    whether tokens are drafted or not. optimizer: trained weights in float32, and moments.
    temporaries: an estimate of what the step makes beside its arguments, at the fullest moment.
    """

    weights: dict[str, int]
    drafts: dict[str, int]
    cache: dict[str, int]
    optimizer: dict[str, int]
    temporaries: dict[str, int]

    @property
    def total(self) -> int:
        """All bytes."""
        return self.arguments + sum(self.temporaries.values())

    @property
    def arguments(self) -> int:
        """Bytes that a step is given."""
        kinds = self.weights, self.drafts, self.cache, self.optimizer
        return sum(sum(kind.values()) for kind in kinds)


def count_bytes(work: Workload) -> DeviceBytes:
    """Returns the bytes of one device by kind; traces the step, which takes some seconds."""
    fixed = fixed_temporaries(work)
    activations = max(trace_step(work).peak_bytes - sum(fixed.values()), 0)
    temporaries = fixed | {"activations": activations}
    return dataclasses.replace(count_arguments(work), temporaries=temporaries)


def count_arguments(work: Workload) -> DeviceBytes:
    """Returns the bytes of the step's arguments; nothing is traced.

    Raises:
      ConfigError: a mesh axis does not divide what the code computes on.
    """
    if work.regime != "train":
        return DeviceBytes(*_by_format(sharded_weights(work)), cache_bytes(work), {}, {})
    state = train_state(work)
    frozen = [weight for weight in sharded_weights(work) if weight.path not in state.weights]
    weights = "adapters" if work.training == "lora" else "float32 weights"
    moments = "muon state" if work.training == "muon" else "adamw state"
    optimizer = {
        weights: device_bytes(state.weights),
        moments: device_bytes(state.optimizer),
    }
    return DeviceBytes(*_by_format(frozen, trains=True), {}, optimizer, {})


def _by_format(weights, *, trains: bool = False) -> tuple[dict[str, int], dict[str, int]]:
    """Returns format → bytes of the weights of every step, and of those that draft alone.

    In training, an MTP block runs in every step.
    """
    sums = collections.Counter(), collections.Counter()
    for weight in weights:
        alone = weight.component == DRAFT if trains else weight.drafts
        sums[alone][weight.fmt] += device_bytes(weight.value)
    main, drafts = (dict(each.most_common()) for each in sums)
    return main, drafts


def cache_bytes(work: Workload) -> dict[str, int]:
    """Returns what is cached → bytes on one device, for sequences of the full context.

    Entries are split over the devices of a sequence; windows, unfinished windows and what drafts
    see are on each. Rings have spare rows, by which drafts can be taken back.
    """
    sums: dict[str, int] = {}
    for array in sharded_cache(work):
        name = "unfinished windows" if array.holds.startswith("unfinished") else array.holds
        name = "draft" if array.holds.endswith("draft") else name
        sums[name] = sums.get(name, 0) + device_bytes(array.value)
    return sums


def sharded_cache(work: Workload) -> tuple[CacheArray, ...]:
    """Returns the arrays of the cache; `device_bytes` says what a device has of them."""
    return list_cache(abstract_cache(work, work.layout))


def fixed_temporaries(work: Workload) -> dict[str, int]:
    """Returns the temporaries that do not depend on the number of tokens.

    Serving: the weights of one round of the scan over layers, taken out of their stacks; kernels
    read routed experts where they are. Training: weights in the dtype of the computation, made of
    the float32 ones, and a gradient for each. Adapters are read as they are; their gradients are
    float32.
    """
    weights = sharded_weights(work)
    if work.regime != "train":
        scanned = [w for w in weights if w.axes[0] == "layers" and not w.is_routed]
        return {"a round's weights": sum(device_bytes(w.value) // w.shape[0] for w in scanned)}
    trained = train_state(work).weights
    if work.training == "lora":
        return {"gradients": device_bytes(trained)}
    size = sum(device_bytes(w.value) for w in weights if w.path in trained)
    return {f"{work.storage} weights": size, "gradients": size}
