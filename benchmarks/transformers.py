"""Prefill and decode against transformers: same weights, one run, float32 ([oracle] extra).

    python -m benchmarks.transformers
    python -m benchmarks.transformers --tokens 8192 --skip-transformers

Both sides compute the logits of the last token only, head included. Ours is timed after a call of
each shape that compiles, transformers after a short call.

This configuration has four index heads. Many entries then score exactly 0 and tie, and the two
libraries select differently as soon as selection leaves entries out. Equality is therefore checked
at 256 tokens, before it does. (The tests compare long sequences with enough index heads.)
"""

import argparse
import pathlib
import tempfile
import time

import jax
import numpy as np

import v4jax
from benchmarks import machine
from tests.oracle import checkpoints
from v4jax.costs import flops
from v4jax.model import take_inventory

# A small model that both libraries run in minutes; proportions are the released ones.
CONFIG = checkpoints.tiny_config(
    [0, 0, 4, 128, 4, 128, 4, 128],
    hidden_size=256,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=128,
    o_groups=4,
    o_lora_rank=64,
    n_routed_experts=32,
    num_experts_per_tok=6,
    moe_intermediate_size=128,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=64,
    num_hash_layers=2,
    vocab_size=129280,
    num_nextn_predict_layers=0,
)
CONFIG["compress_ratios"] = CONFIG["compress_ratios"][:8]
DECODED = 32
COMPARED = 256  # tokens; index_topk × 4, so every entry is selected


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-transformers", action="store_true")
    options = parser.parse_args()
    tensors = {
        name: array if array.dtype.kind == "i" else array.astype(np.float32)
        for name, array in checkpoints.random_checkpoint(CONFIG, 0, quantized=False).items()
    }
    ids = np.random.RandomState(0).randint(0, CONFIG["vocab_size"], options.tokens)
    print(machine.describe())
    before = machine.product_rate()
    ours, our_logits, config = time_ours(tensors, ids, options)
    product = max(before, machine.product_rate())
    report("v4jax", ours, options.tokens)
    work = flops.total(flops.count_tokens(take_inventory(config), 0, options.tokens))
    print(f"prefill: {machine.share(work / ours[0], product)}")
    if not options.skip_transformers:
        theirs, their_logits = time_transformers(tensors, ids)
        report("transformers", theirs, options.tokens)
        print(f"prefill {theirs[0] / ours[0]:.1f} times, decode {theirs[1] / ours[1]:.1f} times")
        error = np.abs(our_logits - their_logits).max()
        print(f"logits after {COMPARED} tokens differ by at most {error:.1e}")


def report(name, times, tokens):
    prefill, decode = times
    print(
        f"{name}: prefill {prefill:.2f} s = {tokens / prefill:.0f} tokens/s, "
        f"decode {decode * 1e3:.2f} ms per token",
        flush=True,
    )


def time_ours(tensors, ids, options):
    """Returns (prefill seconds, decode seconds per token), logits after COMPARED tokens, config."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.write_checkpoint(pathlib.Path(folder), tensors, CONFIG)
        model = v4jax.load(folder, numerics="float32")
    extend = model.flatten().extend

    def prefill():
        cache = model.init_cache(1, len(ids) + 2 * DECODED)
        for start in range(0, len(ids), options.chunk):
            part = ids[None, start : start + options.chunk]
            logits, cache = extend(part, cache, logits="last", donate=True)
        return jax.block_until_ready(logits), cache

    def decode(logits, cache):
        for _ in range(DECODED):
            token = np.asarray(logits).argmax(-1)[:, None]
            logits, cache = extend(token, cache, logits="last", donate=True)
        jax.block_until_ready(logits)

    cache = model.init_cache(1, COMPARED)
    compared, _ = model.extend(ids[None, :COMPARED], cache, logits="last")
    decode(*prefill())
    best = [np.inf, np.inf]
    for _ in range(options.repeats):
        start = time.perf_counter()
        logits, cache = prefill()
        middle = time.perf_counter()
        decode(logits, cache)
        end = time.perf_counter()
        best = [min(best[0], middle - start), min(best[1], (end - middle) / DECODED)]
    return best, np.asarray(compared)[0], model.config


def time_transformers(tensors, ids):
    """Returns times and logits of transformers, as `time_ours` does."""
    import torch

    from tests.oracle import hf

    model = hf.build(tensors, CONFIG)

    @torch.no_grad()
    def call(tokens, cache):
        tokens = torch.tensor(tokens[None])
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def new_cache():
        return hf.DynamicCache(config=model.config)

    compared = call(ids[:COMPARED], new_cache()).logits[0, -1].numpy()
    cache = new_cache()
    start = time.perf_counter()
    logits = call(ids, cache).logits[0, -1]
    middle = time.perf_counter()
    for _ in range(DECODED):
        logits = call(np.array([int(logits.argmax())]), cache).logits[0, -1]
    end = time.perf_counter()
    return (middle - start, (end - middle) / DECODED), compared


if __name__ == "__main__":
    main()
