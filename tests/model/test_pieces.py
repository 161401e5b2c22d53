"""Single modules against transformers' on the same weights and inputs (`golden/pieces.npz`)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from oracle import golden

from v4jax.checkpoint.names import block_path
from v4jax.model.context import make_context
from v4jax.model.stack import full_sequence

# Two float32 implementations of one module, on inputs of size 1 and outputs up to 10 (measured
# 4e-6). Transformers forms rotations in float32 too, so the angles do not differ.
FLOAT32_PIECE = 2e-5

MADE = golden.load("pieces")
CONFIG = MADE["config"]


@pytest.fixture(scope="module")
def model():
    assert small_models.golden_file("flash")["seed"] == MADE["seed"]
    assert small_models.golden_file("flash")["config"] == CONFIG
    return small_models.golden_model("flash")


def block(model, number):
    """Returns the block of layer `number`; one of a scanned period is cut out of its stack."""
    path, index = block_path(model.config, number)
    place, position = path.split(".")[1:]
    found = getattr(model.stack, place)[int(position)]
    return jax.tree.map(lambda x: x[index], found) if index else found


def layer_call(model, number, tokens):
    """Returns (context, memory) of layer `number` in a call on one sequence of `tokens`."""
    layer = model.config.layers[number]
    start = jnp.zeros(1, jnp.int32)
    ids = jnp.zeros((1, tokens), jnp.int32)
    context = make_context(ids, start, start + tokens, {layer.rope}, model.target)
    return context, full_sequence(model.config, model.numerics, layer, context)


@functools.partial(jax.jit, static_argnames="piece")
def run_piece(model, piece, x=None, streams=None, low_rank=None, ids=None):
    """Returns the outputs of a piece under their golden names."""
    number = golden.PIECES[piece]["layer"]
    if piece == "hyper_connections_head":
        return dict(collapsed=model.collapse(streams, model.target))
    module = block(model, number)
    if piece == "hyper_connections":
        collapsed, mix = module.attention_hyper(streams, model.target)
        return dict(post=mix.post, mix=mix.residual, collapsed=collapsed)
    if piece in ("router", "hash_router"):
        ids = jnp.zeros(x.shape[1], jnp.int32) if ids is None else ids[0]
        chosen, weights, _ = module.moe.router(x[0], ids, model.target)
        order = jnp.argsort(chosen, axis=-1)
        return {
            "experts": jnp.take_along_axis(chosen, order, -1)[None],
            "weights": jnp.take_along_axis(weights, order, -1)[None],
        }
    context, memory = layer_call(model, number, x.shape[1])
    if piece == "moe":
        return dict(out=module.moe(x, context))
    if piece.endswith("_attention"):
        return dict(rows=module.attention(x, context, memory)[0][:, golden.ATTENTION_ROWS])
    if piece.endswith("_compressor"):
        return dict(entries=read_table(module.attention.compressor(x, context, memory)[0]))
    indexer = module.attention.indexer
    chosen = indexer(x, low_rank, context, memory)[0]
    keys, _ = indexer.compressor(x, context, memory)
    return dict(keys=read_table(keys), chosen=jnp.sort(chosen, -1))


def read_table(table):
    return table.block(jnp.int32(0), table.capacity)


@pytest.mark.parametrize("piece", golden.PIECES)
def test_piece(model, piece):
    inputs = {key: value[None] for key, value in golden.piece_inputs(CONFIG, piece).items()}
    outputs = run_piece(model, piece, **inputs)
    expected = {k.split("/")[1]: v for k, v in MADE.items() if k.startswith(piece + "/")}
    assert outputs.keys() == expected.keys()
    for name, value in outputs.items():
        value = np.asarray(value[0])
        assert value.shape == expected[name].shape, name
        np.testing.assert_allclose(value, expected[name], 0, FLOAT32_PIECE, err_msg=name)
