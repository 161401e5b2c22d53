"""Workloads for tests, by short descriptions."""

from v4jax.config import get_numerics
from v4jax.config.loading import load_model_config
from v4jax.config.run import parse_mesh
from v4jax.costs import chips
from v4jax.planning import workload


def work(
    topology,
    mesh,
    regime="decode",
    *,
    model="v4_flash",
    context=1 << 20,
    batch=4,
    slices=1,
    **options,
):
    """Returns a checked workload."""
    trains = regime == "train"
    return workload.build_workload(
        load_model_config(model),
        get_numerics("bfloat16" if trains else "released"),
        topology=chips.parse_topology(topology, slices),
        mesh=parse_mesh(mesh).sizes,
        regime=regime,
        context=context,
        batch=batch,
        **options,
    )
