"""Reads the golden files and regenerates the weights and inputs they were made from.

A golden file holds outputs, a seed and the configuration; weights come back from
`checkpoints.random_checkpoint(config, seed, quantized=False)` and inputs of single pieces from
`piece_inputs`. NumPy only: the files are read where torch is not installed.

Whole models (`flash`, `pro`, `long`):
  ids [t], positions [p], logits [p, vocab] of transformers in float32;
  margins [t] (`long`: [p]): the smallest distance, over indexers and routers, between the last
    chosen and the first rejected score at a position, relative to the largest score there. Float32
    moves it by about 1e-6; where it is larger, every correct implementation chooses the same;
  noise [p]: largest |logit difference| to the float64 transcription: what float32 leaves open.
    In `long` some of the 32,768 positions choose differently, which every later position feels;
  streams_positions [s], streams [layers, s, hc_mult, d]: the residual streams after each layer.

Pieces (`pieces`): outputs under `<piece>/<output>`, see `PIECES`.
"""

import json
import pathlib

import numpy as np

from . import checkpoints

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "golden"

# Every piece of `FLASH_TINY`: the layer it belongs to and the tokens it sees.
PIECES = {
    "hyper_connections": dict(layer=2, tokens=24),  # streams → pre-collapse, post, mix
    "hyper_connections_head": dict(layer=None, tokens=24),  # streams → collapsed
    "window_attention": dict(layer=1, tokens=300),  # x → rows of the attention output
    "csa_attention": dict(layer=2, tokens=300),
    "hca_attention": dict(layer=3, tokens=300),
    "csa_compressor": dict(layer=2, tokens=300),  # x → entries, rotated
    "hca_compressor": dict(layer=3, tokens=300),
    "indexer": dict(layer=2, tokens=300),  # x, q rank vectors → index keys, chosen entries
    "hash_router": dict(layer=0, tokens=64),  # x, ids → experts, weights
    "router": dict(layer=3, tokens=64),
    "moe": dict(layer=3, tokens=64),  # x → routed and shared experts together
}

# The attention pieces keep these rows of their 300.
ATTENTION_ROWS = np.array([0, 1, 2, 3, 4, 7, 95, 99, 103, 126, 127, 128, 200, 254, 255, 256, 299])


def piece_inputs(config, piece):
    """Returns the inputs of a piece: `x`, or `streams`, and where they apply `low_rank`, `ids`."""
    tokens, d = PIECES[piece]["tokens"], config["hidden_size"]
    random = np.random.RandomState([7, list(PIECES).index(piece)])
    if piece.startswith("hyper_connections"):
        shape = (tokens, config["hc_mult"], d)
        return {"streams": random.standard_normal(shape).astype(np.float32)}
    inputs = {"x": random.standard_normal((tokens, d)).astype(np.float32)}
    if piece == "indexer":
        shape = (tokens, config["q_lora_rank"])
        inputs["low_rank"] = random.standard_normal(shape).astype(np.float32)
    if piece == "hash_router":
        inputs["ids"] = random.randint(0, config["vocab_size"], tokens)
    return inputs


def load(name):
    """Returns {key: array} of `tests/golden/<name>.npz`, its `config` parsed and `seed` an int."""
    with np.load(FOLDER / f"{name}.npz") as file:
        golden = dict(file)
    golden["config"] = json.loads(str(golden["config"]))
    golden["seed"] = int(golden["seed"])
    return golden


def weights(golden):
    """Returns {official name: array}, BF16 and F32 as stored, of a golden file's checkpoint."""
    return checkpoints.random_checkpoint(golden["config"], golden["seed"], quantized=False)
