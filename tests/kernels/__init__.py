"""Tests of v4jax.kernels: every operation against a naive implementation, case by case."""
