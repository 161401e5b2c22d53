"""Documents up to a million tokens, read by `v4jax batch` with nano on this machine.

    python -m benchmarks.long                      # 8 K, 64 K and 1 M tokens
    python -m benchmarks.long --tokens 8192 65536

Each document is real text of the installed Python, one byte a token. A child process reads it with
one question, as a user would. (Shorter ones leave room for the tokens around them, so that no chunk
is read for these alone.) Printed for each: prefill speed and its share of the product rate, the
largest memory of the process, and the bytes of its cache beside the report's formula for nano's
sizes. The shortest is read again with a cache for the whole context, which must change nothing.

Decoding follows, in caches filled with noise; the shortest also in a cache for the whole context.
Last comes the rate of index scoring and of the whole selection at the longest document's entries,
against matrix products of the same minute.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import v4jax
from benchmarks import indexer, machine
from v4jax.cache import init_cache
from v4jax.config import LayerKind
from v4jax.config.loading import load_model_config
from v4jax.config.numerics import FLOAT32
from v4jax.costs import flops
from v4jax.model import take_inventory
from v4jax.training.data.needles import read_text

MODEL = "nano"
ANSWER_TOKENS = 8
DECODED = 256  # room for tokens to be decoded, of which the last ones are timed
TIMED = 64
# Tokens around a document, left free for it where the length is one of the engine's chunks.
FRAME_TOKENS = 64
MILLION = 1_048_576
FLOAT_BYTES = 4
QUESTION = "What is this text about?"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65_536, MILLION])
    options = parser.parse_args()
    config = load_model_config(MODEL)
    limit = config.max_position_embeddings
    jax.config.update("jax_platforms", "cpu")
    print(machine.describe())
    print(
        f"{'tokens':>9} {'capacity':>9} {'prefill':>9} {'tokens/s':>9} {'memory':>9} "
        f"{'cache bytes':>13} {'formula':>13}  of the product rate"
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for tokens in options.tokens:
            show(config, tokens, None, *read_document(folder, tokens, None))
        first = min(options.tokens)
        show(config, first, limit, *read_document(folder, first, limit))
    model = v4jax.load(MODEL)
    for tokens, capacity in [*((n, n + DECODED) for n in options.tokens), (first, limit)]:
        milliseconds = 1e3 * decode_seconds(model, tokens, capacity)
        print(f"{tokens:9,} {capacity:9,}  decode {milliseconds:.2f} ms per token", flush=True)
    indexer.print_table([max(options.tokens) // 4])


def read_document(folder: pathlib.Path, tokens: int, capacity: int | None):
    """Returns the summary of the job and the largest resident memory of its process in bytes."""
    text, lines = folder / "document.txt", folder / "documents.jsonl"
    size = tokens if tokens == MILLION else tokens - FRAME_TOKENS
    text.write_bytes(read_text(None)[:size].decode(errors="ignore").encode())
    lines.write_text(json.dumps({"path": text.name, "question": QUESTION}) + "\n")
    command = [sys.executable, "-m", "v4jax.cli.main", "batch", f"--model={MODEL}", "--overwrite"]
    command += [f"--input={lines}", f"--output={folder / 'answers.jsonl'}"]
    command += [f"--summary={folder / 'summary.json'}", f"--max_new_tokens={ANSWER_TOKENS}"]
    if capacity:
        command.append(f"--max_tokens={capacity}")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return json.loads((folder / "summary.json").read_text()), usage.ru_maxrss * 1024


def show(config, tokens, capacity, summary, memory_bytes):
    """Prints a line of the table."""
    capacity = capacity or cache_capacity(config, summary["cache_bytes"])
    formula = formula_bytes(config, capacity)
    work = flops.total(flops.count_tokens(take_inventory(config), 0, tokens))
    share = machine.share(work / summary["read_seconds"], machine.product_rate())
    print(
        f"{tokens:9,} {capacity:9,} {summary['read_seconds']:7.1f} s "
        f"{summary['read_tokens_per_second']:9,.0f} "
        f"{memory_bytes / 2**30:5.2f} GiB {summary['cache_bytes']:13,} {formula:13,}  {share}",
        flush=True,
    )


def cache_capacity(config, cache_bytes: int) -> int:
    """Returns the capacity, of those the engine chooses, that has a cache of this size."""
    limit = config.max_position_embeddings
    doublings = (1 << power for power in range(limit.bit_length()))
    fitting = (n for n in doublings if n < limit and formula_bytes(config, n) >= cache_bytes)
    return next(fitting, limit)


def decode_seconds(model, tokens: int, capacity: int) -> float:
    """Returns the time of a token after `tokens` others, in a cache filled with noise."""
    cache, key = model.init_cache(1, capacity), jax.random.key(0)
    cache = dataclasses.replace(
        cache,
        lengths=jnp.array([tokens], jnp.int32),
        stored=jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), cache.stored),
    )
    token, extend = np.zeros((1, 1), np.int32), model.flatten().extend
    for step in range(2 * TIMED):
        if step == TIMED:
            begin = time.perf_counter()
        logits, cache = extend(token, cache, logits="last", donate=True)
        token = np.asarray(logits).argmax(-1)[:, None]
    return (time.perf_counter() - begin) / TIMED


def formula_bytes(config, tokens: int) -> int:
    """Returns the report's bytes for a float32 cache of so many tokens.

    Entries of a CSA layer and their index keys, one per ratio tokens; entries of an HCA layer; a
    window for every layer. The published table leaves out the unfinished windows and the length;
    here their bytes are added.
    """
    total = 0
    for layer in config.layers:
        channels = config.head_dim
        total += config.sliding_window * channels
        if layer.kind is not LayerKind.WINDOW:
            indexed = config.index_head_dim if layer.kind is LayerKind.CSA else 0
            total += -(-tokens // layer.ratio) * (channels + indexed)
    unfinished = jax.eval_shape(lambda: init_cache(config, FLOAT32, 1, tokens))
    rest = [unfinished.lengths, *jax.tree.leaves(unfinished.unfinished)]
    return total * FLOAT_BYTES + sum(x.size * x.dtype.itemsize for x in rest)


if __name__ == "__main__":
    main()
