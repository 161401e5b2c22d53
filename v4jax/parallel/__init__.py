"""The model on many devices: the mesh, who holds what, and how shards are combined.

Read `axes.py` first (the rule tables), then `layout.py` and `shard.py` (running the code of one
device on all of them), `expert_parallel.py` and `context_parallel.py`. `shard_map` and collectives
are used nowhere else.
"""

from v4jax.parallel.axes import Tokens, WeightLayout
from v4jax.parallel.layout import ONE_DEVICE, Axes, ExpertExchange, Layout
from v4jax.parallel.mesh import check_mesh, make_mesh
from v4jax.parallel.shard import WEIGHTS, on_shards, replicate
from v4jax.parallel.weight_sharding import annotate_shardings

__all__ = [
    "ONE_DEVICE",
    "WEIGHTS",
    "Axes",
    "ExpertExchange",
    "Layout",
    "Tokens",
    "WeightLayout",
    "annotate_shardings",
    "check_mesh",
    "make_mesh",
    "on_shards",
    "replicate",
]
