"""Which mesh axes split which logical axis: one rule table per regime.

    data     sequences of a batch, slots of a cache
    context  tokens of a sequence, entries of a cache
    expert   routed experts; outside them it splits sequences too, before `context`
    tensor   heads, expert widths, vocabulary

Weights say their logical axes where they are declared (`declare.matrix(…, axes)`); arrays of a call
where they enter and leave it. A logical axis without a rule is whole on every device.

A device computes on its share of the axes in `COMPUTED_ON`. Any other split of a weight is storage
only: the weight is gathered just before its layer uses it, and its gradient is scattered back.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

MESH_AXES = ("data", "expert", "context", "tensor")
Regime = Literal["train", "prefill", "decode"]
# In the order of the mesh axes, as must be all tuples: collectives number devices so.
SEQUENCE = ("expert", "context")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis → mesh axes, outermost first: of weights, and of the arrays of a call."""

    weights: Mapping[str, tuple[str, ...]]
    arrays: Mapping[str, tuple[str, ...]]


COMPUTED_ON = ("experts", "expert_width", "heads", "vocab")

_STORAGE = ("data", "expert", "context")

# Prefill and decode share one set of weights and one cache.
_SERVING = {
    "experts": ("data", "expert"),
    "expert_width": ("tensor",),
    "heads": ("tensor",),
    "vocab": ("tensor",),
}

RULES: Mapping[Regime, Rules] = {
    "train": Rules(
        weights={
            "experts": ("expert",),
            "expert_width": ("tensor",),
            "heads": ("tensor",),
            "vocab": ("tensor",),
            # Storage only; an array's first such axis takes what divides it, the next the rest. Of
            # routed experts `expert` is taken already.
            **dict.fromkeys(("embed", "query_rank", "group_width", "streams"), _STORAGE),
        },
        arrays={
            "batch": ("data",),
            "tokens": SEQUENCE,
            "entries": SEQUENCE,
            "vocab": ("tensor",),
        },
    ),
    "prefill": Rules(
        weights=_SERVING,
        arrays={
            "batch": ("data",),
            "tokens": SEQUENCE,
            "entries": SEQUENCE,
            "vocab": ("tensor",),
        },
    ),
    # The few tokens of a step are on every device of their sequence; attention reads only the
    # entries that lie here.
    "decode": Rules(
        weights=_SERVING,
        arrays={
            "batch": ("data",),
            "entries": SEQUENCE,
            "read_entries": SEQUENCE,
            "vocab": ("tensor",),
        },
    ),
}
