"""The operations that make V4 fast: one room each.

`__init__.py` has the signatures with their formulas, checks arguments and chooses; `reference.py`
is the specification in a few lines of jnp, for readers and tests; `portable.py` runs everywhere, in
bounded memory; files that end in `_tpu` or `_gpu` are Pallas kernels. Every operation is told its
`Target`, the devices that the program is made for. `table` says how an operation reads cached
entries. Read `attention/` first.
"""

from v4jax.kernels.dispatch import Target

__all__ = ["Target"]
