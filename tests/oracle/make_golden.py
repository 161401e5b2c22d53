"""Writes tests/golden/*.npz from transformers in float32.  python -m tests.oracle.make_golden

Run from the repository root with the `[oracle]` extra; `long` takes some minutes and 3 GB, the
others seconds. Names on the command line choose files, e.g. `... make_golden flash pieces`.

Every file is checked while it is made: transformers (float32) against the float64 transcription,
whose largest difference per position is stored as `noise`.
"""

import dataclasses
import json
import sys

import numpy as np
import torch
import transformers
from transformers import DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from . import checkpoints, golden, hf
from .released_numpy import FLOAT64, ReleasedModel

# Transformers forms rope angles in float32, which is visible at 32 K; everything else is exact.
ORACLE = dataclasses.replace(FLOAT64, angles=np.float32)

# Seeds were searched for the largest selection margins; see `margins` in the files.
SEEDS = {"flash": 137, "pro": 209, "long": 1}
# Beginning, first truncated selection (visible entries > index_topk), window edges, block edges.
# fmt: off
POSITIONS_1000 = np.array([
    0, 1, 2, 3, 4, 5, 7, 8, 63, 64, 95, 96, 98, 99, 100, 103, 104, 126, 127, 128, 129, 131, 200,
    254, 255, 256, 257, 300, 383, 384, 400, 511, 512, 513, 600, 639, 640, 700, 767, 768, 800, 895,
    896, 900, 950, 991, 995, 996, 997, 998, 999,
])
# The same up to 32 K; filled up with random positions to 64.
POSITIONS_LONG = np.array([
    0, 1, 3, 4, 63, 98, 99, 103, 126, 127, 128, 129, 255, 256, 511, 512, 1023, 1024, 2047, 2048,
    4094, 4095, 4096, 4097, 8191, 8192, 12287, 16383, 16384, 24575, 24576, 32639, 32640, 32764,
    32765, 32766, 32767,
])
# fmt: on
# A position joins the fill of `long` only if float32 determines it this well.
QUIET = 2e-5


def common(config, seed):
    return dict(
        config=json.dumps(config),
        seed=seed,
        made_with=f"transformers {transformers.__version__}, torch {torch.__version__}, float32",
    )


def oracle_run(tensors, config, ids):
    """Returns (float64 logits of all positions, smallest margin of each position)."""
    model = ReleasedModel(tensors, config, ORACLE)
    logits = model.logits(ids)
    return logits, np.min(list(model.margins.values()), 0)


@torch.no_grad()
def whole_model(config, seed):
    """Logits and residual streams of a whole model on 1,000 tokens, in one call."""
    tensors = checkpoints.random_checkpoint(config, seed, quantized=False)
    ids = np.random.RandomState(seed).randint(0, config["vocab_size"], 1000)
    model = hf.build(checkpoints.dequantize(tensors), config)
    out = model(torch.tensor(ids[None]), use_cache=False, output_hidden_states=True)
    logits = out.logits[0].numpy()
    expected, margins = oracle_run(tensors, config, ids)
    noise = np.abs(logits - expected).max(1)
    spots = np.array([0, 127, 300, 999])
    # hidden_states[i] enters layer i; the last one is collapsed, so the last layer is left out.
    streams = [h[0, spots].numpy() for h in out.hidden_states[1 : config["num_hidden_layers"]]]
    return dict(
        common(config, seed),
        ids=ids.astype(np.int16),
        positions=POSITIONS_1000,
        logits=logits[POSITIONS_1000],
        margins=margins.astype(np.float32),
        noise=noise[POSITIONS_1000].astype(np.float32),
        noise_everywhere=np.float32(noise.max()),
        streams_positions=spots,
        streams=np.stack(streams),
    )


def long_model(config, seed, tokens=32768, chunk=512):
    """Logits of a very small model on 32,768 tokens, prefilled in chunks through the cache."""
    tensors = checkpoints.random_checkpoint(config, seed, quantized=False)
    ids = np.random.RandomState(seed).randint(0, config["vocab_size"], tokens)
    model = hf.build(checkpoints.dequantize(tensors), config)
    logits = hf.chunked(model, ids, [chunk] * (tokens // chunk))
    expected, margins = oracle_run(tensors, config, ids)
    noise = np.abs(logits - expected).max(1)
    quiet = np.setdiff1d(np.flatnonzero(noise < QUIET), POSITIONS_LONG)
    fill = np.random.RandomState(0).choice(quiet, 64 - len(POSITIONS_LONG), replace=False)
    positions = np.sort(np.concatenate([POSITIONS_LONG, fill]))
    return dict(
        common(config, seed),
        ids=ids.astype(np.uint8),
        positions=positions,
        logits=logits[positions],
        margins=margins[positions].astype(np.float32),
        noise=noise[positions].astype(np.float32),
        noise_everywhere=np.float32(noise.max()),
        noise_median=np.float32(np.median(noise)),
        positions_above_quiet=np.int64((noise >= QUIET).sum()),
    )


@torch.no_grad()
def pieces(config, seed):
    """Outputs of transformers' single modules on random inputs (`golden.piece_inputs`)."""
    tensors = checkpoints.random_checkpoint(config, seed, quantized=False)
    model = hf.build(checkpoints.dequantize(tensors), config)
    saved = common(config, seed)
    for piece, where in golden.PIECES.items():
        inputs = golden.piece_inputs(config, piece)
        inputs = {key: torch.tensor(value[None]) for key, value in inputs.items()}
        layer = None if where["layer"] is None else model.model.layers[where["layer"]]
        for key, value in run_piece(model, layer, where["layer"], piece, **inputs).items():
            saved[f"{piece}/{key}"] = value.squeeze(0).numpy()
    return saved


def run_piece(model, layer, number, piece, x=None, streams=None, low_rank=None, ids=None):
    if piece == "hyper_connections":
        post, mix, collapsed = layer.attn_hc(streams)
        return dict(post=post, mix=mix, collapsed=collapsed)
    if piece == "hyper_connections_head":
        return dict(collapsed=model.model.hc_head(streams))
    positions = torch.arange(x.shape[1])[None]
    if piece.endswith("_attention"):
        rotary = model.model.rotary_emb
        rope = {kind: rotary(x, positions, layer_type=kind) for kind in ("main", "compress")}
        distance = positions[0][:, None] - positions[0][None]
        seen = (distance >= 0) & (distance < model.config.sliding_window)
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
        out, _ = layer.self_attn(x, rope, positions, mask)
        return dict(rows=out[:, golden.ATTENTION_ROWS])
    if piece.endswith("_compressor"):
        # The rank vectors feed only the indexer, whose choice is not part of the entries.
        unused = torch.zeros(1, x.shape[1], model.config.q_lora_rank)
        entries, _ = layer.self_attn.compressor(x, unused, positions, None, number)
        return dict(entries=entries.squeeze(1))
    if piece == "indexer":
        cache = DynamicCache(config=model.config)
        chosen = layer.self_attn.compressor.indexer(x, low_rank, positions, cache, number)
        keys = cache.layers[number].compressed_kv["indexer"]
        return dict(keys=keys, chosen=chosen.sort(-1).values.to(torch.int16))
    if piece == "moe":
        return dict(out=layer.mlp(x))
    assert isinstance(layer.mlp.gate, modeling.DeepseekV4HashRouter) == (ids is not None)
    _, weights, chosen = layer.mlp.gate(x) if ids is None else layer.mlp.gate(x, ids)
    order = chosen.argsort(-1)
    return dict(experts=chosen.gather(1, order)[None], weights=weights.gather(1, order)[None])


MAKERS = {
    "flash": lambda: whole_model(checkpoints.FLASH_TINY, SEEDS["flash"]),
    "pro": lambda: whole_model(checkpoints.PRO_TINY, SEEDS["pro"]),
    "pieces": lambda: pieces(checkpoints.FLASH_TINY, SEEDS["flash"]),
    "long": lambda: long_model(checkpoints.LONG_TINY, SEEDS["long"]),
}


def main():
    golden.FOLDER.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MAKERS:
        made = MAKERS[name]()
        path = golden.FOLDER / f"{name}.npz"
        np.savez_compressed(path, **made)
        print(f"{name}: {path.stat().st_size / 1024:.0f} KiB")
        for key in ("logits", "margins", "noise"):
            if key in made:
                value = np.asarray(made[key], np.float64)
                finite = value[np.isfinite(value)]
                print(
                    f"  {key}: min {finite.min():.3g} max {finite.max():.3g} std {finite.std():.3g}"
                )
        print({k: v for k, v in made.items() if k.startswith(("noise_", "positions_above"))})


if __name__ == "__main__":
    main()
