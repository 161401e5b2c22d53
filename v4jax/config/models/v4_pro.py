"""DeepSeek-V4-Pro: 1.6 T parameters, 49 B active per token, one million tokens.

    v4jax inspect v4_pro

Source: `config.json` of deepseek-ai/DeepSeek-V4-Pro; technical report arXiv 2606.19348. Every
number that Flash and Pro share is a default of `v4jax.config.model.ModelConfig`.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.hidden_size = 7168
    config.num_hidden_layers = 61
    config.num_attention_heads = 128
    config.q_lora_rank = 1536
    config.o_groups = 16
    config.n_routed_experts = 384
    config.moe_intermediate_size = 3072
    config.index_topk = 1024
    config.routed_scaling_factor = 2.5
    # Layers 0 and 1 are HCA; then CSA and HCA in turn; last, the MTP block (a window layer).
    config.compress_ratios = (128, 128) + (4, 128) * 29 + (4,) + (0,)
    config.num_hash_layers = 3
    return config
