"""The model on many devices: the mesh, who holds what, and how shares meet.

Read `axes.py` first (one rule table per regime), then `layout.py` and `shard.py` (running the code
of one device on all of them), `expert_parallel.py` and `context_parallel.py`. `shard_map` and
collectives are used nowhere else.
"""

from v4jax.parallel.axes import RULES, Regime
from v4jax.parallel.layout import Dispatch, Layout, activate, active
from v4jax.parallel.mesh import check_mesh, make_mesh
from v4jax.parallel.shard import WEIGHTS, on_shards, shard
from v4jax.parallel.weights import place

__all__ = [
    "RULES",
    "WEIGHTS",
    "Dispatch",
    "Layout",
    "Regime",
    "activate",
    "active",
    "check_mesh",
    "make_mesh",
    "on_shards",
    "place",
    "shard",
]
