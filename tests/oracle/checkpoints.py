"""Tiny random checkpoints with the released tensor names, shapes and number formats.

`random_checkpoint` gives the tensors, `write_checkpoint` the folder that a loader reads. Each
tensor depends only on (seed, its name, its shape), so a golden file stores a seed, not weights.

Source: specification sections A.2 (config keys), D.1, D.2 and D.3.
"""

import json
import math
import pathlib
import zlib

import numpy as np
import safetensors.numpy

from . import quantizers as q

# Released values that the tiny configurations keep.
_COMMON = dict(
    architectures=["DeepseekV4ForCausalLM"],
    model_type="deepseek_v4",
    attention_bias=False,
    attention_dropout=0.0,
    bos_token_id=0,
    eos_token_id=1,
    hc_eps=1e-6,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hidden_act="silu",
    initializer_range=0.02,
    max_position_embeddings=1048576,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_key_value_heads=1,
    num_nextn_predict_layers=1,
    rms_norm_eps=1e-6,
    rope_scaling=dict(
        type="yarn",
        factor=16,
        beta_fast=32,
        beta_slow=1,
        original_max_position_embeddings=65536,
    ),
    rope_theta=10000,
    compress_rope_theta=160000,
    scoring_func="sqrtsoftplus",
    sliding_window=128,
    tie_word_embeddings=False,
    topk_method="noaux_tc",
    torch_dtype="bfloat16",
    transformers_version="4.57.1",
    use_cache=True,
)

_QUANTIZATION = dict(
    activation_scheme="dynamic",
    fmt="e4m3",
    quant_method="fp8",
    scale_fmt="ue8m0",
    weight_block_size=[128, 128],
)


def tiny_config(compress_ratios, **changes):
    """Returns a config.json dictionary: `compress_ratios` without the MTP entry, plus changes."""
    config = dict(
        _COMMON,
        compress_ratios=[*compress_ratios, 0],
        num_hidden_layers=len(compress_ratios),
        hidden_size=96,
        num_attention_heads=6,
        head_dim=48,
        qk_rope_head_dim=16,
        q_lora_rank=40,
        o_groups=3,
        o_lora_rank=24,
        n_routed_experts=10,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        num_hash_layers=3,
        routed_scaling_factor=1.5,
        # Far below the released 10, so that the clamps are active on small random weights.
        swiglu_limit=0.9,
        index_n_heads=32,
        index_head_dim=32,
        index_topk=24,
        vocab_size=211,
    )
    unknown = set(changes) - set(config)
    if unknown:
        raise ValueError(f"tiny_config has no keys {sorted(unknown)}")
    return dict(config, **changes)


# Flash's beginning: two window layers, then CSA and HCA in turn.
FLASH_TINY = tiny_config([0, 0, 4, 128, 4, 128, 4])
# Pro's beginning: two HCA layers; sizes that divide by nothing convenient.
PRO_TINY = tiny_config(
    [128, 128, 4, 128, 4],
    hidden_size=136,
    q_lora_rank=56,
    o_lora_rank=20,
    moe_intermediate_size=72,
    n_routed_experts=14,
    num_experts_per_tok=4,
    routed_scaling_factor=2.5,
    swiglu_limit=0.7,
    vocab_size=157,
)
# Every contracted size is a multiple of 128, as in the released models.
RELEASED_TINY = tiny_config(
    [0, 0, 4, 128, 4],
    hidden_size=256,
    num_attention_heads=4,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    moe_intermediate_size=128,
    index_n_heads=16,
    index_head_dim=128,
)
# For long sequences: as little arithmetic as possible.
LONG_TINY = tiny_config(
    [0, 4, 128, 4],
    hidden_size=64,
    num_attention_heads=4,
    head_dim=32,
    o_groups=2,
    o_lora_rank=16,
    q_lora_rank=24,
    moe_intermediate_size=32,
    n_routed_experts=6,
    num_experts_per_tok=2,
    num_hash_layers=1,
    index_n_heads=16,
    vocab_size=97,
)


def tensor_table(config):
    """Returns {official name: (logical shape, format)} of a config.json dictionary.

    Formats: "fp8" and "expert" (quantised matrices, [out, in]), "bf16", "f32", "table" (int64).
    Names of quantised matrices end in `.weight`; their `.scale` is implied.
    """
    c = config
    d, heads, width = c["hidden_size"], c["num_attention_heads"], c["head_dim"]
    streams, vocab = c["hc_mult"], c["vocab_size"]
    table = {}

    def add(name, shape, kind):
        table[name] = (tuple(shape), kind)

    def compressor(prefix, ratio, size):
        channels = 2 * size if ratio == 4 else size
        add(prefix + "ape", (ratio, channels), "f32")
        add(prefix + "wkv.weight", (channels, d), "bf16")
        add(prefix + "wgate.weight", (channels, d), "bf16")
        add(prefix + "norm.weight", (size,), "bf16")

    def collapse(prefix):
        add(prefix + "hc_head_fn", (streams, streams * d), "f32")
        add(prefix + "hc_head_base", (streams,), "f32")
        add(prefix + "hc_head_scale", (1,), "f32")

    def expert(prefix, kind):
        f = c["moe_intermediate_size"]
        add(prefix + "w1.weight", (f, d), kind)
        add(prefix + "w2.weight", (d, f), kind)
        add(prefix + "w3.weight", (f, d), kind)

    def layer(prefix, ratio, hashed):
        for site in ("attn", "ffn"):
            rows = (2 + streams) * streams
            add(f"{prefix}{site}_norm.weight", (d,), "bf16")
            add(f"{prefix}hc_{site}_fn", (rows, streams * d), "f32")
            add(f"{prefix}hc_{site}_base", (rows,), "f32")
            add(f"{prefix}hc_{site}_scale", (3,), "f32")
        attn, rank, low = prefix + "attn.", c["q_lora_rank"], c["o_groups"] * c["o_lora_rank"]
        add(attn + "attn_sink", (heads,), "f32")
        add(attn + "wq_a.weight", (rank, d), "fp8")
        add(attn + "q_norm.weight", (rank,), "bf16")
        add(attn + "wq_b.weight", (heads * width, rank), "fp8")
        add(attn + "wkv.weight", (width, d), "fp8")
        add(attn + "kv_norm.weight", (width,), "bf16")
        add(attn + "wo_a.weight", (low, heads * width // c["o_groups"]), "fp8")
        add(attn + "wo_b.weight", (d, low), "fp8")
        if ratio:
            compressor(attn + "compressor.", ratio, width)
        if ratio == 4:
            index_heads, index_width = c["index_n_heads"], c["index_head_dim"]
            add(attn + "indexer.wq_b.weight", (index_heads * index_width, rank), "fp8")
            add(attn + "indexer.weights_proj.weight", (index_heads, d), "bf16")
            compressor(attn + "indexer.compressor.", 4, index_width)
        ffn, experts = prefix + "ffn.", c["n_routed_experts"]
        add(ffn + "gate.weight", (experts, d), "bf16")
        if hashed:
            add(ffn + "gate.tid2eid", (vocab, c["num_experts_per_tok"]), "table")
        else:
            add(ffn + "gate.bias", (experts,), "f32")
        for e in range(experts):
            expert(f"{ffn}experts.{e}.", "expert")
        expert(ffn + "shared_experts.", "fp8")

    add("embed.weight", (vocab, d), "bf16")
    for i in range(c["num_hidden_layers"]):
        layer(f"layers.{i}.", c["compress_ratios"][i], i < c["num_hash_layers"])
    add("norm.weight", (d,), "bf16")
    add("head.weight", (vocab, d), "bf16")
    collapse("")
    for i in range(c["num_nextn_predict_layers"]):
        prefix = f"mtp.{i}."
        layer(prefix, c["compress_ratios"][c["num_hidden_layers"] + i], False)
        add(prefix + "e_proj.weight", (d, d), "fp8")
        add(prefix + "h_proj.weight", (d, d), "fp8")
        for norm in ("enorm", "hnorm", "norm"):
            add(f"{prefix}{norm}.weight", (d,), "bf16")
        collapse(prefix)
    return table


def _random_values(name, shape, kind, seed, experts):
    # RandomState's streams are frozen by NumPy's policy, unlike those of Generator.
    random = np.random.RandomState([seed, zlib.crc32(name.encode())])
    if kind == "table":
        return np.stack([random.permutation(experts)[: shape[1]] for _ in range(shape[0])])
    z = random.standard_normal(shape)
    if "norm" in name:
        z = 1 + 0.2 * z
    elif name.endswith("_scale"):
        z = 0.7 + 0.1 * z
    elif name.endswith(("_base", "attn_sink", ".ape", "gate.bias")):
        z = 0.8 * z
    elif name == "head.weight":
        # The final norm has unit size, so logits have a standard deviation near 1.
        z = z / math.sqrt(shape[1])
    else:
        z = z * (1.5 / math.sqrt(shape[1]))
    return z.astype(np.float32)


def random_checkpoint(config, seed, quantized=True, base=False):
    """Returns {official tensor name: array} of a tiny checkpoint, every parameter random.

    Args:
      config: config.json keys, e.g. `FLASH_TINY`.
      quantized: True stores linears as FP8 and experts as packed FP4 with E8M0 `.scale` tensors,
        as released; False stores the same matrices as BF16 (no `.scale`).
      base: with `quantized`, the layout of the Base checkpoints: experts FP8, scales F32.
    """
    tensors = {}
    for name, (shape, kind) in tensor_table(config).items():
        values = _random_values(name, shape, kind, seed, config["n_routed_experts"])
        if kind == "table":
            tensors[name] = values.astype(np.int64)
        elif kind == "f32":
            tensors[name] = values
        elif kind == "bf16" or not quantized:
            tensors[name] = values.astype(q.BF16)
        else:
            fp4 = kind == "expert" and not base
            stored, scales = (q.quantize_fp4_weight if fp4 else q.quantize_fp8_weight)(values)
            tensors[name] = stored
            tensors[name.removesuffix("weight") + "scale"] = (
                scales if base else q.encode_scales(scales)
            )
    return tensors


def dequantize(tensors):
    """Returns {official name: float32 array} without `.scale` tensors; int64 tables stay."""
    plain = {}
    for name, values in tensors.items():
        if name.endswith(".scale"):
            continue
        scales = tensors.get(name.removesuffix("weight") + "scale")
        if values.dtype == np.int8:
            plain[name] = q.dequantize_fp4_weight(values, scales)
        elif values.dtype == np.dtype(q.E4M3):
            plain[name] = q.dequantize_fp8_weight(values, scales)
        elif values.dtype == np.int64:
            plain[name] = values
        else:
            plain[name] = values.astype(np.float32)
    return plain


def checkpoint_config(tensors, config):
    """Returns config.json for these tensors: with `quantization_config` where scales exist."""
    if not any(name.endswith(".scale") for name in tensors):
        return dict(config)
    fp4 = any(array.dtype == np.int8 for array in tensors.values())
    return dict(
        config, quantization_config=dict(_QUANTIZATION), expert_dtype="fp4" if fp4 else "fp8"
    )


def write_checkpoint(folder, tensors, config, shards=3):
    """Writes config.json, the safetensors shards and their index into `folder`.

    Tensors are cut into shards in file order, wherever the count says, so a weight and its scale
    may land in different files, as a loader has to expect.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(checkpoint_config(tensors, config), indent=2))
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        low, high = (len(names) * i // shards for i in (shard, shard + 1))
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: np.ascontiguousarray(tensors[name]) for name in names[low:high]}
        safetensors.numpy.save_file(part, str(folder / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(array.nbytes for array in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "BF16": q.BF16,
    "F8_E4M3": q.E4M3,
    "F8_E8M0": q.E8M0,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}


def read_safetensors(path):
    """Returns {name: array} of one file, parsed by hand (8-byte header length, JSON, raw bytes)."""
    data = pathlib.Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        low, high = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + low : 8 + length + high], DTYPES[entry["dtype"]])
        tensors[name] = raw.reshape(entry["shape"])
    return tensors


def read_checkpoint(folder):
    """Returns ({name: array}, config) of a checkpoint folder."""
    folder = pathlib.Path(folder)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(read_safetensors(file))
    return tensors, json.loads((folder / "config.json").read_text())
