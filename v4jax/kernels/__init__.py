"""The operations that make V4 fast, each in a package of its own.

`__init__.py` has the signatures and formulas, checks arguments and chooses an implementation.
`reference.py` is the specification, a few lines of jnp for readers and tests. `portable.py` runs
everywhere in bounded memory. Files that end in `_tpu` or `_gpu` hold Pallas kernels. Every
operation takes a `Target`, the devices that the program is made for. `table` is how operations read
cached entries. Read `attention/` first.
"""

from v4jax.kernels.dispatch import Target

__all__ = ["Target"]
