"""What the TPU compiler accepts: every kernel at the released models' sizes, for real chips.

Flash has 64 heads of 512 channels and selects 512 entries, Pro 128 and 1,024; both have 64 index
heads of 128 channels. HCA has an entry per 128 tokens of a million, CSA one per 4.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from v4jax.kernels import (
    Target,
    attention,
    hyper_connections,
    indexer,
    rotation,
    scaled_matmul,
)
from v4jax.kernels.grouped_matmul import pallas_tpu, pallas_tpu_backward
from v4jax.kernels.hyper_connections import Mix
from v4jax.kernels.table import EntryTable
from v4jax.planning import ahead_of_time
from v4jax.quant import EntryFormat, quantize_weight

from .compare import on_chips

pytestmark = pytest.mark.tpu_compiler
MILLION = 1_048_576
MODEST_BYTES = 64 * 2**20  # ids, unions and padded queries


def spec(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def integers(*shape):
    return spec(*shape, dtype=jnp.int32)


def compile_for(topology, run, *arguments, **options):
    """Compiles run(*arguments, target=…), for the first device of the topology."""
    target = Target("tpu", ahead_of_time.describe(topology).devices[0].device_kind)
    return ahead_of_time.compile_for(
        topology, functools.partial(run, target=target, **options), *arguments
    )


def with_gradients(run):
    """Returns the gradients of the first four arguments."""

    def gradients(*arguments, target):
        results, pull = jax.vjp(lambda *x: run(*x, *arguments[4:], target=target), *arguments[:4])
        return pull(results)

    return gradients


DENSE = {
    "Flash, prefill": dict(batch=1, tokens=2048, heads=64),
    "Pro, prefill": dict(batch=1, tokens=2048, heads=128),
    "Flash, decode": dict(batch=16, tokens=1, heads=64),
    "Pro, decode": dict(batch=64, tokens=1, heads=128),
    "Flash, window layer": dict(batch=1, tokens=2048, heads=64, entries=0),
    "Flash, training on packed rows": dict(
        batch=1, tokens=4096, heads=64, entries=32, backward=True, packed=True
    ),
    # A share of a sequence of 131,072 tokens, whose queries alone are 16 GiB.
    "Pro, training": dict(batch=1, tokens=4096, heads=128, entries=1024, backward=True),
}


@on_chips(DENSE)
def test_dense_attention(topology, shape):
    batch, tokens, heads = shape["batch"], shape["tokens"], shape["heads"]
    entries, backward = shape.get("entries", MILLION // 128), shape.get("backward", False)
    stored_as = EntryFormat("bfloat16" if backward else "fp8", 512, 64, "bfloat16")

    def run(queries, recent, sink, stored, layer, start, begin, *, target):
        options = {"window": 128, "begin": begin, "target": target}
        if entries:
            options |= {"entries": EntryTable(stored, layer, stored_as), "ratio": 128}
        return attention.attend_dense(queries, recent, sink, start, start + tokens, **options)

    compiled = compile_for(
        topology,
        with_gradients(run) if backward else run,
        spec(batch, tokens, heads, 512),
        spec(batch, 128 + tokens, 512),
        spec(heads, dtype=jnp.float32),
        jax.eval_shape(lambda: stored_as.zeros(2, batch, max(entries, 1))),
        integers(),
        integers(batch),
        integers(batch, tokens) if shape.get("packed") else None,
    )
    name = "dense_attention_backward" if backward else "dense_attention"
    assert name in compiled.as_text()


SPARSE = {
    "Flash, prefill": dict(batch=1, tokens=2048, heads=64, count=512),
    "Pro, prefill": dict(batch=1, tokens=2048, heads=128, count=1024),
    "Flash, decode": dict(batch=16, tokens=1, heads=64, count=512),
    "Pro, decode": dict(batch=8, tokens=1, heads=128, count=1024),
    "Flash, decode of a sixteenth": dict(
        batch=16, tokens=1, heads=64, count=512, entries=16384, window=0
    ),
    "Pro, decode of a thirty-second": dict(
        batch=8, tokens=1, heads=128, count=1024, entries=8192, window=0
    ),
    "Pro, drafts in a short document": dict(batch=8, tokens=3, heads=64, count=1024, entries=8192),
    "Flash, training on packed rows": dict(
        batch=1, tokens=4096, heads=64, count=512, entries=1024, packed=True, backward=True
    ),
    "Pro, training": dict(batch=1, tokens=4096, heads=128, count=1024, entries=1024, backward=True),
    # One of sixteen shares of the tokens, and all entries: the backward pass is XLA's everywhere.
    "Flash, share of 131,072 in training": dict(
        batch=1, tokens=8192, heads=64, count=512, entries=32768, backward=True
    ),
}


@on_chips(SPARSE)
def test_sparse_attention(topology, shape):
    batch, tokens, heads, count = (shape[key] for key in ("batch", "tokens", "heads", "count"))
    window, backward = shape.get("window", 128), shape.get("backward", False)
    entries = shape.get("entries", MILLION // 4)
    stored_as = EntryFormat("bfloat16" if backward else "fp8", 512, 64, "bfloat16")

    def run(queries, recent, sink, stored, layer, start, selected, begin, *, target):
        table = EntryTable(stored, layer, stored_as)
        options = {"window": window, "entries": table, "selected": selected, "begin": begin}
        return attention.attend_sparse(queries, recent, sink, start, **options, target=target)

    compiled = compile_for(
        topology,
        with_gradients(run) if backward else run,
        spec(batch, tokens, heads, 512),
        spec(batch, window + tokens, 512),
        spec(heads, dtype=jnp.float32),
        jax.eval_shape(lambda: stored_as.zeros(1, batch, entries)),
        integers(),
        integers(batch),
        integers(batch, tokens, count),
        integers(batch, tokens) if shape.get("packed") else None,
    )
    assert "sparse_attention" in compiled.as_text()
    if not backward:
        # Entries in use as rows, for a prefill, and never a copy of the table or its stack.
        rows = batch * entries * 2 * 512 if tokens > 1 else 0
        assert compiled.memory_analysis().temp_size_in_bytes <= rows + MODEST_BYTES


INDEXER = {
    "Flash, prefill": dict(batch=1, tokens=2048, count=512, kind="fp4"),
    "Flash, packed rows": dict(batch=1, tokens=2048, count=512, kind="bfloat16", packed=True),
    "Flash, decode": dict(batch=64, tokens=1, count=512, kind="fp4"),
    "Pro, prefill": dict(batch=1, tokens=2048, count=1024, kind="fp4"),
    "Pro, decode with drafts": dict(batch=16, tokens=2, count=1024, kind="fp4"),
    "Pro, decode on devices": dict(batch=16, tokens=1, count=1024, kind="fp4", devices=32),
    "Pro, a short chunk on devices": dict(batch=1, tokens=512, count=1024, kind="fp4", devices=32),
}


@on_chips(INDEXER)
def test_indexer(topology, shape):
    batch, tokens, devices = shape["batch"], shape["tokens"], shape.get("devices", 1)
    stored_as = EntryFormat(shape["kind"], 128, 64, "bfloat16")

    def run(queries, weights, stored, layer, start, end, begin, *, target):
        arguments = queries, weights, EntryTable(stored, layer, stored_as), start, end
        options = {"ratio": 4, "count": shape["count"], "target": target}
        if devices > 1:
            return indexer.select_with_scores(*arguments, **options)
        return indexer.select(*arguments, **options, begin=begin)

    compiled = compile_for(
        topology,
        run,
        spec(batch, tokens, 64, 128),
        spec(batch, tokens, 64),
        jax.eval_shape(lambda: stored_as.zeros(2, batch, MILLION // 4 // devices)),
        integers(),
        integers(batch),
        integers(batch),
        integers(batch, tokens) if shape.get("packed") else None,
    )
    assert "indexer_select" in compiled.as_text()


def weight_of(*shape, kind):
    if kind == "bfloat16":
        return spec(*shape)
    return jax.eval_shape(lambda: quantize_weight(jnp.zeros(shape), kind))


# Hidden size, expert width, experts.
FLASH, PRO = (4096, 2048, 256), (7168, 3072, 384)
# name → (size, stored, rows per tile)
EXPERTS = {
    "Flash decodes": (FLASH, "fp4", 16),
    "Pro prefills on many chips": (PRO, "fp4", 512),
    "an eighth of Flash in bfloat16": ((4096, 2048, 32), "bfloat16", 512),
    "an eighth of Flash in FP8": ((4096, 2048, 32), "fp8", 64),
}


@on_chips(EXPERTS)
def test_experts(topology, shape):
    (width, inner, experts), kind, tile = shape
    tiles = 8

    def both(rows, weights, gate_up, down, places, used, loads, *, target):
        options = {"limit": 10.0, "quantized": kind != "bfloat16", "loads": loads}
        arguments = rows, weights, gate_up, down, places, used
        hidden = pallas_tpu.multiply_gated(target, *arguments, **options)
        options = {"tile": tile, "loads": loads}
        return pallas_tpu.linear.multiply_tiles(target, hidden, down, places, used, **options)

    compiled = compile_for(
        topology,
        both,
        spec(tiles * tile, width),
        spec(tiles, tile, dtype=jnp.float32),
        weight_of(experts, 2, inner, width, kind=kind),
        weight_of(experts, width, inner, kind=kind),
        integers(tiles),
        integers(),
        integers(tiles),
    )
    assert compiled.as_text().count("tpu_custom_call") >= 2


@on_chips({"Pro, an eighth of the experts": PRO})
def test_gradients_of_experts(topology, shape):
    """As training on eight chips has them."""
    width, inner, experts = shape[0], shape[1], shape[2] // 8
    tile, tiles = pallas_tpu_backward.LARGEST_TILE, 8

    def gradients(rows, weights, gate_up, down, places, used, *, target):
        used = places, used
        hidden, both, _ = pallas_tpu_backward.inner(
            target, rows, rows, weights, gate_up, down, *used, limit=10.0, tile=tile
        )
        flat = gate_up.reshape(experts, 2 * inner, width)
        back = pallas_tpu_backward.multiply_transposed(target, both, flat, *used, tile=tile)
        sums = functools.partial(pallas_tpu_backward.sum_products, count=experts, tile=tile)
        return back, sums(target, both, rows, *used), sums(target, rows, hidden, *used)

    compiled = compile_for(
        topology,
        gradients,
        spec(tiles * tile, width),
        spec(tiles * tile, 1, dtype=jnp.float32),
        spec(experts, 2, inner, width),
        spec(experts, width, inner),
        integers(tiles),
        integers(),
    )
    assert compiled.as_text().count("tpu_custom_call") >= 4


# name: tokens, rows and columns of the weight
LINEAR = {
    "Flash decodes, queries up": (64, 32768, 1024),
    "Pro prefills, queries up": (2048, 65536, 1536),
    "Pro prefills, output up": (2048, 7168, 16384),
}


@on_chips(LINEAR)
def test_linear(topology, shape):
    tokens, out, width = shape
    weight = weight_of(out, width, kind="fp8")
    compiled = compile_for(
        topology, scaled_matmul.matmul, spec(1, tokens, width), weight, quantize_activations=True
    )
    assert "tpu_custom_call" in compiled.as_text()


EXPANDED = {
    "Flash, experts of a sixteenth": ((16, 2, 2048, 4096), "fp4"),
    "Pro, experts of a 32nd": ((12, 7168, 3072), "fp4"),
    "Flash, queries up": ((32768, 1024), "fp8"),
    "Pro, output up": ((7168, 16384), "fp8"),
}


@on_chips(EXPANDED)
def test_expansion(topology, shape):
    size, kind = shape
    weight = weight_of(*size, kind=kind)
    compiled = compile_for(topology, scaled_matmul.expand, weight, dtype=jnp.bfloat16)
    assert "tpu_custom_call" in compiled.as_text()


# name: shape, rotated channels
ROTATED = {
    "Flash decodes": ((16, 1, 64, 512), 64),
    "Pro prefills": ((1, 2048, 128, 512), 64),
    "index queries": ((1, 2048, 64, 128), 64),
    "entries": ((1, 512, 512), 64),
    "a token": ((1, 1, 512), 64),
}


@on_chips(ROTATED)
def test_rotation(topology, shape):
    size, rotated = shape
    angles = [spec(*size[:2], rotated, dtype=jnp.float32)] * 2
    compiled = compile_for(topology, rotation.rotate, spec(*size), *angles)
    assert "tpu_custom_call" in compiled.as_text()


@on_chips({"Flash decodes": (64, 1, 4096), "Pro prefills": (1, 2048, 7168)})
def test_hyper_connections(topology, shape):
    batch, tokens, width = shape
    n, float32 = 4, functools.partial(spec, dtype=jnp.float32)
    compiled = compile_for(
        topology,
        hyper_connections.expand_mix,
        spec(batch, tokens, width),
        spec(batch, tokens, n, width),
        Mix(float32(batch, tokens, n), float32(batch, tokens, n, n)),
        float32(24, n * width),
        float32(24),
        float32(3),
        norm_eps=1e-6,
        eps=1e-6,
        iterations=20,
    )
    assert "tpu_custom_call" in compiled.as_text()
