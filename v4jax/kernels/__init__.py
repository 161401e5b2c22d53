"""The operations that make V4 fast: one folder each, with a reference that is the specification.

Every folder has the signature with its formula in `__init__.py` and plain jnp in `reference.py`.
The references
are blocked: none holds an array of queries × keys. `table.py` says how an operation reads cached
  entries. Read
`sparse_attention/` first.
"""
