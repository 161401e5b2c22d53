"""The forward pass as the published inference code rounds it, in NumPy; full sequence, no cache.

`ReleasedModel` reads a checkpoint dictionary with official tensor names as it is stored (FP8,
packed FP4, E8M0 scales, BF16, F32) and a config.json dictionary. `Numerics` switches the roundings
one group at a time, from the published system to plain float64 mathematics.

Bfloat16 values are held in float32 arrays, rounded at the places where the published code writes a
bfloat16 tensor. Products accumulate in float32. Comments marked "open" name the places where the
specification leaves the rounding to hardware or to the kernel's loop order, and what is done here.

Source: specification sections B.0 to B.15, C.1 (visibility), D.2 and D.3.
"""

import dataclasses
import math

import numpy as np

from .quantizers import (
    E4M3,
    act_dequant,
    act_quant,
    dequantize_fp4_weight,
    dequantize_fp8_weight,
    expand_blocks,
    fp4_act_quant,
    hadamard,
    to_bf16,
)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Which roundings happen.

    Attributes:
      compute: dtype of the arithmetic.
      bf16_activations: round every tensor that the published code holds in bfloat16.
      quantize_linears: FP8 activations in front of FP8 and FP4 weights.
      simulate_entries: FP8 on the non-rope channels of key-value entries, Hadamard rotation and
        FP4 on indexer queries and keys.
      angles: dtype of the rope angle `position · frequency`. The published tables are float32,
        whose rounding is visible from some thousand positions on.
    """

    compute: type = np.float32
    bf16_activations: bool = True
    quantize_linears: bool = True
    simulate_entries: bool = True
    angles: type = np.float32


RELEASED = Numerics()
BFLOAT16 = Numerics(quantize_linears=False, simulate_entries=False)
FLOAT32 = Numerics(np.float32, False, False, False)
FLOAT64 = Numerics(np.float64, False, False, False, np.float64)
# The trained quantisers of key-value entries and index keys alone, on exact arithmetic.
QAT = Numerics(np.float64, False, False, True, np.float64)


def rope_frequencies(config, compressed, dtype=np.float32):
    """Returns the frequencies [rope/2] of a layer: YaRN on layers with a compressor, plain else.

    In float32 every step rounds where the published code rounds: its power, its reciprocal and
    the interpolation are three float32 operations.
    """
    dims = config["qk_rope_head_dim"]
    base = config["compress_rope_theta" if compressed else "rope_theta"]
    exponents = np.arange(0, dims, 2).astype(dtype) / dtype(dims)
    # The power in float64 and then rounded: what a correctly rounded float32 power gives.
    f = dtype(1) / np.power(np.float64(base), exponents.astype(np.float64)).astype(dtype)
    if not compressed:
        return f
    yarn = config["rope_scaling"]
    length = yarn["original_max_position_embeddings"]

    def dimension(rotations):
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(yarn["beta_fast"])), 0)
    high = min(math.ceil(dimension(yarn["beta_slow"])), dims - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(dims // 2).astype(dtype) - dtype(low)) / dtype(high - low)
    keep = dtype(1) - np.clip(ramp, dtype(0), dtype(1))
    return f / dtype(yarn["factor"]) * (dtype(1) - keep) + f * keep


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


class ReleasedModel:
    """The released model on one sequence of tokens.

    Args:
      tensors: {official name: array}; a quantised matrix has its `.scale` beside it, or is a
        (values, scales) pair.
      config: config.json keys.
      numerics: the roundings, `RELEASED` by default.
      query_block: queries per step of attention; bounds memory, changes nothing else.
    """

    def __init__(self, tensors, config, numerics=RELEASED, query_block=128):
        self.tensors = {}
        for name, value in tensors.items():
            if isinstance(value, tuple):
                self.tensors[name], self.tensors[name.removesuffix("weight") + "scale"] = value
            else:
                self.tensors[name] = value
        self.config = config
        self.numerics = numerics
        self.query_block = query_block
        self._plain = {}
        # {prefix of an indexer or a router: [t]}: (k-th best − next best score) / largest |score|;
        # inf where nothing is left out. Filled by the last forward pass.
        self.margins = {}

    # ---- storage and rounding ----

    def array(self, name):
        """Returns a tensor dequantised, in the compute dtype."""
        if name not in self._plain:
            stored = self.tensors[name]
            if stored.dtype == np.int64:
                return stored
            scale = name.removesuffix("weight") + "scale"
            if stored.dtype == np.int8:
                stored = dequantize_fp4_weight(stored, self.tensors[scale])
            elif stored.dtype == np.dtype(E4M3):
                stored = dequantize_fp8_weight(stored, self.tensors[scale])
            self._plain[name] = stored.astype(self.numerics.compute)
        return self._plain[name]

    def round(self, x):
        """Rounds where the published code writes bfloat16."""
        x = to_bf16(x) if self.numerics.bf16_activations else x
        return np.asarray(x, self.numerics.compute)

    def linear(self, x, name):
        """x · Wᵀ. Quantised weights see FP8 activations; the result is bfloat16.

        Open: the kernels add blocks of K in a fixed order with an accumulator per block; here
        both sides are dequantised (exactly) and float32 matmul chooses the order.
        """
        quantized = self.tensors[name].dtype in (np.dtype(np.int8), np.dtype(E4M3))
        if self.numerics.quantize_linears and quantized:
            x = act_dequant(*act_quant(x, 128), 128).astype(self.numerics.compute)
        return self.round(x @ self.array(name).T)

    def rms_norm(self, x, name):
        """Weighted RMS norm in float32, one rounding at the end."""
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return self.round(self.array(name) * x)

    def rope(self, x, positions, frequencies, sign=1):
        """Rotates channel pairs (2i, 2i+1) of the trailing rope channels of x [t, ..., c]."""
        angle = positions.astype(frequencies.dtype)[:, None] * frequencies
        angle = angle.reshape((len(positions),) + (1,) * (x.ndim - 2) + (-1,)).astype(np.float64)
        cos = np.cos(angle).astype(self.numerics.compute)
        sin = np.sin(sign * angle).astype(self.numerics.compute)
        dims = self.config["qk_rope_head_dim"]
        nope, a, b = x[..., :-dims], x[..., -dims::2], x[..., -dims + 1 :: 2]
        turned = np.stack([a * cos - b * sin, a * sin + b * cos], -1)
        return np.concatenate([nope, self.round(turned.reshape(*x.shape[:-1], dims))], -1)

    def simulate_entry(self, x):
        """FP8 with blocks of 64 on the non-rope channels; the rope channels stay bfloat16."""
        if not self.numerics.simulate_entries:
            return x
        dims = self.config["qk_rope_head_dim"]
        nope = act_dequant(*act_quant(x[..., :-dims], 64), 64)
        return np.concatenate([self.round(nope), x[..., -dims:]], -1)

    def simulate_index(self, x):
        """Hadamard rotation (float32 sums, bfloat16 result), then FP4 with blocks of 32."""
        if not self.numerics.simulate_entries:
            return x
        values, scales = fp4_act_quant(self.round(hadamard(x)), 32)
        return self.round(values * expand_blocks(scales, 32, x.shape[-1]))

    # ---- attention ----

    def compress(self, x, prefix, ratio, width, frequencies):
        """Pools x [t, d] into entries [t // ratio, width], rotated; all pooling in float32."""
        n = len(x) // ratio
        x = x[: n * ratio]
        value = (x @ self.array(prefix + "wkv.weight").T).reshape(n, ratio, -1)
        gate = (x @ self.array(prefix + "wgate.weight").T).reshape(n, ratio, -1)
        gate = gate + self.array(prefix + "ape")
        if ratio == 4:
            # The first half of the channels speaks to the next window, the second to its own.
            before = np.zeros((n, ratio, width), x.dtype)
            before[1:] = value[:-1, :, :width]
            value = np.concatenate([before, value[..., width:]], 1)
            before = np.full((n, ratio, width), -np.inf, x.dtype)
            before[1:] = gate[:-1, :, :width]
            gate = np.concatenate([before, gate[..., width:]], 1)
        pooled = self.round((softmax(gate, 1) * value).sum(1))
        entries = self.rms_norm(pooled, prefix + "norm.weight")
        return self.rope(entries, np.arange(n) * ratio, frequencies)

    def index_scores(self, query, key, weight):
        """Σ_h weight_h · ReLU(query_h · key): [t, heads, c], [n, c], [t, heads] → [t, n].

        Open: the published code forms these in bfloat16; float32 from the same bfloat16 inputs
        is allowed and used here.
        """
        dots = np.maximum(query.reshape(-1, query.shape[-1]) @ key.T, 0)
        return np.einsum("th,thn->tn", weight, dots.reshape(*query.shape[:2], -1))

    def select(self, scores, visible):
        """Returns (the best index_topk of the visible entries [t, k], −1 as filler; margins [t]).

        Open: ties go to the lower index.
        """
        k = min(self.config["index_topk"], scores.shape[1])
        hidden = np.arange(scores.shape[1]) >= visible[:, None]
        scores = np.where(hidden, -np.inf, scores)
        order = np.argsort(-scores, 1, kind="stable")
        chosen = order[:, :k]
        margins = np.full(len(scores), np.inf)
        full = visible > k
        if full.any():
            edge = np.take_along_axis(scores[full], order[full, k - 1 : k + 1], 1)
            largest = np.abs(np.where(hidden, 0, scores)[full]).max(1)
            margins[full] = (edge[:, 0] - edge[:, 1]) / largest
        return np.where(chosen < visible[:, None], chosen, -1), margins

    def attention(self, x, prefix, ratio):
        c = self.config
        t, heads, width = len(x), c["num_attention_heads"], c["head_dim"]
        positions = np.arange(t)
        frequencies = rope_frequencies(c, ratio > 0, self.numerics.angles)
        low_rank = self.rms_norm(self.linear(x, prefix + "wq_a.weight"), prefix + "q_norm.weight")
        query = self.linear(low_rank, prefix + "wq_b.weight").reshape(t, heads, width)
        # The per-head rescale works on bfloat16 tensors: square, mean and factor are each rounded.
        mean = self.round(self.round(query * query).mean(-1, keepdims=True))
        factor = self.round(1 / np.sqrt(self.round(mean + c["rms_norm_eps"])))
        query = self.rope(self.round(query * factor), positions, frequencies)
        entries = self.rms_norm(self.linear(x, prefix + "wkv.weight"), prefix + "kv_norm.weight")
        entries = self.simulate_entry(self.rope(entries, positions, frequencies))
        if ratio:
            pooled = self.compress(x, prefix + "compressor.", ratio, width, frequencies)
            keys = np.concatenate([entries, self.simulate_entry(pooled)])
        else:
            keys = entries
        if ratio == 4:
            index_heads, index_width = c["index_n_heads"], c["index_head_dim"]
            name = prefix + "indexer."
            index_query = self.linear(low_rank, name + "wq_b.weight")
            index_query = index_query.reshape(t, index_heads, index_width)
            index_query = self.simulate_index(self.rope(index_query, positions, frequencies))
            index_key = self.simulate_index(
                self.compress(x, name + "compressor.", 4, index_width, frequencies)
            )
            weight = self.linear(x, name + "weights_proj.weight")
            weight = self.round(weight * (index_width**-0.5 * index_heads**-0.5))
        output = np.empty_like(query)
        sink = self.array(prefix + "attn_sink")[:, None]
        margins = np.full(t, np.inf)
        for start in range(0, t, self.query_block):
            rows = slice(start, min(start + self.query_block, t))
            p = positions[rows, None]
            index = p - np.arange(c["sliding_window"])[::-1]
            index = np.where(index < 0, -1, index)
            if ratio:
                visible = (p[:, 0] + 1) // ratio
                most = visible.max()
                if ratio == 4 and most:
                    scores = self.index_scores(index_query[rows], index_key[:most], weight[rows])
                    compressed, margins[rows] = self.select(scores, visible)
                else:
                    compressed = np.arange(most) + np.zeros_like(p)
                    compressed = np.where(compressed < visible[:, None], compressed, -1)
                index = np.concatenate([index, np.where(compressed < 0, -1, compressed + t)], 1)
            output[rows] = self.attend(query[rows], keys[index], index >= 0, sink)
        if ratio == 4:
            self.margins[prefix + "indexer."] = margins
        output = self.rope(output, positions, frequencies, -1)
        # wo_a is a bfloat16 grouped product without activation quantisation, wo_b an FP8 linear.
        groups, rank = c["o_groups"], c["o_lora_rank"]
        down = self.array(prefix + "wo_a.weight").reshape(groups, rank, -1)
        grouped = output.reshape(t, groups, 1, -1) @ np.swapaxes(down, 1, 2)
        return self.linear(self.round(grouped).reshape(t, -1), prefix + "wo_b.weight")

    def attend(self, query, key, valid, sink):
        """Softmax attention with a sink: [t, h, c], [t, n, c], [t, n], [h, 1] → [t, h, c].

        Probabilities are rounded to bfloat16 for the product with the values, the denominator
        sums them unrounded. Open: the kernel rounds against a running maximum, block by block;
        here against the maximum of all keys.
        """
        logits = query @ np.swapaxes(key, 1, 2) * self.numerics.compute(query.shape[-1] ** -0.5)
        logits = np.where(valid[:, None], logits, -np.inf)
        highest = logits.max(-1, keepdims=True)
        p = np.exp(logits - highest)
        total = p.sum(-1, keepdims=True) + np.exp(sink - highest)
        return self.round((self.round(p) @ key) / total)

    # ---- mixture of experts ----

    def expert(self, x, prefix, weight=None):
        limit = self.config["swiglu_limit"]
        gate = np.minimum(self.linear(x, prefix + "w1.weight"), limit)
        up = np.clip(self.linear(x, prefix + "w3.weight"), -limit, limit)
        inner = gate * sigmoid(gate) * up
        if weight is not None:
            inner = weight * inner  # in float32, before the activation is rounded for w2
        return self.linear(self.round(inner), prefix + "w2.weight")

    def route(self, x, prefix, ids):
        """Returns (weights, experts), both [t, k]."""
        c = self.config
        scores = np.sqrt(softplus(x @ self.array(prefix + "gate.weight").T))
        if prefix + "gate.tid2eid" in self.tensors:
            chosen = self.tensors[prefix + "gate.tid2eid"][ids]
        else:
            biased = scores + self.array(prefix + "gate.bias")
            order, k = np.argsort(-biased, -1, kind="stable"), c["num_experts_per_tok"]
            edge = np.take_along_axis(biased, order[:, k - 1 : k + 1], 1)
            self.margins[prefix] = (edge[:, 0] - edge[:, 1]) / np.abs(biased).max(1)
            chosen = order[:, :k]
        weights = np.take_along_axis(scores, chosen, -1)
        weights = weights / weights.sum(-1, keepdims=True)
        return weights * self.numerics.compute(c["routed_scaling_factor"]), chosen

    def moe(self, x, prefix, ids):
        weights, chosen = self.route(x, prefix, ids)
        total = np.zeros_like(x)
        for e in range(self.config["n_routed_experts"]):
            token, slot = np.nonzero(chosen == e)
            if len(token):
                weight = weights[token, slot, None]
                total[token] += self.expert(x[token], f"{prefix}experts.{e}.", weight)
        return self.round(total + self.expert(x, prefix + "shared_experts."))

    # ---- streams ----

    def mixes(self, streams, function):
        flat = streams.reshape(len(streams), -1)
        mean = (flat * flat).mean(-1, keepdims=True)
        return (flat @ self.array(function).T) / np.sqrt(mean + self.config["rms_norm_eps"])

    def split_mixes(self, mixes, scale, base):
        """Returns (pre [t, n], post [t, n], mix [t, n, n]) with mix[source, destination]."""
        c = self.config
        n, eps = c["hc_mult"], c["hc_eps"]
        pre = sigmoid(mixes[:, :n] * scale[0] + base[:n]) + eps
        post = 2 * sigmoid(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        mix = softmax((mixes[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n), 2) + eps
        mix = mix / (mix.sum(1, keepdims=True) + eps)
        for _ in range(c["hc_sinkhorn_iters"] - 1):
            mix = mix / (mix.sum(2, keepdims=True) + eps)
            mix = mix / (mix.sum(1, keepdims=True) + eps)
        return pre, post, mix

    def site(self, streams, prefix, sublayer):
        mixes = self.mixes(streams, prefix + "fn")
        scale, base = self.array(prefix + "scale"), self.array(prefix + "base")
        pre, post, mix = self.split_mixes(mixes, scale, base)
        y = sublayer(self.round((pre[..., None] * streams).sum(1)))
        kept = np.swapaxes(mix, 1, 2) @ streams
        return self.round(post[..., None] * y[:, None] + kept)

    def block(self, streams, prefix, ratio, ids):
        def attention(x):
            return self.attention(
                self.rms_norm(x, prefix + "attn_norm.weight"), prefix + "attn.", ratio
            )

        def moe(x):
            return self.moe(self.rms_norm(x, prefix + "ffn_norm.weight"), prefix + "ffn.", ids)

        streams = self.site(streams, prefix + "hc_attn_", attention)
        return self.site(streams, prefix + "hc_ffn_", moe)

    def head(self, streams, prefix):
        """Collapses the streams and returns float32 logits; `prefix` is "" or "mtp.0."."""
        mixes = self.mixes(streams, prefix + "hc_head_fn")
        scale, base = self.array(prefix + "hc_head_scale"), self.array(prefix + "hc_head_base")
        pre = sigmoid(mixes * scale + base) + self.config["hc_eps"]
        h = self.round((pre[..., None] * streams).sum(1))
        return self.rms_norm(h, prefix + "norm.weight") @ self.array("head.weight").T

    # ---- model ----

    def residuals(self, ids, layers=None):
        """Returns the residual streams [t, n, d] after the first `layers` layers (all if None)."""
        ids = np.asarray(ids)
        c = self.config
        self.margins = {}
        streams = np.repeat(self.array("embed.weight")[ids][:, None], c["hc_mult"], 1)
        for i in range(c["num_hidden_layers"] if layers is None else layers):
            streams = self.block(streams, f"layers.{i}.", c["compress_ratios"][i], ids)
        return streams

    def logits(self, ids, positions=None):
        """Returns the logits [t, vocab], of the given positions or of all."""
        streams = self.residuals(ids)
        return self.head(streams if positions is None else streams[positions], "")

    def mtp_logits(self, streams, next_ids):
        """Returns draft logits: streams of position t with token t + 1 predict token t + 2."""
        next_ids, prefix = np.asarray(next_ids), "mtp.0."
        embedded = self.rms_norm(self.array("embed.weight")[next_ids], prefix + "enorm.weight")
        hidden = self.rms_norm(streams, prefix + "hnorm.weight")
        joined = self.linear(embedded, prefix + "e_proj.weight")[:, None] + self.linear(
            hidden, prefix + "h_proj.weight"
        )
        ratio = self.config["compress_ratios"][self.config["num_hidden_layers"]]
        return self.head(self.block(self.round(joined), prefix, ratio, next_ids), prefix)
