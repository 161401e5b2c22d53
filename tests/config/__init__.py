"""Tests of v4jax.config: tables of configurations, good and broken."""
