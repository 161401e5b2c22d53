"""The training step as shapes with shardings; a small one through the TPU compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from small_models import CSA, WINDOWS

from v4jax.config import ModelConfig, get_numerics
from v4jax.config.run import parse_mesh
from v4jax.costs import chips
from v4jax.costs.inventory import device_bytes
from v4jax.planning import compile, memory, programs, workload


def plan(config: ModelConfig, topology: str, mesh: str, training: str):
    """Returns four rows of 512 tokens on four devices."""
    return workload.build_workload(
        config,
        get_numerics("bfloat16"),
        topology=chips.parse_topology(topology),
        mesh=parse_mesh(mesh).sizes,
        regime="train",
        context=512,
        batch=4,
        training=training,
        lora_rank=4,
    )


def build(training: str):
    """Returns the workload and the arguments of its step."""
    work = plan(CSA, "v6e-4", "data=2,expert=2", training)
    _, arguments = programs.build_program(work, work.layout)
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in jax.tree.leaves(arguments))
    return work, arguments


def test_arguments_of_all_weights():
    work, (frozen, state, batches) = build("adamw")
    assert not [name for name in state.weights if ".indexer." in name]
    assert {leaf.dtype for leaf in state.weights.values()} == {jnp.dtype("float32")}
    assert "embed" not in frozen.arrays
    assert batches.tokens.shape == batches.begin.shape == (1, 4, 512)
    assert batches.tokens.sharding.shard_shape(batches.tokens.shape) == (1, 2, 256)
    held = memory.count_arguments(work)
    # Moments are two of every weight, split like it.
    weights, moments = held.optimizer["float32 weights"], held.optimizer["adamw state"]
    assert moments == pytest.approx(2 * weights, rel=1e-4)
    whole = sum(leaf.size * 4 for leaf in state.weights.values())
    assert whole / 4 <= weights < whole / 2.5


def test_arguments_of_adapters():
    work, (frozen, state, _) = build("lora")
    assert {name.rpartition(".")[2] for name in state.weights} == {"lora_down", "lora_up"}
    held = memory.count_arguments(work)
    assert sum(held.weights.values()) == device_bytes(frozen) + device_bytes(state.biases)


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology, training", [("v5p-8", "adamw"), ("v6e-4", "lora")])
def test_compiled_for_a_chip(topology, training):
    work = plan(WINDOWS, topology, "data=2,expert=2", training)  # half the time of `CSA`
    compiled = compile.compile_step(work)
    # The state is updated in place.
    assert compiled.output_bytes < 0.1 * compiled.argument_bytes
    kinds = {item.kind for item in compiled.collectives}
    assert {"all-gather", "all-to-all"} <= kinds
