"""Tests of v4jax.inference; most put `fake_model.py` in the model's place: fast and exact."""
