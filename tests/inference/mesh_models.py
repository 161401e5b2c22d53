"""Small checkpoints for jobs on many devices: few layers, and no two tokens nearly alike."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from parallel.models import CONFIG, model

import v4jax
from v4jax.config import LayerKind

RATIOS = {LayerKind.CSA: 4, LayerKind.HCA: 128}


def write_model(folder: Path, *kinds: LayerKind) -> Path:
    """Writes a checkpoint with one layer of each kind, and returns its folder."""
    config = dataclasses.replace(
        CONFIG,
        num_hidden_layers=len(kinds),
        num_nextn_predict_layers=0,
        compress_ratios=tuple(RATIOS[kind] for kind in kinds),
        layer_types=kinds,
        mlp_layer_types=CONFIG.mlp_layer_types[: len(kinds)],
    )
    made = jax.tree.map(jnp.asarray, model(config=config))  # some are of NumPy's float64
    v4jax.save(made, folder, format="transformers")
    return folder
