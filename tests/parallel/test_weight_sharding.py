"""Weights that are split for storage: what a chip sends to gather them and to scatter gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from small_models import CPU

from v4jax.kernels import Target
from v4jax.kernels.scaled_matmul import expand_tpu
from v4jax.model.weights import materialize
from v4jax.parallel import ONE_DEVICE, WEIGHTS, Layout, annotate_shardings, make_mesh, on_shards
from v4jax.parallel.program import with_shardings
from v4jax.parallel.weight_sharding import weight_shardings
from v4jax.planning import ahead_of_time
from v4jax.planning.collectives import count_collectives
from v4jax.quant import LowRank, quantize_weight


class Linear(nnx.Module):
    """One weight, split over all devices by its first axis, or by its second one."""

    def __init__(self, axes: tuple[str, str]):
        self.weight = nnx.Param(jnp.zeros((4096, 8192), jnp.bfloat16), axes=axes)


def sum_squares(axes, module):
    weight = materialize(axes, module, Target("tpu")).weight.get_value().astype(jnp.float32)
    return (weight * weight).sum(keepdims=True)[0]


@pytest.mark.parametrize("shape", [(256, 256), (3, 2, 256, 256)])
@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_adapters_read_their_base_by_the_kernel(kind, shape):
    """On TPU XLA expands no stored base, of one matrix or of experts; the weight is the same."""
    random = np.random.RandomState(0)
    *lead, rows, columns = shape
    base, down, up = (
        jnp.asarray(random.standard_normal(size), jnp.float32)
        for size in (shape, (*lead, 4, columns), (*lead, rows, 4))
    )
    base = jax.jit(quantize_weight, static_argnums=1)(base, kind)
    value = LowRank(base, down, up, 0.5, "bfloat16", rounds_inputs=False)
    module = nnx.Dict(weight=nnx.Param(value, axes=("rank",) * len(shape)))

    def expanded(module, target):
        return materialize(ONE_DEVICE, module, target).weight.get_value()

    expected = jax.jit(expanded, static_argnums=1)(module, CPU)
    tpu = Target("tpu", "TPU v6 lite")
    traced = str(jax.make_jaxpr(expanded, static_argnums=1)(module, tpu))
    assert f"expand_{kind}" in traced
    interpreted = Target("tpu", interpret=True)
    by_kernel = value.expand(lambda weight, dtype: expand_tpu.expand(weight, target=interpreted))
    np.testing.assert_array_equal(by_kernel, expected)


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("axes", [("embed", "heads"), ("heads", "embed")])
def test_gathered_and_scattered_on_a_slice(axes):
    """Nothing is added up whole: of a gather over all chips at once the compiler makes that."""
    devices = ahead_of_time.describe("v5p:4x4x8").devices
    layout = Layout(make_mesh(data=4, expert=32, devices=devices), "train")
    module = annotate_shardings(nnx.eval_shape(lambda: Linear(axes)), layout)
    module = with_shardings(module, weight_shardings(module, layout))
    run = on_shards(sum_squares, layout, "split", (WEIGHTS,), P("batch"))
    text = jax.jit(jax.grad(lambda module: run(module).sum())).lower(module).compile().as_text()
    found = {item.kind: item for item in count_collectives(text)}
    assert found["all-gather"].count == found["reduce-scatter"].count == 2
    whole_bytes = 4096 * 8192 * 2
    assert found["all-gather"].result_bytes == whole_bytes * (1 + 1 / 4)
    reduced = found.get("all-reduce")
    assert reduced is None or reduced.result_bytes < whole_bytes / 128
