"""Weights that are split for storage: what a chip sends to gather them and to scatter gradients."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from v4jax.model.weights import whole
from v4jax.parallel import WEIGHTS, Layout, make_mesh, on_shards, place
from v4jax.parallel.weights import weight_shardings
from v4jax.planning import ahead_of_time
from v4jax.planning.collectives import count_collectives
from v4jax.planning.compile import with_shardings


class Linear(nnx.Module):
    """One weight, split over all devices by its first axis, or by its second one."""

    def __init__(self, axes: tuple[str, str]):
        self.weight = nnx.Param(jnp.zeros((4096, 8192), jnp.bfloat16), axes=axes)


def sum_squares(module):
    weight = whole(module).weight.get_value().astype(jnp.float32)
    return (weight * weight).sum(keepdims=True)[0]


@pytest.mark.tpu_compiler
@pytest.mark.skipif(
    ahead_of_time.why_unavailable() is not None, reason=str(ahead_of_time.why_unavailable())
)
@pytest.mark.parametrize("axes", [("embed", "heads"), ("heads", "embed")])
def test_gathered_and_scattered_on_a_slice(axes):
    """Nothing is added up whole: of a gather over all chips at once the compiler makes that."""
    devices = ahead_of_time.describe("v5p:4x4x8").devices
    layout = Layout(make_mesh(data=4, expert=32, devices=devices), "train")
    module = place(nnx.eval_shape(lambda: Linear(axes)), layout)
    module = with_shardings(module, weight_shardings(module, layout))
    run = on_shards(sum_squares, layout, "train", (WEIGHTS,), P("batch"))
    text = jax.jit(jax.grad(lambda module: run(module).sum())).lower(module).compile().as_text()
    found = {item.kind: item for item in count_collectives(text)}
    assert found["all-gather"].count == found["reduce-scatter"].count == 2
    whole_bytes = 4096 * 8192 * 2
    assert found["all-gather"].result_bytes == whole_bytes * (1 + 1 / 4)
    reduced = found.get("all-reduce")
    assert reduced is None or reduced.result_bytes < whole_bytes / 128
