"""DeepSeek-V4-Flash: 284 B parameters, 13 B active per token, one million tokens.

    v4jax inspect v4_flash

Source: `config.json` of deepseek-ai/DeepSeek-V4-Flash; technical report arXiv 2606.19348. Every
number that Flash and Pro share is a default of `v4jax.config.model.ModelConfig`.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.hidden_size = 4096
    config.num_hidden_layers = 43
    config.num_attention_heads = 64
    config.q_lora_rank = 1024
    config.o_groups = 8
    config.n_routed_experts = 256
    config.moe_intermediate_size = 2048
    config.index_topk = 512
    config.routed_scaling_factor = 1.5
    # Layers 0 and 1 see their window only; then CSA and HCA in turn; last, the MTP block.
    config.compress_ratios = (0, 0) + (4, 128) * 20 + (4,) + (0,)
    config.num_hash_layers = 3
    return config
