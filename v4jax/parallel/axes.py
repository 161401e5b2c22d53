"""Which mesh axes split which logical axis: one rule table for weights, one for arrays of a call.

    data     sequences of a batch, slots of a cache
    context  tokens of a sequence, entries of a cache
    expert   routed experts; outside them it splits sequences too, before `context`
    tensor   heads, expert widths, vocabulary

Weights name their logical axes where they are declared (`declare.matrix(…, axes)`); arrays of a
call where they enter and leave it. A logical axis without a rule is whole on every device.

A device computes on its share of the axes in `COMPUTED_ON`. Any other split of a weight is storage
only: the weight is gathered just before its layer uses it, and its gradient is scattered back.
"""

from collections.abc import Mapping
from typing import Literal

MESH_AXES = ("data", "expert", "context", "tensor")
# In the order of the mesh axes, as all tuples must be: collectives number devices in this order.
SEQUENCE = ("expert", "context")

COMPUTED_ON = ("experts", "expert_width", "heads", "vocab")

_STORAGE = ("data", "expert", "context")

WeightLayout = Literal["serve", "train"]

WEIGHT_RULES: Mapping[WeightLayout, Mapping[str, tuple[str, ...]]] = {
    "serve": {
        "experts": ("data", "expert"),
        "expert_width": ("tensor",),
        "heads": ("tensor",),
        "vocab": ("tensor",),
    },
    "train": {
        "experts": ("expert",),
        "expert_width": ("tensor",),
        "heads": ("tensor",),
        "vocab": ("tensor",),
        # Storage only. An array's first such axis takes the mesh axes that divide it, the next one
        # the rest. Routed experts have used `expert` already.
        **dict.fromkeys(("embed", "query_rank", "group_width", "streams"), _STORAGE),
    },
}

Tokens = Literal["split", "whole"]

ARRAY_RULES: Mapping[Tokens, Mapping[str, tuple[str, ...]]] = {
    # Training and prefill: every device has its own tokens, and attention reads all entries.
    "split": {
        "batch": ("data",),
        "tokens": SEQUENCE,
        "entries": SEQUENCE,
        "vocab": ("tensor",),
    },
    # Decoding: every device of a sequence has the step's few tokens, and attention reads only the
    # entries that the device holds.
    "whole": {
        "batch": ("data",),
        "entries": SEQUENCE,
        "read_entries": SEQUENCE,
        "vocab": ("tensor",),
    },
}
