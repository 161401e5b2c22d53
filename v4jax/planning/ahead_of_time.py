"""The real TPU compiler on a machine without a TPU.

`libtpu` from PyPI compiles for a described topology. It refuses programs that overflow a device's
memory, and `memory_analysis()` gives bytes per chip. Nothing is executed.
"""

import functools
import importlib.util
import os

import jax

from v4jax.errors import UnsupportedError

# The smallest slice of each generation; its first device compiles a single-chip program.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def why_unavailable() -> str | None:
    """Returns why the TPU compiler cannot be used here, or None."""
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed; pip install libtpu (the [tpu] extra has it)"
    return None


@functools.cache
def describe(topology: str):
    """Returns the description of a topology such as "v6e:2x2" or "v5p:4x4x4".

    Raises:
      UnsupportedError: libtpu is missing, or knows no such topology.
    """
    reason = why_unavailable()
    if reason is not None:
        raise UnsupportedError(f"compiling for {topology} needs the TPU compiler: {reason}")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    # Nothing runs: processes that compile side by side need no chip.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, "tpu")
    except Exception as error:
        raise UnsupportedError(
            f"libtpu does not know the topology {topology!r}: {error}; try one of "
            f"{sorted(TOPOLOGIES.values())}"
        ) from error


def compile_for(topology: str, function, *arguments):
    """Compiles a single-device program for the first device of a topology.

    Args:
      topology: such as "v6e:2x2".
      function: to be jitted.
      arguments: pytrees of `jax.ShapeDtypeStruct`.

    Returns:
      A `jax.stages.Compiled`: `memory_analysis()`, `cost_analysis()`, `as_text()`.

    Raises:
      UnsupportedError: as `describe`.
      jax.errors.JaxRuntimeError: the compiler refuses; the message says why.
    """
    device = describe(topology).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.jit(function).lower(*jax.tree.map(place, arguments)).compile()
