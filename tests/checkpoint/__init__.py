"""Tests of v4jax.checkpoint on tiny random checkpoints in every layout."""
