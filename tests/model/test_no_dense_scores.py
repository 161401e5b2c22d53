"""No array of queries × keys anywhere: shown on the traced program, kernels and loops included.

The same call is traced at a length and at twice that length. An array that holds something per
(query, key) pair would grow four times; everything is allowed to double, nothing more.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from v4jax.config.loading import load_model_config
from v4jax.config.numerics import BFLOAT16, RELEASED
from v4jax.kernels import dispatch
from v4jax.model import abstract_transformer, transformer

# So long that what is bounded has reached its bound.
LENGTHS = (524_288, 1_048_576)
# Rounding to tiles and blocks may add a little to the doubling.
LARGEST_GROWTH = 2.1


@pytest.fixture(scope="module")
def model():
    return v4jax.load("tiny")


def array_sizes(jaxpr) -> list[int]:
    """Returns the size of every array a program computes, in order, inner programs included."""
    sizes = []
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(v.aval.shape)) for v in equation.outvars if hasattr(v.aval, "shape")]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes += array_sizes(inner)
    return sizes


def forward(model, length):
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.make_jaxpr(transformer._forward)(model, tokens)


def train(model, length):
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(leaves, tokens):
        floats = iter(leaves)
        merged = [x if x.dtype == jnp.int32 else next(floats) for x in jax.tree.leaves(model)]
        rebuilt = jax.tree.unflatten(jax.tree.structure(model), merged)
        return transformer._forward(rebuilt, tokens).mean()

    leaves = [x for x in jax.tree.leaves(model) if x.dtype != jnp.int32]
    return jax.make_jaxpr(jax.grad(loss))(leaves, tokens)


def extend(model, length, tokens):
    cache = jax.eval_shape(lambda: model.init_cache(1, length))
    tokens = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.make_jaxpr(transformer._extend, static_argnums=4)(
        model, tokens, cache, lengths, "last"
    )


def prefill(model, length):
    """A chunk that grows along with the context it reads."""
    return extend(model, length, length // 2)


def decode(model, length):
    """Four draft tokens are verified; only the context grows."""
    return extend(model, length, 4)


def largest_growth(program, model) -> float:
    small, large = (array_sizes(program(model, length).jaxpr) for length in LENGTHS)
    assert len(small) == len(large) > 1000
    return max(b / max(a, 1) for a, b in zip(small, large, strict=True))


@pytest.mark.parametrize("program", [forward, prefill, decode, train])
def test_nothing_grows_with_queries_times_keys(model, program):
    growth = largest_growth(program, model)
    assert growth <= LARGEST_GROWTH, f"an array grows {growth:.1f} times"
    # And the test can see growth at all: logits, streams or cache double.
    assert growth >= 1.9


@pytest.mark.slow
@pytest.mark.parametrize("program", [prefill, decode, train])
def test_neither_do_the_kernels_for_tpu(program):
    """Flash as a TPU runs it: the walk enters the bodies of the Pallas kernels."""
    numerics, storage = (BFLOAT16, "bfloat16") if program is train else (RELEASED, "released")
    config = load_model_config("v4_flash")
    model = abstract_transformer(config, numerics, storage=storage)
    with dispatch.compiling_for("tpu"):
        growth = largest_growth(program, model)
    assert 1.9 <= growth <= LARGEST_GROWTH, f"an array grows {growth:.1f} times"


def test_a_dense_mask_would_be_seen():
    """The walk finds a queries × keys array inside a loop inside a jit."""

    def dense(x):
        step = jax.jit(lambda carry, row: (carry, (x[:, None] * row).sum()))
        return jax.lax.scan(lambda c, r: step(c, x + r), 0.0, x[:3])[1]

    small, large = (
        array_sizes(jax.make_jaxpr(dense)(jax.ShapeDtypeStruct((n,), jnp.float32)).jaxpr)
        for n in LENGTHS
    )
    assert max(b / a for a, b in zip(small, large, strict=True)) == 4
