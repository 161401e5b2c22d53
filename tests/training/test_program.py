"""The training step as shapes with shardings; a small one through the TPU compiler."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from small_models import CSA, WINDOWS

from v4jax.cli.plan import training_program
from v4jax.config import ModelConfig, get_numerics
from v4jax.config.run import parse_mesh
from v4jax.costs import chips
from v4jax.model import take_inventory
from v4jax.parallel import Layout
from v4jax.planning import compile, memory, workload


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
    """Returns the arguments of the step and the bytes one device holds of each."""
    work = plan(CSA, "v6e-4", "data=2,expert=2", training)
    layout: Layout = work.layout

    def local(leaf: jax.ShapeDtypeStruct) -> int:
        assert isinstance(leaf.sharding, NamedSharding)
        shape = leaf.sharding.shard_shape(leaf.shape)
        return jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize

    _, arguments = training_program(work, layout)
    return work, arguments, [sum(map(local, jax.tree.leaves(part))) for part in arguments]


def test_arguments_of_all_weights():
    work, (frozen, state, batches), (frozen_bytes, state_bytes, _) = build("adamw")
    assert not [name for name in state.weights if ".indexer." in name]
    assert {leaf.dtype for leaf in state.weights.values()} == {jnp.dtype("float32")}
    assert "embed" not in frozen.arrays
    assert batches.tokens.shape == batches.begin.shape == (1, 4, 512)
    assert batches.tokens.sharding.shard_shape(batches.tokens.shape) == (1, 2, 256)
    # The plan counts the same arrays, but for biases of routers and counters.
    planned = memory.optimizer_bytes(work)
    planned = planned["float32 weights"] + planned["adamw state"]
    assert state_bytes == pytest.approx(planned, rel=0.02)
    indexers = [w for w in take_inventory(CSA, "bfloat16").weights if ".indexer." in w.path]
    assert frozen_bytes == sum(
        array.size * array.dtype.itemsize
        for weight in indexers
        for array in memory.local_arrays(weight, work)
    )


def test_arguments_of_adapters():
    work, (_, state, _), (frozen_bytes, state_bytes, _) = build("lora")
    assert {name.rpartition(".")[2] for name in state.weights} == {"lora_down", "lora_up"}
    planned = memory.optimizer_bytes(work)
    assert state_bytes == pytest.approx(planned["adapters"] + planned["adamw state"], rel=0.02)
    assert frozen_bytes == pytest.approx(sum(memory.weight_bytes(work).values()), rel=0.02)


@pytest.mark.tpu_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology, training", [("v5p-8", "adamw"), ("v6e-4", "lora")])
def test_compiled_for_a_chip(topology, training):
    work = plan(WINDOWS, topology, "data=2,expert=2", training)  # half the time of `CSA`
    compiled = compile.compile_step(work, training_program)
    # The state is updated in place.
    assert compiled.output_bytes < 0.1 * compiled.argument_bytes
    kinds = {item.kind for item in compiled.collectives}
    assert {"all-gather", "all-to-all"} <= kinds
