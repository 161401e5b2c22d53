"""Transformers' DeepSeek-V4 on the weights of a tiny checkpoint: forward, decode, chunked prefill.

Needs the `[oracle]` extra. Weights go in by our own name table (specification section D.5), loaded
strictly, so transformers' own conversion of checkpoint names is not part of what is trusted here.
"""

import re

import numpy as np
import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache

# (pattern, replacement), tried in order; the first full match names the tensor.
_NAMES = [
    (r"embed\.weight", r"model.embed_tokens.weight"),
    (r"head\.weight", r"lm_head.weight"),
    (r"norm\.weight", r"model.norm.weight"),
    (r"hc_head_(fn|base|scale)", r"model.hc_head.hc_\1"),
    (r"layers\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"layers\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layers\.(\d+)\.hc_(attn|ffn)_(fn|base|scale)", r"model.layers.\1.\2_hc.\3"),
    (r"layers\.(\d+)\.attn\.attn_sink", r"model.layers.\1.self_attn.sinks"),
    (r"layers\.(\d+)\.attn\.wq_a\.weight", r"model.layers.\1.self_attn.q_a_proj.weight"),
    (r"layers\.(\d+)\.attn\.q_norm\.weight", r"model.layers.\1.self_attn.q_a_norm.weight"),
    (r"layers\.(\d+)\.attn\.wq_b\.weight", r"model.layers.\1.self_attn.q_b_proj.weight"),
    (r"layers\.(\d+)\.attn\.wkv\.weight", r"model.layers.\1.self_attn.kv_proj.weight"),
    (r"layers\.(\d+)\.attn\.kv_norm\.weight", r"model.layers.\1.self_attn.kv_norm.weight"),
    (r"layers\.(\d+)\.attn\.wo_(a|b)\.weight", r"model.layers.\1.self_attn.o_\2_proj.weight"),
    (r"layers\.(\d+)\.attn\.indexer\.wq_b\.weight", "{index}q_b_proj.weight"),
    (r"layers\.(\d+)\.attn\.indexer\.weights_proj\.weight", "{index}scorer.weights_proj.weight"),
    (r"layers\.(\d+)\.attn\.indexer\.compressor\.wkv\.weight", "{index}kv_proj.weight"),
    (r"layers\.(\d+)\.attn\.indexer\.compressor\.wgate\.weight", "{index}gate_proj.weight"),
    (r"layers\.(\d+)\.attn\.indexer\.compressor\.ape", "{index}position_bias"),
    (r"layers\.(\d+)\.attn\.indexer\.compressor\.norm\.weight", "{index}kv_norm.weight"),
    (r"layers\.(\d+)\.attn\.compressor\.wkv\.weight", "{compress}kv_proj.weight"),
    (r"layers\.(\d+)\.attn\.compressor\.wgate\.weight", "{compress}gate_proj.weight"),
    (r"layers\.(\d+)\.attn\.compressor\.ape", "{compress}position_bias"),
    (r"layers\.(\d+)\.attn\.compressor\.norm\.weight", "{compress}kv_norm.weight"),
    (r"layers\.(\d+)\.ffn\.gate\.weight", r"model.layers.\1.mlp.gate.weight"),
    (r"layers\.(\d+)\.ffn\.gate\.bias", r"model.layers.\1.mlp.gate.e_score_correction_bias"),
    (r"layers\.(\d+)\.ffn\.gate\.tid2eid", r"model.layers.\1.mlp.gate.tid2eid"),
    (r"layers\.(\d+)\.ffn\.shared_experts\.w1\.weight", "{shared}gate_proj.weight"),
    (r"layers\.(\d+)\.ffn\.shared_experts\.w2\.weight", "{shared}down_proj.weight"),
    (r"layers\.(\d+)\.ffn\.shared_experts\.w3\.weight", "{shared}up_proj.weight"),
]
_PREFIXES = dict(
    compress=r"model.layers.\1.self_attn.compressor.",
    index=r"model.layers.\1.self_attn.compressor.indexer.",
    shared=r"model.layers.\1.mlp.shared_experts.",
)
_EXPERT = re.compile(r"layers\.(\d+)\.ffn\.experts\.\d+\.w[123]\.weight")


def hf_name(name):
    """Returns transformers' parameter name of an official name that is not a routed expert."""
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement.format(**_PREFIXES), name)
    raise KeyError(f"no transformers name for {name}")


def saved_name(name):
    """Returns the name under which `save_pretrained` writes an official tensor by default.

    Transformers reverses its name conversion only in part: the `model.` prefix stays, the collapse
    keeps its module name, and the norm of the window entries loses its `kv_`.
    """
    name = re.sub(r"^embed\.", "embed_tokens.", name)
    name = re.sub(r"^hc_head_", "hc_head.hc_", name)
    name = re.sub(r"\.attn\.kv_norm\.", ".attn.norm.", name)
    return name if name.startswith("head.") else "model." + name


def state_dict(tensors, config):
    """Returns transformers' state dict (stacked experts) of {official name: array} without MTP."""
    state = {}
    for name, array in tensors.items():
        if not name.startswith("mtp.") and not _EXPERT.fullmatch(name):
            state[hf_name(name)] = _tensor(array)
    for layer in range(config["num_hidden_layers"]):
        prefix, experts = f"layers.{layer}.ffn.experts.", range(config["n_routed_experts"])
        w1, w2, w3 = (
            np.stack([tensors[f"{prefix}{e}.{w}.weight"] for e in experts])
            for w in ("w1", "w2", "w3")
        )
        target = f"model.layers.{layer}.mlp.experts."
        state[target + "gate_up_proj"] = _tensor(np.concatenate([w1, w3], 1))
        state[target + "down_proj"] = _tensor(w2)
    return state


def _tensor(array):
    array = np.asarray(array)
    return torch.tensor(array if array.dtype == np.int64 else array.astype(np.float32))


def hf_config(config):
    """Returns DeepseekV4Config of released-style keys, eager attention and plain experts."""
    keys = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype")}
    return DeepseekV4Config(
        **keys, attn_implementation="eager", experts_implementation="eager", dtype="float32"
    )


def build(tensors, config):
    """Returns the float32 model in evaluation mode holding exactly `tensors`.

    Args:
      tensors: {official name: float array}, dequantised (`checkpoints.dequantize`).
      config: released-style config.json keys.
    """
    with torch.device("cpu"):
        model = DeepseekV4ForCausalLM(hf_config(config)).float()
    model.load_state_dict(state_dict(tensors, config), strict=True)
    return model.eval()


@torch.no_grad()
def forward(model, ids):
    """Returns the logits [tokens, vocab] of one sequence in one call, without a cache."""
    return model(torch.tensor(np.asarray(ids)[None]), use_cache=False).logits[0].numpy()


@torch.no_grad()
def chunked(model, ids, chunks, keep=None):
    """Returns the logits of one sequence fed to the cache in chunks of the given lengths.

    A chunk of 1 is a decode step. `keep` are the positions whose logits are returned (all if None).
    """
    if sum(chunks) != len(ids):
        raise ValueError(f"chunks cover {sum(chunks)} tokens of {len(ids)}")
    cache, start, rows = DynamicCache(config=model.config), 0, []
    keep = np.arange(len(ids)) if keep is None else np.asarray(keep)
    for size in chunks:
        part = torch.tensor(np.asarray(ids)[None, start : start + size])
        out = model(part, past_key_values=cache, use_cache=True).logits[0].numpy()
        inside = keep[(keep >= start) & (keep < start + size)]
        rows.append(out[inside - start])
        start += size
    return np.concatenate(rows)
