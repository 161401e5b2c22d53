"""The leaves of a pytree by name: how a checkpoint stores them, and how they come back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.errors import CheckpointError
from v4jax.parallel.weight_sharding import name_of


def name_leaves(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf} of a pytree, such as `model.embed.value`.

    Raises:
      CheckpointError: a leaf is no array that can be stored, or two have the same path.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = name_of(path) or "state"
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise CheckpointError(
                f"{name} must be a jax array to be stored, got {type(leaf).__name__}; "
                "plain values go into extra"
            )
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise CheckpointError(f"{name} is a random key; store jax.random.key_data of it")
        if name in named:
            raise CheckpointError(f"two leaves of the state are called {name}")
        named[name] = leaf
    return named


def check_leaves(wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raises unless both have the same names with the same shapes and dtypes.

    Raises:
      CheckpointError: they do not; the message names the first leaf that differs.
    """
    missing, unknown = sorted(wanted.keys() - stored), sorted(stored.keys() - wanted)
    for names, where in ((missing, "here but not in"), (unknown, "not here but in")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(
                f"{names[0]}{more} is {where} the checkpoint; resume with the settings (optimizer, "
                "LoRA, what is trained) it was saved with"
            )
    for name, leaf in wanted.items():
        for what in ("shape", "dtype"):
            here, there = getattr(leaf, what), getattr(stored[name], what)
            if here != there:
                raise CheckpointError(
                    f"{name} has {what} {here} here and {there} in the checkpoint"
                )


def sharding_of(leaf) -> jax.sharding.Sharding:
    """Returns where a leaf lies, or should; the first device where it does not say."""
    return leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def as_wanted(leaf, found: jax.Array | None) -> jax.Array:
    """Returns a restored array; free to move, as jax.numpy makes them, where `leaf` was."""
    if found is None:  # empty arrays are not stored
        found = np.zeros(leaf.shape, leaf.dtype)
        return jax.device_put(found, leaf.sharding) if _committed(leaf) else jnp.asarray(found)
    return found if _committed(leaf) else jnp.asarray(np.asarray(found))


def _committed(leaf) -> bool:
    return leaf.committed if isinstance(leaf, jax.Array) else leaf.sharding is not None
