"""No array of queries × keys anywhere: shown on the traced program, kernels and loops included.

The same call is traced at a length and at twice that length. An array that holds something per
(query, key) pair would grow four times; everything is allowed to double, nothing more.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_models

from v4jax.config.loading import load_model_config
from v4jax.config.numerics import BFLOAT16, RELEASED
from v4jax.config.run import LossConfig
from v4jax.kernels import Target
from v4jax.model import abstract_transformer, passes
from v4jax.model.weights import read_weights
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode
from v4jax.training.losses import LOGIT_ELEMENTS
from v4jax.training.state import init_state, split_model
from v4jax.training.step import build_step

# So long that what is bounded has reached its bound.
LENGTHS = (524_288, 1_048_576)
# Rounding to tiles and blocks may add a little to the doubling.
LARGEST_GROWTH = 2.1


def array_shapes(jaxpr) -> list[tuple[int, ...]]:
    """Returns the shape of every array a program computes, in order, inner programs included."""
    shapes = []
    for equation in jaxpr.eqns:
        shapes += [v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape")]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    shapes += array_shapes(inner)
    return shapes


def array_sizes(jaxpr) -> list[int]:
    return [int(np.prod(shape)) for shape in array_shapes(jaxpr)]


def forward(model, length):
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.make_jaxpr(passes.forward)(model, tokens)


def train(model, length, dense=False):
    """A whole step on packed rows that trains the indexer too."""
    frozen, weights, biases = split_model(model, read_weights(model))
    optimizer = optax.sgd(0.1)  # holds no array that grows with the tokens, whichever it is
    state = jax.eval_shape(lambda w, b: init_state(frozen, w, b, optimizer), weights, biases)
    rows = jax.ShapeDtypeStruct((1, 1, length), jnp.int32)
    batches = Batch(rows, jax.ShapeDtypeStruct(rows.shape, jnp.float32), rows)
    step = build_step(LossConfig(), optimizer, lambda _: 1.0, Mode(dense=dense, distill=True), 1.0)
    return jax.make_jaxpr(step)(frozen, state, batches)


def train_dense(model, length):
    """The stage before selection, whose indexer learns from all visible entries."""
    return train(model, length, dense=True)


def extend(model, length, tokens):
    cache = jax.eval_shape(lambda: model.init_cache(1, length))
    tokens = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.make_jaxpr(passes.extend, static_argnums=4)(model, tokens, cache, lengths, "last")


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


# Each program with the layers that do something of their own in it.
PROGRAMS = {
    forward: "window csa hca",
    prefill: "window csa hca",
    decode: "window csa hca",
    train: "csa hca",
    train_dense: "csa",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_grows_with_queries_times_keys(program):
    model = small_models.make_model(small_models.make_config(PROGRAMS[program]))
    growth = largest_growth(program, model)
    assert growth <= LARGEST_GROWTH, f"an array grows {growth:.1f} times"
    # And the test can see growth at all: logits, streams or cache double.
    assert growth >= 1.9


def test_training_holds_no_logits_of_all_tokens():
    """Only those of a tile, forward and backward."""
    model = small_models.make_model(small_models.make_config("window"))
    vocabulary = model.config.vocab_size
    shapes = array_shapes(train(model, LENGTHS[0]).jaxpr)
    largest = max(int(np.prod(shape)) for shape in shapes if shape and shape[-1] == vocabulary)
    assert LOGIT_ELEMENTS / 2 < largest <= LOGIT_ELEMENTS


@pytest.mark.slow
@pytest.mark.parametrize("program", [prefill, decode, train])
def test_neither_do_the_kernels_for_tpu(program):
    """Flash as a TPU runs it: the walk enters the bodies of the Pallas kernels."""
    numerics, storage = (BFLOAT16, "bfloat16") if program is train else (RELEASED, "released")
    config = load_model_config("v4_flash")
    model = abstract_transformer(config, numerics, storage=storage, target=Target("tpu"))
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
