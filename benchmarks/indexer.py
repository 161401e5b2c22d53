"""Exact selection on this machine: its speed against the machine's own matrix products.

    python -m benchmarks.indexer
    python -m benchmarks.indexer --entries=65536 --entry_block=1024

The shapes are nano's: 4 index heads of 32 channels, the best 64 entries, one tile of queries that
sees every entry. Printed are the rate of scoring (2 · queries · entries · heads · channels FLOPs),
its ratio to a float32 product just before and after, and the part of the whole selection that is
not scoring.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from benchmarks import machine
from v4jax.kernels import Target, indexer
from v4jax.kernels.indexer import portable
from v4jax.kernels.table import EntryTable
from v4jax.quant import EntryFormat

HEADS, CHANNELS, COUNT, RATIO = 4, 32, 64, 4


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


def score_all(target: Target, queries, weights, keys: EntryTable):
    """Returns one number that needs every score, block by block as the selection makes them."""
    block = min(portable.ENTRY_BLOCK, keys.capacity)

    def add(total, index):
        scores = portable.score(target, queries, weights, keys.block(index * block, block))
        return jnp.maximum(total, scores.max(axis=-1)), None

    blocks = jnp.arange(keys.capacity // block, dtype=jnp.int32)
    total = jnp.full(queries.shape[:2], -jnp.inf)
    return jax.lax.scan(add, total, blocks)[0]


def measure(queries: int, entries: int, repeats: int) -> str:
    """Returns a line of the table."""
    arrays = draw(queries, entries)
    start = jnp.array([entries * RATIO - queries], jnp.int32)
    target = Target.here()
    options = {"ratio": RATIO, "count": COUNT, "target": target}
    select = jax.jit(lambda q, w, k: indexer.select(q, w, k, start, start + queries, **options))
    score = jax.jit(functools.partial(score_all, target))
    before = machine.product_rate()
    scoring = machine.best_seconds(score, *arrays, repeats=repeats)
    whole = machine.best_seconds(select, *arrays, repeats=repeats)
    matmul = max(before, machine.product_rate())
    flops = 2 * queries * entries * HEADS * CHANNELS
    return (
        f"{queries:7} {entries:8} {matmul / 1e9:8.0f} {flops / scoring / 1e9:8.0f} "
        f"{flops / scoring / matmul:6.2f} {flops / whole / matmul:6.2f} "
        f"{1e3 * whole:9.1f} {100 * (1 - scoring / whole):5.0f} %"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, nargs="+", default=[2048, 65_536, 262_144])
    parser.add_argument("--queries", type=int, default=None, help="default: one tile")
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("query_tile", "entry_block"):
        parser.add_argument(f"--{name}", type=int, default=None, help="instead of the default")
    options = parser.parse_args()
    for name in ("query_tile", "entry_block"):
        if getattr(options, name) is not None:
            setattr(portable, name.upper(), getattr(options, name))
    print(machine.describe())
    print_table(options.entries, options.queries or portable.QUERY_TILE, options.repeats)


def print_table(entries: list[int], queries: int = portable.QUERY_TILE, repeats: int = 3):
    """Prints a line for each number of entries."""
    print("queries  entries   matmul  scoring  ratio  whole     whole selection")
    print("                 GFLOP/s  GFLOP/s         ratio        ms  share")
    for count in entries:
        print(measure(queries, count, repeats))


if __name__ == "__main__":
    main()
