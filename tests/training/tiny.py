"""The models of these tests: two layers in one scan, so that one block is compiled.

`CSA` has compressed layers with their indexers, and an MTP block; `WINDOWS` compiles in half the
time.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax.checkpoint.names import stored_formats
from v4jax.config import LayerKind, ModelConfig, RouterKind, get_numerics
from v4jax.config.loading import load_model_config
from v4jax.model import Transformer
from v4jax.model.weights import read_weights, write_weights
from v4jax.quant import quantize_weight

_TINY = load_model_config("tiny")
CSA = dataclasses.replace(
    _TINY,
    num_hidden_layers=2,
    compress_ratios=(4, 4, 0),
    layer_types=(LayerKind.CSA,) * 2 + (LayerKind.WINDOW,),
    mlp_layer_types=(RouterKind.TOPK,) * 2,
)
WINDOWS = dataclasses.replace(
    _TINY,
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    compress_ratios=(0, 0),
    layer_types=(LayerKind.WINDOW,) * 2,
    mlp_layer_types=(RouterKind.TOPK,) * 2,
)
IDS = np.random.RandomState(0).randint(0, 256, (4, 128))


@functools.cache
def float_model(config: ModelConfig, numerics: str = "float32") -> Transformer:
    """Returns a model of float32 weights, its logits of deviation near 1."""
    made = Transformer(config, get_numerics(numerics), storage="float32", rngs=nnx.Rngs(2))
    random = np.random.RandomState(5)

    def draw(name, weight):
        weight, noise = np.asarray(weight), random.standard_normal(weight.shape).astype(np.float32)
        if weight.ndim < 2 or "norm" in name or name.rsplit(".", 1)[-1] in ("base", "scale"):
            return jnp.asarray(weight + np.float32(0.1) * noise)
        return jnp.asarray(noise * (1.5 / np.sqrt(weight.shape[-1])))

    weights = read_weights(made)
    return write_weights(made, {name: draw(name, weight) for name, weight in weights.items()})


@functools.cache
def released_model(config: ModelConfig, numerics: str = "float32") -> Transformer:
    """Returns the same model as the release stores it: FP4 experts, FP8, bfloat16."""
    made = float_model(config, numerics)
    formats, stored = stored_formats(config), {}
    quantize = jax.jit(quantize_weight, static_argnums=1)
    for name, weight in read_weights(made).items():
        if formats[name] in ("fp4", "fp8"):
            stored[name] = quantize(weight, formats[name])
        elif formats[name] == "bfloat16":
            stored[name] = weight.astype(jnp.bfloat16)
    return write_weights(made, stored)
