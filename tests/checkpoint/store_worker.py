"""Saves checkpoints until it is killed: python store_worker.py FOLDER.

The state of step n holds n everywhere, so that a reader can tell a torn checkpoint.
"""

import itertools
import sys

import jax.numpy as jnp

from v4jax.checkpoint.orbax_store import Store

SIZES = {"small": 8, "large": 1 << 20}


def state_of(step: int) -> dict:
    """Returns the state that is saved at a step."""
    return {name: jnp.full(size, step, jnp.int32) for name, size in SIZES.items()}


def main() -> None:
    """Continues after the newest checkpoint; says each step whose save has begun."""
    store = Store(sys.argv[1], keep=2)
    for step in itertools.count((store.latest() or 0) + 1):
        store.save(step, state_of(step), {"step": step})
        print(step, flush=True)


if __name__ == "__main__":
    main()
