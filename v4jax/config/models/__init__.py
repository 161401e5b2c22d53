"""The packaged model configurations: each module's `get_config()` returns a `ConfigDict`.

A module states what differs from the defaults of `v4jax.config.model.ModelConfig`; read `tiny.py`
first. nano has trained weights, and its configuration is their
`v4jax/pretrained/nano/config.json`.
"""
