"""The released `config.json` files, key by key (spec A.2), and the form transformers gives one."""

FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}

PRO = FLASH | {
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4] + [0],
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}

FLASH_0731 = FLASH | {
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0, 0, 0],
    "dspark_block_size": 5,
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
}

PRO_0813 = PRO | {
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4] + [0, 0, 0],
    "dspark_block_size": 5,
    "dspark_markov_rank": 512,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [58, 59, 60],
}

RELEASED = {
    "v4_flash_0731": FLASH_0731,
    "v4_pro_0813": PRO_0813,
    "v4_flash": FLASH,
    "v4_flash_base": FLASH | {"expert_dtype": "fp8"},
    "v4_pro": PRO,
    "v4_pro_base": PRO | {"expert_dtype": "fp8"},
}

_NAMES = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}
_FACTOR = 0.125

# What transformers makes of it: the keys that it replaces go, its own come.
FLASH_TRANSFORMERS = {
    key: value
    for key, value in FLASH.items()
    if key not in ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype")
} | {
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "dtype": "bfloat16",
    "layer_types": [_NAMES[ratio] for ratio in FLASH["compress_ratios"][:-1]],
    "mlp_bias": False,
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "output_router_logits": False,
    "pad_token_id": None,
    "partial_rotary_factor": _FACTOR,
    "quantization_config": FLASH["quantization_config"] | {"expert_dtype": "fp4"},
    "rope_parameters": {
        "compress": {
            "attention_factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "partial_rotary_factor": _FACTOR,
            "rope_theta": 160000,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "main": {
            "partial_rotary_factor": _FACTOR,
            "rope_theta": 10000,
            "rope_type": "default",
        },
    },
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "transformers_version": "5.23.0",
}
