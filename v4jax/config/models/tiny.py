"""Tiny: every mechanism of V4 in 0.7 M parameters, for tests.

Its stack has a prefix (window), a repeated period [CSA, HCA] and a suffix (CSA), and selects 8
entries, so that selection truncates from 36 tokens on.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.tokenizer = "byte"
    config.vocab_size = 320
    config.bos_token_id = 256
    config.eos_token_id = 257
    config.hidden_size = 64
    config.num_hidden_layers = 6
    config.num_attention_heads = 4
    config.head_dim = 32
    config.qk_rope_head_dim = 16
    config.q_lora_rank = 32
    config.o_groups = 2
    config.o_lora_rank = 16
    config.n_routed_experts = 8
    config.num_experts_per_tok = 2
    config.moe_intermediate_size = 32
    config.index_n_heads = 16
    config.index_head_dim = 32
    config.index_topk = 8
    config.routed_scaling_factor = 1.5
    config.compress_ratios = (0,) + (4, 128) * 2 + (4,) + (0,)
    config.num_hash_layers = 1
    return config
