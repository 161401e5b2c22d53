"""Appending entries and reading them again leaves the tables where they are: no copy on any chip.

The layers of a decoding step and of a chunk of a prefill, reduced to what touches entries: append
index keys, select, append entries, attend; then an HCA layer. Scanned over layers, cache donated.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from v4jax.cache import init_cache
from v4jax.cache.entries import CompressorRows
from v4jax.cache.hybrid import LayerCache
from v4jax.config import LayerKind
from v4jax.config.loading import load_model_config
from v4jax.config.numerics import RELEASED
from v4jax.kernels import Target, attention, indexer
from v4jax.planning import ahead_of_time

MILLION = 1 << 20
# name: sequences, tokens. A prefill also decodes the entries in use to rows, two bytes a channel
# (`attention.rows_tpu`); ids, unions and padding are modest.
SHAPES = {"decode": (4, 1), "prefill": (1, 2048)}
MODEST_BYTES = 64 * 2**20
# There the loop over layers carries bfloat16 in tiles of 16 rows; a Pallas kernel gets tiles of 8.
RETILED = pytest.mark.xfail(strict=True, reason="the rotated channels are retiled for each layer")
CASES = [
    ("decode", "v5e"),
    ("decode", "v5p"),
    ("decode", "v6e"),
    pytest.param("decode", "tpu7x", marks=RETILED),
    ("prefill", "v6e"),
]


def build_step(csa, hca, tokens, window, target):
    """Returns step(cache, …) → (cache, attended), of two CSA and two HCA layers."""

    def step(cache, queries, recent, sink, index_queries, weights, entries, heavy, keys):
        start, end = cache.lengths, cache.lengths + tokens

        def rows(ratio):
            completed = end // ratio - start // ratio
            return CompressorRows(None, None, start // ratio, completed, positions=None)

        def run(carry, i):
            cache, total = carry
            view = LayerCache(cache, csa, 2 * i, i, start, end, target)
            table, view = view.append_entries("index", keys, rows(4))
            options = {"ratio": 4, "count": 512, "target": target}
            selected = indexer.select(index_queries, weights, table, start, end, **options)
            table, view = view.append_entries("entries", entries, rows(4))
            arguments = (queries, recent, sink, start)
            total += attention.attend_sparse(
                *arguments, window=window, entries=table, selected=selected, target=target
            )[0]
            view = LayerCache(view.cache, hca, 2 * i + 1, i, start, end, target)
            table, view = view.append_entries("entries", heavy, rows(128))
            total += attention.attend_dense(
                *arguments, end, window=window, entries=table, ratio=128, target=target
            )[0]
            return (view.cache, total), None

        carry = (cache, jnp.zeros_like(queries))
        return jax.lax.scan(run, carry, jnp.arange(2, dtype=jnp.int32))[0]

    return step


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name, chip", CASES)
def test_no_table_is_copied(name, chip):
    batch, tokens = SHAPES[name]
    config = load_model_config("v4_flash")
    csa, hca = (
        next(layer for layer in config.layers if layer.kind is kind)
        for kind in (LayerKind.CSA, LayerKind.HCA)
    )
    few = dataclasses.replace(
        config,
        num_hidden_layers=4,
        num_nextn_predict_layers=0,
        compress_ratios=(4, 128) * 2,
        layer_types=(LayerKind.CSA, LayerKind.HCA) * 2,
        mlp_layer_types=config.mlp_layer_types[-4:],
    )
    device = ahead_of_time.describe(ahead_of_time.TOPOLOGIES[chip]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def spec(*shape, dtype=jnp.bfloat16):
        return place(jax.ShapeDtypeStruct(shape, dtype))

    heads, channels, window = config.num_attention_heads, config.head_dim, config.sliding_window
    cache = jax.tree.map(place, jax.eval_shape(lambda: init_cache(few, RELEASED, batch, MILLION)))
    target = Target("tpu", device.device_kind)
    step = jax.jit(build_step(csa, hca, tokens, window, target), donate_argnums=0)
    program = step.lower(
        cache,
        spec(batch, tokens, heads, channels),
        spec(batch, window + tokens, channels),
        spec(heads, dtype=jnp.float32),
        spec(batch, tokens, config.index_n_heads, config.index_head_dim),
        spec(batch, tokens, config.index_n_heads),
        spec(batch, -(-tokens // 4), channels),
        spec(batch, -(-tokens // 128), channels),
        spec(batch, -(-tokens // 4), config.index_head_dim),
    ).compile()
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.bytes(), "the cache must be written in place"
    rows = batch * MILLION // 4 * 2 * channels if tokens > 1 else 0
    results = 4 * batch * tokens * heads * channels * 2  # of a layer, before they are added
    assert memory.temp_size_in_bytes <= rows + results + MODEST_BYTES
