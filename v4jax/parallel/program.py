"""`Program`: a compiled function and its arguments as shapes with shardings.

Nothing is allocated, so a program can be compiled for machines that are not there.
"""

from typing import Any

import jax

# What `jax.jit` returned, and its arguments as shapes with shardings.
Program = tuple[Any, tuple]


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Returns shapes, each with its sharding."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        *(tree, shardings),
    )
