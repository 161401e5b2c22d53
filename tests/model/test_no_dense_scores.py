"""No array of queries × keys anywhere: shown on the traced program, kernels and loops included.

The same call is traced at a length and at twice that length. An array that holds something per
(query, key) pair would grow four times; everything is allowed to double, nothing more.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import v4jax
from v4jax.model import transformer

LENGTHS = (4096, 8192)
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


def prefill(model, length):
    """A chunk that grows along with the context it reads."""
    cache = jax.eval_shape(lambda: model.init_cache(1, 2 * length))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.make_jaxpr(transformer._extend, static_argnums=4)(
        model, tokens, cache, lengths, "last"
    )


@pytest.mark.parametrize("program", [forward, prefill, train])
def test_nothing_grows_with_queries_times_keys(model, program):
    small, large = (array_sizes(program(model, length).jaxpr) for length in LENGTHS)
    assert len(small) == len(large) > 1000
    growth = [b / max(a, 1) for a, b in zip(small, large, strict=True)]
    assert max(growth) <= LARGEST_GROWTH, f"an array grows {max(growth):.1f} times"
    # And the test can see growth at all: logits and streams double.
    assert max(growth) >= 1.9


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
