"""Released and bfloat16 numerics against a NumPy transcription of the published roundings.

Single modules get identical inputs and must agree nearly bit for bit; over several layers a value
that rounds to the neighbouring code changes everything after it a little, so the whole model is
compared statistically.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from oracle import checkpoints, quantizers
from oracle import released_numpy as transcription

from v4jax.model.passes import read_drafts, read_logits
from v4jax.model.weights import variables
from v4jax.quant import ScaledArray

from .test_golden_logits import extend_in_chunks
from .test_pieces import block, layer_call, read_table

CONFIG = checkpoints.RELEASED_TINY
TOKENS = 200  # 50 CSA entries, of which 24 are selected; one HCA entry
NUMERICS = {"released": transcription.RELEASED, "bfloat16": transcription.BFLOAT16}


class Agreement(NamedTuple):
    """Smallest share of bit-equal values, and the largest rms difference relative to the rms."""

    equal: float
    difference: float


# Sums of float32 products in another order move a value across a rounding boundary now and then;
# what follows a rounding inherits it. Measured shares in brackets: released, bfloat16.
PIECES = {
    "linear": Agreement(0.999, 1e-4),  # 1, 1
    "csa_entries": Agreement(0.995, 1e-3),  # 0.9998, 0.9998
    "hca_entries": Agreement(0.995, 1e-3),  # 1, 1
    "index_keys": Agreement(0.995, 1e-2),  # 1, 1
    "chosen": Agreement(0.99, 1e-2),  # 1, 1
    "window_attention": Agreement(0.90, 2e-3),  # 0.985, 0.966
    "csa_attention": Agreement(0.80, 2e-3),  # 0.976, 0.892
    "hca_attention": Agreement(0.80, 2e-3),  # 0.988, 0.890
    "hash_moe": Agreement(0.99, 1e-3),  # 1, 1
    "moe": Agreement(0.99, 1e-3),  # 1, 0.9998
    # A layer in its four steps, each from what we computed before it: what a step gets is the same
    # on both sides, so a rounding left out between two of them shows. (Shares of jax 0.12.)
    "layer_attention_input": Agreement(0.999, 1e-4),  # 0.9997, 0.9997
    "layer_attention": Agreement(0.95, 2e-3),  # 0.987, 0.995
    "layer_experts_input": Agreement(0.999, 1e-4),  # 1, 0.9998
    "layer": Agreement(0.99, 1e-3),  # 0.9998, 0.997
    # Float32 after one bfloat16 norm: equal up to the order of sums.
    "logits": Agreement(0.0, 1e-4),
    "drafts": Agreement(0.0, 3e-2),  # rms 0.003, 0.004
}
# Whole model, logits of standard deviation 1: a wrong formula differs by about 1 (measured: rms
# 0.08, 93 % of the largest equal; the roundings themselves move logits by 0.16).
WHOLE_RMS = 0.15
WHOLE_ARGMAX = 0.85


class Transcription(transcription.ReleasedModel):
    """Rounds softmax weights against the maximum of their part: the window, or the entries.

    The transcription leaves open against which maximum (it takes that of all keys); the published
    kernel rounds against the running maximum of the blocks it has read, and we read two parts.
    """

    def attend(self, query, key, valid, sink):
        logits = query @ np.swapaxes(key, 1, 2) * self.numerics.compute(query.shape[-1] ** -0.5)
        window = self.config["sliding_window"]
        parts = []
        for part in (slice(0, window), slice(window, key.shape[1])):
            seen = valid[:, None, part]
            z = np.where(seen, logits[..., part], -1e30)
            highest = z.max(-1, keepdims=True, initial=-1e30)
            p = np.where(seen, np.exp(z - highest), 0)
            parts.append((highest, p.sum(-1, keepdims=True), self.round(p) @ key[:, part]))
        highest = np.maximum(np.maximum(parts[0][0], parts[1][0]), sink)
        total, output = np.exp(sink - highest), 0
        for part_highest, mass, weighted in parts:
            total = total + mass * np.exp(part_highest - highest)
            output = output + weighted * np.exp(part_highest - highest)
        return self.round(output / total)


@pytest.fixture(scope="module")
def tensors():
    return checkpoints.random_checkpoint(CONFIG, 3)


@pytest.fixture(scope="module", params=NUMERICS)
def both(request, tensors):
    """(our model, the transcription) with the same numerics and the same stored weights."""
    ours = small_models.load_tensors(tensors, CONFIG, request.param)
    return ours, Transcription(tensors, CONFIG, NUMERICS[request.param])


@pytest.fixture(scope="module")
def inputs():
    """Inputs that are bfloat16 values, as float32 NumPy arrays."""
    random = np.random.RandomState(5)

    def draw(*shape):
        return quantizers.to_bf16(random.standard_normal((TOKENS, *shape)))

    return {
        "x": draw(CONFIG["hidden_size"]),
        "low_rank": draw(CONFIG["q_lora_rank"]),
        "streams": draw(CONFIG["hc_mult"], CONFIG["hidden_size"]),
        "ids": random.randint(0, CONFIG["vocab_size"], TOKENS),
    }


@jax.jit
def our_pieces(model, x, low_rank, streams, ids):
    """Returns the outputs of all pieces in one compilation."""
    outputs = {}
    for kind, number in (("window", 1), ("csa", 2), ("hca", 3)):
        module = block(model, number)
        context, memory = layer_call(model, number, TOKENS)
        attention = module.attention
        outputs[f"{kind}_attention"] = attention(x, context, memory)[0]
        if kind != "window":
            outputs[f"{kind}_entries"] = read_table(attention.compressor(x, context, memory)[0])
        if kind == "csa":
            chosen = attention.indexer(x, low_rank, context, memory)[0]
            outputs["chosen"] = jnp.sort(chosen, -1)
            keys, _ = attention.indexer.compressor(x, context, memory)
            outputs["index_keys"] = read_table(keys)
    first = block(model, 0)
    context, memory = layer_call(model, 0, TOKENS)
    outputs["linear"] = first.attention._linear(low_rank, first.attention.query_up, context)
    context = dataclasses.replace(context, tokens=ids)
    outputs["hash_moe"] = first.moe(x, context)
    outputs["moe"] = block(model, 3).moe(x, context)
    outputs |= our_layer(first, streams, context, memory)
    outputs["logits"] = read_logits(model, streams)
    outputs["drafts"] = read_drafts(model, streams, ids)
    return outputs


def our_layer(layer, streams, context, memory):
    """Returns the steps of `Block.__call__`."""
    steps = {}
    x, mix = layer.attention_hyper(streams, context.target)
    steps["layer_attention_input"] = x
    output, _ = layer.attention(layer.attention_norm(x), context, memory)
    streams = layer.attention_hyper.expand(output, streams, mix)
    steps["layer_attention"] = streams
    x, mix = layer.moe_hyper(streams, context.target)
    steps["layer_experts_input"] = x
    output = layer.moe(layer.moe_norm(x), context)
    steps["layer"] = layer.moe_hyper.expand(output, streams, mix)
    return steps


def transcribed_layer(model, streams, ids, ours):
    """Returns the steps of layer 0, each from our results of the steps before.

    Not from its own: where a sum lies between two bfloat16 values, float32 in another order takes
    the other one, and one such value moves the keys of its token and so all that later tokens
    attend to. With XLA of jax 0.12, 12 of the 51,200 inputs of attention are not those of float64
    arithmetic, each a sum within 3e-7 of the middle; the layer as a whole then agrees in 0.42 of
    its values, step by step in what stands at `PIECES`.
    """
    steps = {}

    def site(streams, name, sublayer):
        def run(x):
            steps[f"layer_{name}_input"] = x
            return sublayer(ours[f"layer_{name}_input"])

        prefix = {"attention": "attn", "experts": "ffn"}[name]
        return model.site(streams, f"layers.0.hc_{prefix}_", run)

    def attention(x):
        x = model.rms_norm(x, "layers.0.attn_norm.weight")
        return model.attention(x, "layers.0.attn.", 0)

    def experts(x):
        return model.moe(model.rms_norm(x, "layers.0.ffn_norm.weight"), "layers.0.ffn.", ids)

    steps["layer_attention"] = site(streams, "attention", attention)
    steps["layer"] = site(ours["layer_attention"], "experts", experts)
    return steps


def transcribed_pieces(model, x, low_rank, streams, ids):
    """Returns what `our_pieces` returns, from the transcription."""
    outputs, rope = {}, transcription.rope_frequencies(CONFIG, True)
    for kind, number, ratio in (("window", 1, 0), ("csa", 2, 4), ("hca", 3, 128)):
        prefix, width = f"layers.{number}.attn.", CONFIG["head_dim"]
        outputs[f"{kind}_attention"] = model.attention(x, prefix, ratio)
        if ratio:
            pooled = model.compress(x, prefix + "compressor.", ratio, width, rope)
            outputs[f"{kind}_entries"] = model.simulate_entry(pooled)
    heads, width = CONFIG["index_n_heads"], CONFIG["index_head_dim"]
    prefix, positions = "layers.2.attn.indexer.", np.arange(TOKENS)
    keys = model.simulate_index(model.compress(x, prefix + "compressor.", 4, width, rope))
    query = model.linear(low_rank, prefix + "wq_b.weight").reshape(TOKENS, heads, width)
    query = model.simulate_index(model.rope(query, positions, rope))
    weight = model.linear(x, prefix + "weights_proj.weight")
    weight = model.round(weight * (width**-0.5 * heads**-0.5))
    chosen, _ = model.select(model.index_scores(query, keys, weight), (positions + 1) // 4)
    outputs["index_keys"], outputs["chosen"] = keys, np.sort(chosen, -1)
    outputs["linear"] = model.linear(low_rank, "layers.0.attn.wq_b.weight")
    outputs["hash_moe"] = model.moe(x, "layers.0.ffn.", ids)
    outputs["moe"] = model.moe(x, "layers.3.ffn.", ids)
    outputs["logits"] = model.head(streams, "")
    outputs["drafts"] = model.mtp_logits(streams[:-1], ids[1:])
    return outputs


def test_pieces(both, inputs):
    ours, theirs = both

    def as_stored(value):
        dtype = jnp.bfloat16 if value.dtype == np.float32 else jnp.int32
        return jnp.asarray(value[None], dtype)

    got = our_pieces(ours, **{name: as_stored(value) for name, value in inputs.items()})
    got = {name: np.asarray(value[0].astype(jnp.float32)) for name, value in got.items()}
    expected = transcribed_pieces(theirs, **inputs)
    expected |= transcribed_layer(theirs, inputs["streams"], inputs["ids"], got)
    assert got.keys() == expected.keys() == PIECES.keys()
    for name, agreement in PIECES.items():
        value, wanted = got[name], expected[name]
        assert value.shape == wanted.shape, name
        equal = np.mean(value == wanted)
        difference = np.sqrt(np.mean((value - wanted) ** 2) / np.mean(wanted**2.0))
        assert equal >= agreement.equal, f"{name}: only {equal:.4f} of the values are bit-equal"
        assert difference <= agreement.difference, f"{name}: rms {difference:.2g}"


def test_whole_model(tensors):
    """In chunks through the FP8 and FP4 cache, against the transcription without a cache."""
    model = small_models.load_tensors(tensors, CONFIG, "released")
    ids = np.random.RandomState(0).randint(0, CONFIG["vocab_size"], 300)
    logits_tv = extend_in_chunks(model, ids, (128, 1, 100, 71), 128)
    expected = Transcription(tensors, CONFIG, NUMERICS["released"]).logits(ids)
    assert logits_tv.dtype == np.float32
    assert 0.8 < expected.std() < 1.2
    assert np.sqrt(np.mean((logits_tv - expected) ** 2)) < WHOLE_RMS
    assert np.mean(logits_tv.argmax(1) == expected.argmax(1)) > WHOLE_ARGMAX


def test_weights_stay_as_stored(both):
    """FP4 experts stay packed and FP8 stays FP8 in memory, with one scale byte per block."""
    formats = {
        "moe.experts.": ("uint8", (1, 32)),
        "moe.shared.": ("float8_e4m3fn", (128, 128)),
        "attention.query_up": ("float8_e4m3fn", (128, 128)),
        "attention.output_down": ("float8_e4m3fn", (128, 128)),
        "indexer.query_up": ("float8_e4m3fn", (128, 128)),
        "embed_projection": ("float8_e4m3fn", (128, 128)),
    }
    found = dict.fromkeys(formats, 0)
    for path, variable in variables(both[0]).items():
        value = variable.get_value()
        for part, (dtype, tile) in formats.items():
            if part in path:
                found[part] += 1
                assert isinstance(value, ScaledArray), path
                assert (value.values.dtype.name, value.block) == (dtype, tile), path
                assert value.scales.dtype == jnp.uint8, path
    assert all(found.values()), found


def test_cache_stays_as_stored(both):
    model, theirs = both
    stored = model.init_cache(1, 256).stored
    dtypes = {n: {k: x.dtype.name for k, x in kept.items()} for n, kept in stored.items()}
    if theirs.numerics is transcription.BFLOAT16:
        names = ("window", "csa", "hca", "index", "draft")
        assert dtypes == {name: {"values": "bfloat16"} for name in names}
        return
    entry = {"values": "float8_e4m3fn", "rope": "bfloat16", "scales": "uint8"}
    index = {"packed": "uint8", "scales": "uint8"}
    entries = dict.fromkeys(("window", "csa", "hca", "draft"), entry)  # the last: the MTP block's
    assert dtypes == {**entries, "index": index}
