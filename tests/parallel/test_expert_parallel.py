"""Every transport gives what one device computes, for every load; nothing is dropped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import CPU

from v4jax.errors import ConfigError
from v4jax.kernels import Target, grouped_matmul
from v4jax.kernels.scaled_matmul import round_activations
from v4jax.parallel import Axes, ExpertExchange, Layout, make_mesh
from v4jax.parallel.axes import MESH_AXES
from v4jax.parallel.expert_parallel import buffer_rows, route
from v4jax.planning import ahead_of_time
from v4jax.quant import quantize_weight

TOKENS, CHOSEN, EXPERTS, WIDTH, INNER = 256, 2, 8, 128, 64
LIMIT = 10.0

# Sums of up to eight float32 products of size 1, in another order.
TOLERANCE = 1e-5

_RANDOM = np.random.RandomState(0)
X = _RANDOM.standard_normal((TOKENS, WIDTH)).astype(np.float32)
ROUTING = _RANDOM.uniform(0.2, 1.0, (TOKENS, CHOSEN)).astype(np.float32)
PLACE = np.arange(TOKENS)[:, None]
LOADS = {
    "even": (PLACE * CHOSEN + np.arange(CHOSEN)) % EXPERTS,
    "random": np.argsort(_RANDOM.uniform(size=(TOKENS, EXPERTS)), axis=1)[:, :CHOSEN],
    "hash": np.stack([PLACE[:, 0] * 7 % EXPERTS, (PLACE[:, 0] * 7 + 3) % EXPERTS], axis=1),
    "all on one device": np.tile([5, 5], (TOKENS, 1)),
    "one half empty": PLACE % 2 + np.array([[0, 2]]),
    "first tokens only": np.where(PLACE < 20, [[0, 1]], [[6, 7]]),
}


def make_weights(fmt):
    random = np.random.RandomState(1)
    shapes = (EXPERTS, 2, INNER, WIDTH), (EXPERTS, WIDTH, INNER)
    made = [random.standard_normal(s).astype(np.float32) / np.sqrt(s[-1]) for s in shapes]
    return [quantize_weight(w, fmt) if fmt == "fp4" else jnp.asarray(w) for w in made]


WEIGHTS = {fmt: make_weights(fmt) for fmt in ("float32", "fp4")}


def compute(parameters, x, ids, weights, target=CPU):
    options = {"limit": LIMIT, "target": target}
    return grouped_matmul.apply_experts(x, ids, weights, *parameters, **options)


@functools.cache
def one_device(fmt):
    return jax.jit(lambda x, ids, routing, weights=WEIGHTS[fmt]: compute(weights, x, ids, routing))


@functools.cache
def on_devices(fmt="float32", tokens="split", **exchange):
    """Returns the same function on eight devices, each with an eighth of the tokens.

    Where tokens are "whole", the four devices along `expert` have the same ones.
    """
    layout = Layout(make_mesh(data=2, expert=4), "serve", ExpertExchange(**exchange))
    split = P(("data", "expert")) if tokens == "split" else P("data")

    def run(weights, x, ids, routing, real):
        axes = Axes(layout, tokens)
        return route(axes, compute, weights, x, ids, routing, real, EXPERTS)

    mapped = jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(P(("data", "expert")), split, split, split, split),
        out_specs=split,
        check_vma=False,
    )
    return jax.jit(
        lambda x, ids, routing, real, weights=WEIGHTS[fmt]: mapped(weights, x, ids, routing, real)
    )


ALL = np.ones(TOKENS, bool)
TRANSPORTS = {
    "all_to_all": dict(),
    "all_to_all, small buffers": dict(slack=0.25),
    "all_to_all, FP4 experts": dict(fmt="fp4"),
    "gather": dict(transport="gather"),
    "gather where tokens are everywhere": dict(tokens="whole"),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_load(transport):
    options = TRANSPORTS[transport]
    run = on_devices(**options)
    for name, ids in LOADS.items():
        want = one_device(options.get("fmt", "float32"))(X, ids, ROUTING)
        got = run(X, ids, ROUTING, ALL)
        np.testing.assert_allclose(got, want, atol=TOLERANCE, err_msg=name)


def test_fp8_payload():
    """Rounds the experts' inputs as released numerics do, and nothing else."""
    rounded = np.asarray(round_activations(jnp.asarray(X)))
    assert 0.01 < np.std(rounded - X) < 0.04
    want = one_device("float32")(rounded, LOADS["random"], ROUTING)
    got = on_devices(payload="fp8")(X, LOADS["random"], ROUTING, ALL)
    np.testing.assert_allclose(got, want, atol=TOLERANCE)


def test_padding_goes_nowhere():
    real = np.arange(TOKENS) % 3 > 0
    want = np.asarray(one_device("float32")(X, LOADS["random"], ROUTING))
    got = on_devices()(X, LOADS["random"], ROUTING, real)
    np.testing.assert_allclose(got, np.where(real[:, None], want, 0), atol=TOLERANCE)


def test_gradients_with_further_rounds():
    """Inputs, routing weights and experts, over loads that take one round and many."""
    run, one = on_devices(slack=0.25), one_device("float32")
    slope = np.random.RandomState(2).standard_normal(X.shape).astype(np.float32)

    def gradients(function, *more):
        def loss(x, routing, weights, ids):
            return (function(x, ids, routing, *more, weights) * slope).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))

    many, single = gradients(run, ALL), gradients(one)
    for name in ("even", "all on one device"):
        arguments = X, ROUTING, WEIGHTS["float32"], LOADS[name]
        got, want = jax.tree.leaves(many(*arguments)), jax.tree.leaves(single(*arguments))
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, atol=2e-4, err_msg=name)


def test_transport_that_needs_other_tokens():
    with pytest.raises(ConfigError) as error:
        on_devices(tokens="whole", transport="all_to_all")(X, LOADS["even"], ROUTING, ALL)
    assert "needs devices with different tokens, but here those along ('expert',)" in str(
        error.value
    )


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("payload", ["activations", "fp8"])
def test_ragged_compiles(payload):
    """The ragged transport, around the experts' TPU kernels on FP4 weights, for four chips."""
    devices = np.array(ahead_of_time.describe("v6e:2x2").devices).reshape(1, 4, 1, 1)
    mesh = Mesh(devices, MESH_AXES)
    layout = Layout(mesh, "serve", ExpertExchange(transport="ragged", payload=payload))
    abstract = jax.eval_shape(
        lambda: [
            quantize_weight(jnp.zeros(shape), "fp4")
            for shape in ((EXPERTS, 2, 256, 512), (EXPERTS, 512, 256))
        ]
    )
    split = NamedSharding(mesh, P("expert"))

    def place(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)

    arguments = [
        jax.tree.map(lambda x: place(x.shape, x.dtype), abstract),
        place((1024, 512), jnp.bfloat16),
        place((1024, CHOSEN), jnp.int32),
        place((1024, CHOSEN), jnp.float32),
        place((1024,), jnp.bool_),
    ]

    def run(weights, x, ids, routing, real):
        return route(Axes(layout), on_tpu, weights, x, ids, routing, real, EXPERTS)

    on_tpu = functools.partial(compute, target=Target("tpu", devices.flat[0].device_kind))
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(P("expert"),) * 5, out_specs=P("expert"), check_vma=False
    )
    text = jax.jit(mapped).lower(*arguments).compile().as_text()
    assert "ragged-all-to-all" in text
    assert "tpu_custom_call" in text


def test_buffer_rows():
    assert buffer_rows(512, 6, 8, 1.5) == 576  # 3072 assignments, 384 per pair
    assert buffer_rows(1, 6, 8, 1.5) == 8
    assert buffer_rows(16, 2, 2, 4.0) == 32  # never more than there are
    assert buffer_rows(8192, 6, 16, 1.5) == 1536  # 49,152 assignments: three rounds of 1024 a pair
