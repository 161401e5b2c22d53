"""Four layers of V4-Flash's sizes on one device: reading, decoding, and a gradient.

    python -m benchmarks.layers                        # one GPU with 70 GiB
    python -m benchmarks.layers --tokens 8192 --rows   # reading only

The model has a window layer, two CSA layers and an HCA layer (ratios 0, 4, 128, 4), 32 experts of
which a token has six, embedding and head of the whole vocabulary, and random bfloat16 weights.

Each length is read `--chunk` tokens at a time into a cache for the longest length but one, or for
itself where it is longer. Then 64 tokens are decoded, of which the last 32 count. Chunks and steps
are compiled before.

For every length of `--rows` the gradient of one row's loss is taken. Layers are recomputed in the
backward pass, weights and gradients are float32, and the optimizer is left out. FLOPs are the
model's, three times those of the forward pass, beside the card's published peak.
"""

import argparse
import dataclasses
import time
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from v4jax.config import ModelConfig
from v4jax.config.data import DataConfig, SourceConfig
from v4jax.config.loading import load_model_config
from v4jax.config.model import LayerKind, RouterKind
from v4jax.config.numerics import BFLOAT16
from v4jax.config.run import TrainConfig
from v4jax.costs import flops
from v4jax.costs.chips import CHIPS
from v4jax.kernels import Target
from v4jax.model import Transformer, take_inventory
from v4jax.model.transformer import abstract_transformer
from v4jax.training.batch import Batch
from v4jax.training.forward import Mode
from v4jax.training.losses import compute_losses, count_totals
from v4jax.training.state import TrainState, as_float32, join_model
from v4jax.training.trainable import split_trained

DECODED, TIMED = 64, 32
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[8192, 65_536, 1_048_576 - DECODED]
    )
    parser.add_argument("--rows", type=int, nargs="*", default=[4096, 32_768])
    parser.add_argument("--chunk", type=int, default=8192)
    options = parser.parse_args()
    device = jax.devices()[0]
    print(machine.describe(), flush=True)
    config = flash_layers()
    if options.tokens:
        read_all(make_model(config), sorted(options.tokens), options.chunk)
    if options.rows:
        print(
            "| row | gradient in | tokens/s | model TFLOP/s | of the peak |\n|--:|--:|--:|--:|--:|"
        )
    for tokens in options.rows:
        seconds = take_gradient(config, tokens)
        rate = (
            flops.total(flops.count_training(take_inventory(config), tokens, remat=False))
            / seconds
            / 1e12
        )
        peak = peak_of(device.device_kind)
        share = f"{100 * rate / peak:.1f} %" if peak else "–"
        line = f"{seconds:.3f} s | {tokens / seconds:,.0f} | {rate:.1f} | {share} |"
        print(f"| {tokens:,} | {line}", flush=True)


def read_all(model: Transformer, lengths: list[int], chunk: int) -> None:
    """Prints the table of reading and decoding."""
    print("| tokens | read in | tokens/s | decoding a token |\n|--:|--:|--:|--:|")
    shared = lengths[-2] if len(lengths) > 1 else lengths[-1]
    for tokens in lengths:
        capacity = max(tokens, shared) + DECODED
        seconds, step = read_and_decode(model, tokens, capacity, min(chunk, lengths[0]))
        line = f"{seconds:.3f} s | {tokens / seconds:,.0f} | {1e3 * step:.2f} ms |"
        print(f"| {tokens:,} | {line}", flush=True)


def flash_layers() -> ModelConfig:
    """Returns the configuration of the four layers."""
    kinds = LayerKind.WINDOW, LayerKind.CSA, LayerKind.HCA, LayerKind.CSA
    return dataclasses.replace(
        load_model_config("v4_flash"),
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4),
        layer_types=kinds,
        mlp_layer_types=(RouterKind.HASH, *[RouterKind.TOPK] * 3),
        n_routed_experts=32,
        num_nextn_predict_layers=0,
    )


def make_model(config: ModelConfig, storage: str = "bfloat16") -> Transformer:
    """Returns the model with random matrices, and vectors of ones."""
    abstract = abstract_transformer(config, BFLOAT16, storage=storage, target=Target.here())
    leaves, tree = jax.tree.flatten(abstract)

    def draw(key, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jax.random.randint(key, leaf.shape, 0, config.n_routed_experts, leaf.dtype)
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        return (0.02 * jax.random.normal(key, leaf.shape)).astype(leaf.dtype)

    @jax.jit
    def draw_all():
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
        return [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]

    return jax.tree.unflatten(tree, draw_all())


def peak_of(kind: str) -> float | None:
    """Returns the published bfloat16 FLOPs a second of a GPU, None where it is unknown."""
    names = (name for name in ("h100", "h200") if name.upper() in kind)
    return next((CHIPS[name].bf16_flops_per_second for name in names), None)


def read_and_decode(model, tokens: int, capacity: int, chunk: int) -> tuple[float, float]:
    """Returns the seconds of reading, and of one decoded token."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, tokens), np.int32)
    ids = np.pad(ids, [(0, 0), (0, -tokens % chunk)])
    starts = range(0, tokens, chunk)
    parts = [jnp.asarray(ids[:, first : first + chunk]) for first in starts]
    lengths = [jnp.array([min(chunk, tokens - first)], jnp.int32) for first in starts]
    one, options = jnp.ones(1, jnp.int32), {"logits": "last", "donate": True, "trusted": True}
    extend = model.flatten().extend
    for count in (1, len(parts)):  # one chunk to compile, then all of them
        cache = model.init_cache(1, capacity)
        begin = time.perf_counter()
        for part, length in zip(parts[:count], lengths, strict=False):
            logits, cache = extend(part, cache, length, **options)
        logits.block_until_ready()
        seconds = time.perf_counter() - begin
    for step in range(DECODED):
        if step == DECODED - TIMED:
            logits.block_until_ready()
            begin = time.perf_counter()
        token = choose_token(logits)
        logits, cache = extend(token, cache, one, **options)
    logits.block_until_ready()
    return seconds, (time.perf_counter() - begin) / TIMED


@jax.jit
def choose_token(logits):
    return logits.argmax(-1)[:, None].astype(jnp.int32)


def take_gradient(config: ModelConfig, tokens: int) -> float:
    """Returns the seconds of the loss's gradient for one row."""
    data = DataConfig((SourceConfig("text", paths=("none",)),), length=tokens, batch=1)
    run = TrainConfig("v4_flash", "none", data, steps=1000, numerics="bfloat16")
    model = make_model(config, "float32")
    frozen, weights, biases = split_trained(model, run)
    weights = {name: as_float32(value) for name, value in weights.items()}
    del model
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, tokens), np.int32)
    kept = np.broadcast_to(np.arange(tokens) > 0, ids.shape).astype(np.float32)
    batch = jax.tree.map(jnp.asarray, Batch(ids, kept, np.zeros_like(ids)))

    @jax.jit
    def differentiate(frozen, weights, biases, batch):
        totals = count_totals(jax.tree.map(lambda x: x[None], batch), frozen.config)

        def loss(weights):
            state = TrainState(jnp.zeros((), jnp.int32), weights, biases, None, jnp.zeros(()))
            return compute_losses(join_model(frozen, state), batch, totals, run.loss, Mode())[0]

        return jax.value_and_grad(loss)(weights)

    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        found = jax.block_until_ready(differentiate(frozen, weights, biases, batch))
        seconds.append(time.perf_counter() - begin)
        assert bool(jnp.isfinite(found[0]))
        del found
    return median(seconds[1:])


if __name__ == "__main__":
    main()
