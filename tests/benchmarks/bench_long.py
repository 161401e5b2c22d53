"""Documents up to a million tokens, read by `v4jax batch` with nano on this machine.

    python -m tests.benchmarks.bench_long                      # 8 K, 64 K and 1 M tokens
    python -m tests.benchmarks.bench_long --tokens 8192 65536

Each document is real text (of the installed Python), one byte a token, read by a child process as a
user would run it, with one question. Printed for each: prefill and decode speed, the largest memory
of the process, and the bytes of its cache beside the formula of section C.3 for nano's sizes. The
shortest is read again with a cache configured for the whole context: that must change nothing. Last
the rate of index scoring and of the whole selection at the longest document's entries, against
matrix products of the same minute.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import jax

from launch.demo_text import sample_text
from tests.benchmarks import bench_indexer
from v4jax.cache import init_cache
from v4jax.config import LayerKind
from v4jax.config.loading import load_model_config
from v4jax.config.numerics import FLOAT32

MODEL = "nano"
ANSWER_TOKENS = 128
FLOAT_BYTES = 4
QUESTION = "What is this text about?"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65_536, 1_048_576])
    options = parser.parse_args()
    config = load_model_config(MODEL)
    limit = config.max_position_embeddings
    print(
        f"{'tokens':>9} {'capacity':>9} {'prefill':>9} {'tokens/s':>9} {'decode':>9} {'memory':>9} "
        f"{'cache bytes':>13} {'formula':>13}"
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for tokens in options.tokens:
            show(config, tokens, None, *read_document(folder, tokens, None))
        first = min(options.tokens)
        show(config, first, limit, *read_document(folder, first, limit))
    jax.config.update("jax_platforms", "cpu")
    bench_indexer.print_table([max(options.tokens) // 4])


def read_document(folder: pathlib.Path, tokens: int, capacity: int | None):
    """Returns the summary of the job and the largest resident memory of its process in bytes."""
    text, lines = folder / "document.txt", folder / "documents.jsonl"
    text.write_text(sample_text(tokens), encoding="utf-8", newline="")
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
    decode = summary["write_seconds"] / summary["tokens_written"]
    capacity = capacity or cache_capacity(config, summary["cache_bytes"])
    formula = formula_bytes(config, capacity)
    print(
        f"{tokens:9,} {capacity:9,} {summary['read_seconds']:7.1f} s "
        f"{summary['read_tokens_per_second']:9,.0f} {1e3 * decode:6.2f} ms "
        f"{memory_bytes / 2**30:5.2f} GiB {summary['cache_bytes']:13,} {formula:13,}",
        flush=True,
    )


def cache_capacity(config, cache_bytes: int) -> int:
    """Returns the capacity, of those the engine chooses, that has a cache of this size."""
    capacity = 1
    while formula_bytes(config, capacity) < cache_bytes:
        capacity *= 2
    return min(capacity, config.max_position_embeddings)


def formula_bytes(config, tokens: int) -> int:
    """Returns section C.3's bytes for a float32 cache of so many tokens.

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
