"""What traced steps of nano send and hold; the same programs run on simulated devices elsewhere."""

import pytest

from v4jax.planning import communication, memory
from v4jax.planning.step_trace import trace_step

from .plans import work


def kinds_of(plan) -> set[str]:
    return {message.kind for message, _ in trace_step(plan).messages}


def test_decode():
    """No token goes to another device: each has those of its sequences, and sums."""
    plan = work("v6e-8", "data=2,expert=4", model="nano", context=16384)
    assert kinds_of(plan) == {"all-reduce", "all-gather", "reduce-scatter"}
    held = memory.count_bytes(plan)
    assert sum(held.temporaries.values()) == trace_step(plan).peak_bytes


def test_exchange_by_hand():
    """Rows of 4 chosen experts are sent both ways, 1.5 times an even load, in eight rounds."""
    plan = work(
        *("v6e-4", "expert=4", "prefill"), model="nano", context=131072, chunk=131072, batch=1
    )
    assert kinds_of(plan) == {"all-reduce", "all-gather", "all-to-all", "permute"}
    traffic = {item.kind: item for item in communication.count_traffic(plan)}
    layers, rounds = 6, 8  # of 16,384 choices of a device each
    rows = 4 * 1.5 * plan.local_tokens // rounds
    operands = 2 * rows * plan.config.hidden_size * 2  # both ways, bfloat16
    ids_and_weights = 2 * rows * 4 + 4 * 4
    sent = layers * rounds * (operands + ids_and_weights) * 3 / 4
    assert traffic["all-to-all"].sent_bytes == sent
    assert traffic["all-to-all"].count == layers * rounds * 5


@pytest.mark.slow
def test_training():
    """Weights are gathered, gradients scattered; the state is written in place."""
    plan = work("v6e-4", "data=2,expert=2", "train", model="nano", context=1024, batch=4)
    found = {"all-reduce", "all-gather", "all-to-all", "permute", "reduce-scatter"}
    assert kinds_of(plan) == found
    held = memory.count_bytes(plan)
    fixed = held.temporaries["bfloat16 weights"] + held.temporaries["gradients"]
    assert 0 < held.temporaries["activations"] == trace_step(plan).peak_bytes - fixed
