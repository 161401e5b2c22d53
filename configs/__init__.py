"""Configurations as files: each module's `get_config()` returns a `ConfigDict`.

A file states what differs from the defaults of `v4jax.config.model.ModelConfig`; read
`nano.py` first.
"""
