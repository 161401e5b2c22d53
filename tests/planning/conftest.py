"""Traced layers in place of traces, for tests of what is computed from them."""

import pytest

from v4jax.planning import communication, memory
from v4jax.planning.layer_trace import LayerTrace, Message

FIXED = [
    LayerTrace(2, 300 * 2**20, ((Message("all-reduce", ("expert",), 2**20), 1),)),
    LayerTrace(
        41,
        400 * 2**20,
        (
            (Message("all-to-all", ("expert",), 16 * 2**20), 2),
            (Message("all-gather", ("expert",), 2**20), 3),
        ),
    ),
]


@pytest.fixture
def fixed_traces(monkeypatch):
    """Makes every layer hold 400 MiB and send the same few collectives."""
    for module in (communication, memory):
        monkeypatch.setattr(module, "trace_layers", lambda work: FIXED)
    return FIXED
