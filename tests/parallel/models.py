"""The model of these tests: [CSA, HCA] twice in one scan, so that two blocks are compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from v4jax.config import LayerKind, ModelConfig, Numerics, RouterKind, get_numerics
from v4jax.config.loading import load_model_config
from v4jax.model import Transformer
from v4jax.parallel import Layout, make_mesh
from v4jax.parallel.weights import move

CONFIG = dataclasses.replace(
    load_model_config("tiny"),
    num_hidden_layers=4,
    compress_ratios=(4, 128, 4, 128, 0),
    layer_types=(LayerKind.CSA, LayerKind.HCA) * 2 + (LayerKind.WINDOW,),
    mlp_layer_types=(RouterKind.TOPK,) * 4,
)


@functools.cache
def model(numerics: str = "float32", config: ModelConfig = CONFIG) -> Transformer:
    """Returns the model on one device, its logits of deviation near 1."""
    chosen: Numerics = get_numerics(numerics)
    storage = "float32" if numerics == "float32" else "released"
    made = Transformer(config, chosen, storage=storage, rngs=nnx.Rngs(2))
    random = np.random.RandomState(5)

    def perturb(path, leaf):
        name = jax.tree_util.keystr(path)
        if storage != "float32" or leaf.dtype != jnp.float32 or "norm" in name:
            return leaf
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        if any(part in name for part in ("sink", "bias", "base")):
            return leaf + 0.5 * noise
        return leaf + 0.7 if "scale" in name else noise * (1.5 / np.sqrt(leaf.shape[-1]))

    return jax.tree_util.tree_map_with_path(perturb, made)


def on_mesh(made: Transformer, regime="prefill", **sizes) -> Transformer:
    """Returns the model on the eight simulated devices."""
    layout = Layout(make_mesh(**sizes), regime)
    moved = move(made, layout)
    moved.layout = layout
    return moved
