"""Speed of exact selection on this machine, against its own matrix products.

    python -m tests.benchmarks.bench_indexer
    python -m tests.benchmarks.bench_indexer --entries=65536 --entry_block=1024

Nano's shapes (4 index heads of 32 channels, the best 64), one tile of queries that sees every
entry. Printed: the rate of scoring (counted as the products' 2 · queries · entries · heads ·
channels), its ratio to a float32 product of 2048³ measured in the same run, just before and just
after, and the part of the whole selection that is not scoring.
"""

import argparse
import time

import jax
import jax.numpy as jnp

from v4jax.kernels import indexer
from v4jax.kernels.indexer import reference
from v4jax.kernels.table import EntryTable
from v4jax.quant import EntryFormat

HEADS, CHANNELS, COUNT, RATIO = 4, 32, 64, 4
MATMUL = 2048


def best_seconds(function, *arguments, repeats: int) -> float:
    """Returns the shortest of `repeats` calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def matmul_rate() -> float:
    """Returns FLOP/s of a square float32 product."""
    x = jnp.ones((MATMUL, MATMUL), jnp.float32)
    return 2 * MATMUL**3 / best_seconds(jax.jit(jnp.matmul), x, x, repeats=5)


def draw(queries: int, entries: int):
    """Returns queries, head weights and a table of keys, all float32 noise."""
    keys = jax.random.split(jax.random.key(0), 3)
    stored_as = EntryFormat("float32", CHANNELS, CHANNELS // 2, "float32")
    stored = {"values": jax.random.normal(keys[0], (2, 1, entries, CHANNELS))}
    return (
        jax.random.normal(keys[1], (1, queries, HEADS, CHANNELS)),
        jax.random.normal(keys[2], (1, queries, HEADS)),
        EntryTable(stored, jnp.int32(1), stored_as),
    )


def score_all(queries, weights, keys: EntryTable):
    """Returns one number that needs every score, block by block as the selection makes them."""
    block = min(reference.ENTRY_BLOCK, keys.capacity)

    def add(total, index):
        scores = reference.score(queries, weights, keys.block(index * block, block))
        return jnp.maximum(total, scores.max(axis=-1)), None

    blocks = jnp.arange(keys.capacity // block, dtype=jnp.int32)
    total = jnp.full(queries.shape[:2], -jnp.inf)
    return jax.lax.scan(add, total, blocks)[0]


def measure(queries: int, entries: int, repeats: int) -> str:
    """Returns a line of the table."""
    arrays = draw(queries, entries)
    start = jnp.array([entries * RATIO - queries], jnp.int32)
    select = jax.jit(
        lambda q, w, k: indexer.select(q, w, k, start, start + queries, ratio=RATIO, count=COUNT)
    )
    before = matmul_rate()
    scoring = best_seconds(jax.jit(score_all), *arrays, repeats=repeats)
    whole = best_seconds(select, *arrays, repeats=repeats)
    matmul = max(before, matmul_rate())
    flops = 2 * queries * entries * HEADS * CHANNELS
    return (
        f"{queries:7} {entries:8} {matmul / 1e9:8.0f} {flops / scoring / 1e9:8.0f} "
        f"{flops / scoring / matmul:6.2f} {flops / whole / matmul:6.2f} "
        f"{1e3 * whole:9.1f} {100 * (1 - scoring / whole):5.0f} %"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, nargs="+", default=[2048, 65_536, 262_144])
    parser.add_argument("--queries", type=int, default=None, help="default: one tile")
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("query_tile", "entry_block"):
        parser.add_argument(f"--{name}", type=int, default=None, help="instead of the default")
    options = parser.parse_args()
    for name in ("query_tile", "entry_block"):
        if getattr(options, name) is not None:
            setattr(reference, name.upper(), getattr(options, name))
    print_table(options.entries, options.queries or reference.QUERY_TILE, options.repeats)


def print_table(entries: list[int], queries: int = reference.QUERY_TILE, repeats: int = 3):
    """Prints a line for each number of entries."""
    print("queries  entries   matmul  scoring  ratio  whole     whole selection")
    print("                 GFLOP/s  GFLOP/s         ratio        ms  share")
    for count in entries:
        print(measure(queries, count, repeats))


if __name__ == "__main__":
    main()
