"""Tests of v4jax.quant: number formats, bit for bit."""
