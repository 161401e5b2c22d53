"""The fake model in place of `v4jax.load`."""

import pytest
from inference.fake_model import FakeModel

import v4jax


@pytest.fixture
def fake_model(monkeypatch):
    """Makes `v4jax.load` give a fake model, and returns it."""
    model = FakeModel()
    monkeypatch.setattr(v4jax, "load", lambda *arguments, **options: model, raising=False)
    return model
