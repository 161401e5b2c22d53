"""Tests of v4jax.model."""
