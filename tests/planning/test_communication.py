"""Bytes and seconds of collectives by hand."""

import pytest

from v4jax.costs.chips import parse_topology
from v4jax.planning import communication
from v4jax.planning.collectives import Message

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


def test_sums_over_a_step(fixed_trace):
    traffic = communication.count_traffic(work("v6e-16", "expert=16"))
    assert {item.kind: item.count for item in traffic} == {
        "all-to-all": 82,
        "all-gather": 123,
        "all-reduce": 2,
    }
    gather = next(item for item in traffic if item.kind == "all-gather")
    assert gather.sent_bytes == 123 * 15 * 2**20
    assert traffic == sorted(traffic, key=lambda item: -item.seconds)
