"""Mini: two layers, CSA with hash routing and HCA with learned routing; compiles in seconds."""

from v4jax.config.models import tiny


def get_config():
    config = tiny.get_config()
    config.hidden_size = 32
    config.num_hidden_layers = 2
    config.num_attention_heads = 2
    config.head_dim = 16
    config.qk_rope_head_dim = 8
    config.q_lora_rank = 16
    config.o_lora_rank = 8
    config.n_routed_experts = 4
    config.moe_intermediate_size = 16
    config.index_n_heads = 2
    config.index_topk = 8
    config.compress_ratios = (4, 128)
    config.num_nextn_predict_layers = 0
    return config
