"""Bytes and seconds of single collectives by hand; collectives of real traced layers."""

import pytest

from v4jax.costs.chips import parse_topology
from v4jax.planning import communication
from v4jax.planning.layer_trace import Message, trace_layers

from .plans import work

MESH = {"data": 2, "expert": 8, "context": 1, "tensor": 1}
SIZE = 8 * 2**20
# kind → bytes that one of eight devices sends of an operand of SIZE bytes, and links it crosses
BY_HAND = {
    "all-gather": (7 * SIZE, 1.0),
    "reduce-scatter": (7 / 8 * SIZE, 1.0),
    "all-reduce": (2 * 7 / 8 * SIZE, 1.0),
    "all-to-all": (7 / 8 * SIZE, 0.5 + 1.25),  # on an open 2×4 of chips
    "permute": (SIZE, 1.0),
}


@pytest.mark.parametrize("kind", BY_HAND)
def test_one_collective(kind):
    topology = parse_topology("v6e-16")
    sent, network, seconds = communication.send(Message(kind, ("expert",), SIZE), topology, MESH)
    expected, hops = BY_HAND[kind]
    assert (sent, network) == (expected, 0.0)
    assert seconds == pytest.approx(expected * hops / 400e9)


def test_two_devices_share_a_chips_links():
    message = Message("all-gather", ("expert",), SIZE)
    alone = communication.send(message, parse_topology("v5p:2x2x2"), MESH)[2]
    halved = communication.send(message, parse_topology("tpu7x:2x2x1"), MESH)[2]
    assert halved == pytest.approx(2 * alone)  # both chips send 600 GB/s


def test_between_slices():
    """Gradients are summed inside a slice, exchanged as shares over the network."""
    topology = parse_topology("v6e-8", slices=2)
    mesh = {"data": 2, "expert": 8, "context": 1, "tensor": 1}
    both = Message("all-reduce", ("data", "expert"), SIZE)
    sent, network, seconds = communication.send(both, topology, mesh)
    assert network == 2 * 1 / 2 * SIZE / 8
    assert sent == 2 * 7 / 8 * SIZE + network
    assert seconds == pytest.approx(2 * 7 / 8 * SIZE / 400e9 + network / 12.5e9)
    inside = Message("all-reduce", ("expert",), SIZE)
    assert communication.send(inside, topology, mesh)[1] == 0.0


def test_sums_over_layers(fixed_traces):
    traffic = communication.count_traffic(work("v6e-16", "expert=16"))
    assert {item.kind: item.count for item in traffic} == {
        "all-to-all": 82,
        "all-gather": 123,
        "all-reduce": 2,
    }
    gather = next(item for item in traffic if item.kind == "all-gather")
    assert gather.sent_bytes == 123 * 15 * 2**20
    assert traffic == sorted(traffic, key=lambda item: -item.seconds)


# What a device may send, by regime: nothing else is in the design (spec G.8).
INTENDED = {
    "decode": {"all-reduce", "all-gather", "reduce-scatter"},
    "prefill": {"all-reduce", "all-gather", "all-to-all", "permute"},
}


@pytest.mark.parametrize("regime", INTENDED)
def test_collectives_of_traced_layers(regime):
    plan = work("v6e-8", "data=2,expert=4", regime, model="nano", context=16384)
    traffic = communication.count_traffic(plan)
    assert {item.kind for item in traffic} == INTENDED[regime]
    assert all(item.sent_bytes > 0 and item.seconds > 0 for item in traffic)


def test_one_device_sends_nothing():
    plan = work("v6e-1", "data=1", model="nano", context=4096)
    assert communication.count_traffic(plan) == []


def test_exchange_by_hand():
    """A prefill of nano sends rows of 4 chosen experts, 1.5 times an even load, both ways."""
    plan = work("v6e-4", "expert=4", "prefill", model="nano", context=8192, batch=1)
    traffic = {item.kind: item for item in communication.count_traffic(plan)}
    rows = 4 * 1.5 * plan.local_tokens * 4 // 4  # 4 buffers
    operands = 6 * 2 * rows * plan.config.hidden_size * 2  # layers, ways, bfloat16
    ids_and_weights = 6 * (2 * rows * 4 + 4 * 4)
    sent = (operands + ids_and_weights) * 3 / 4
    assert traffic["all-to-all"].sent_bytes == sent


@pytest.mark.parametrize("context, rounds", [(16384, 1), (131072, 8)])
def test_rounds_to_the_experts(context, rounds):
    """Four choices of 4,096 tokens on each of 4 devices go at once, of 32,768 in eight rounds."""
    options = {"model": "nano", "context": context, "batch": 1, "training": "lora"}
    traces = trace_layers(work("v6e-4", "expert=4", "train", **options))
    sent = [sum(n for message, n in t.messages if message.kind == "all-to-all") for t in traces]
    # Forward: how many come, ids, routing weights, rows, outputs. Backward: those again, and the
    # gradients of routing weights, rows and outputs.
    assert sent == [13 * rounds] * len(traces)
