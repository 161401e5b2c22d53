"""Tiny checkpoint folders, and ways to damage them."""

import functools
import json
import pathlib

import numpy as np
from oracle import checkpoints

from v4jax.checkpoint import names
from v4jax.model.weights import variables
from v4jax.quant import ScaledArray

INDEX = "model.safetensors.index.json"

# A prefix, a repeated period and a suffix: [WINDOW, CSA, HCA, CSA, HCA, CSA] and MTP.
SMALL = checkpoints.tiny_config(
    [0, 4, 128, 4, 128, 4],
    hidden_size=64,
    num_attention_heads=4,
    head_dim=32,
    o_groups=2,
    o_lora_rank=16,
    q_lora_rank=24,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    index_n_heads=16,
    vocab_size=97,
)
# Odd in the middle: no two repeats until the end, so that prefix and suffix are long.
ODD = dict(SMALL, compress_ratios=[4, 0, 128, 128, 128, 0, 0], num_hash_layers=2)
# All layers alike: no prefix, no suffix.
UNIFORM = dict(SMALL, compress_ratios=[4] * 6 + [0], num_hash_layers=0)
# Nothing repeats.
SINGLE = dict(SMALL, compress_ratios=[0, 4, 128, 0], num_hidden_layers=3, num_hash_layers=1)
TWO_MTP = dict(SMALL, compress_ratios=[*SMALL["compress_ratios"], 0], num_nextn_predict_layers=2)


@functools.cache
def _tensors(config_text: str, kind: str):
    options = {
        "released": {},
        "base": dict(base=True),
        "bfloat16": dict(quantized=False),
    }[kind]
    return checkpoints.random_checkpoint(json.loads(config_text), seed=0, **options)


def tensors_of(config=SMALL, kind="released"):
    """Returns {name: array}: "released" (FP8, FP4), "base" (FP8, float32 scales) or "bfloat16"."""
    return dict(_tensors(json.dumps(config), kind))


def write(folder: pathlib.Path, tensors=None, config=SMALL, shards=3) -> pathlib.Path:
    """Writes a checkpoint folder and returns it."""
    checkpoints.write_checkpoint(
        folder, tensors_of() if tensors is None else tensors, config, shards
    )
    return folder


def change_json(path: pathlib.Path, change) -> None:
    """Applies `change(dictionary)` to a JSON file."""
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def stored_tensors(model) -> dict[str, np.ndarray]:
    """Returns {released name: array} of what the model holds, by the name table alone."""
    held, found = variables(model), {}
    for place in names.places(model.config):
        value = held[place.parameter].get_value()
        value = value[place.index] if place.index else value
        if isinstance(value, ScaledArray):
            found[place.tensor] = np.asarray(value.values)
            found[names.scale_name(place.tensor)] = np.asarray(value.scales)
        else:
            found[place.tensor] = np.asarray(value)
    return found
