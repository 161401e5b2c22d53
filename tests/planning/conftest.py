"""A fixed trace in place of a real one, for tests of what is computed from it."""

import pytest

from v4jax.planning import communication, memory
from v4jax.planning.collectives import Message
from v4jax.planning.step_trace import StepTrace

GIB = 2**30


def trace_nothing(work) -> StepTrace:
    """Returns temporaries of 1 GiB, in training 10 GiB, and the same few collectives."""
    messages = (
        (Message("all-reduce", ("expert",), 2**20), 2),
        (Message("all-to-all", ("expert",), 16 * 2**20), 82),
        (Message("all-gather", ("expert",), 2**20), 123),
    )
    return StepTrace(10 * GIB if work.regime == "train" else GIB, messages)


@pytest.fixture
def fixed_trace(monkeypatch):
    """Puts `trace_nothing` in place of the real trace."""
    for module in (communication, memory):
        monkeypatch.setattr(module, "trace_step", trace_nothing)
