"""The small models of all tests: the tiny configuration with few layers, its weights random.

    model = make_model(PAIRS)                       float32 weights, logits of deviation near 1
    model = make_model(CSA, stored_as="released")   the same weights, rounded as the release does
    model = on_mesh(model, expert=2, context=4)     on the eight simulated devices

Equal layers are scanned, and compile once. A model is made once per process and never changed.
"""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracle import checkpoints, golden

import v4jax
from v4jax.checkpoint.names import stored_formats
from v4jax.config import LayerKind, ModelConfig, Numerics, RouterKind, get_numerics
from v4jax.config.loading import load_model_config
from v4jax.config.model import DraftConfig
from v4jax.kernels import Target
from v4jax.model import Transformer
from v4jax.model.weights import read_weights, write_weights
from v4jax.parallel import Layout, WeightLayout, make_mesh
from v4jax.parallel.weight_sharding import put_sharded
from v4jax.quant import quantize_weight

CPU = Target("cpu")
TINY = load_model_config("tiny")
DRAFT = DraftConfig(stages=1, target_layer_ids=(0,), markov_rank=4, block_size=3, noise_token_id=7)
RATIOS = {LayerKind.WINDOW: 0, LayerKind.CSA: 4, LayerKind.HCA: 128}


def make_config(
    kinds: str, *, mtp: bool = False, draft: DraftConfig | None = None, **changes
) -> ModelConfig:
    """Returns the tiny configuration with one layer of each kind, such as "csa hca".

    Args:
      mtp: whether an MTP block follows, with a window.
      draft: the draft module that follows, such as `DRAFT`.
      changes: further fields.
    """
    layers = [LayerKind[kind.upper()] for kind in kinds.split()]
    behind = draft.stages if draft else int(mtp)
    blocks = [*layers, *[LayerKind.WINDOW] * behind]
    fields = dict(
        hc_sinkhorn_iters=2,  # unrolled: fewer compile sooner
        num_hidden_layers=len(layers),
        num_nextn_predict_layers=int(mtp),
        compress_ratios=tuple(RATIOS[kind] for kind in blocks),
        layer_types=tuple(blocks),
        mlp_layer_types=(RouterKind.TOPK,) * len(layers),
        draft=draft,
    )
    return dataclasses.replace(TINY, **fields | changes)


PAIRS = make_config("csa hca csa hca", mtp=True)
CSA = make_config("csa csa", mtp=True)
WINDOWS = make_config("window window")
IDS = np.random.RandomState(0).randint(0, 256, (4, 128))  # tokens of four rows


@functools.cache
def make_model(
    config: ModelConfig, numerics: str = "float32", *, stored_as: str = "float32"
) -> Transformer:
    """Returns a model.

    Args:
      stored_as: "float32", or "released" for FP4 experts, FP8 and bfloat16.
    """
    made = Transformer(config, get_numerics(numerics), storage="float32", rngs=nnx.Rngs(2))
    random = np.random.RandomState(5)
    found = read_weights(made) | read_weights(made, buffers=True)
    values = {name: _draw(name, value, random) for name, value in found.items()}
    made = write_weights(made, values)
    return made if stored_as == "float32" else store_as_released(made)


def _draw(name: str, weight, random: np.random.RandomState) -> jax.Array:
    """Returns weights away from their neutral start, under which activations keep their size."""
    noise, last = random.standard_normal(weight.shape), name.rsplit(".", 1)[-1]
    if last == "table":
        return weight
    if last == "scale":
        noise = np.asarray(weight) + 0.7 + 0.1 * noise
    elif last in ("sink", "base", "bias", "position_bias"):
        noise = np.asarray(weight) + 0.5 * noise
    elif "norm" in name:
        noise = np.asarray(weight) + 0.1 * noise
    else:
        noise *= 1.5 / np.sqrt(weight.shape[-1])
    return jnp.asarray(noise, jnp.float32)


def store_as_released(model: Transformer) -> Transformer:
    """Returns the model with its weights in the formats of the released checkpoints."""
    formats, stored = stored_formats(model.config), {}
    quantize = jax.jit(quantize_weight, static_argnums=1)
    for name, weight in read_weights(model).items():
        if formats[name] in ("fp4", "fp8"):
            stored[name] = quantize(weight, formats[name])
        elif formats[name] == "bfloat16":
            stored[name] = weight.astype(jnp.bfloat16)
    return write_weights(model, stored)


def on_mesh(model: Transformer, weight_layout: WeightLayout = "serve", **sizes: int) -> Transformer:
    """Returns the model on a mesh of the eight simulated devices."""
    layout = Layout(make_mesh(**sizes), weight_layout)
    moved = put_sharded(model, layout)
    moved.layout = layout
    return moved


def write_folder(folder: Path, config: ModelConfig, format: str = "transformers") -> Path:
    """Writes a model's checkpoint, and returns its folder."""
    v4jax.save(make_model(config), folder, format=format)
    return folder


def load_tensors(
    tensors: dict, config: ModelConfig, numerics: str | Numerics = "float32"
) -> Transformer:
    """Returns the model of {released name: array}, read through a checkpoint folder."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_checkpoint(folder, tensors, config)
        return v4jax.load(folder, numerics)


@functools.cache
def golden_file(name: str) -> dict:
    """Returns the golden file `name`, as `oracle.golden.load` does."""
    return golden.load(name)


@functools.cache
def golden_model(name: str) -> Transformer:
    """Returns the float32 model whose outputs the golden file `name` holds."""
    made = golden_file(name)
    return load_tensors(golden.weights(made), made["config"])
