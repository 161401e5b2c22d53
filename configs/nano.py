"""Nano: every mechanism of V4 in 6.2 M parameters, made to read a million tokens on a CPU.

    v4jax batch --model=nano --input=docs.jsonl --output=answers.jsonl

Made for this project; no released counterpart. At a million tokens the index scores of the CSA
layers are most of the arithmetic (queries × entries × index heads), so only two layers are CSA,
with four narrow index heads. The context is a document of 1,048,576 tokens and room for a
conversation about it.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.tokenizer = "byte"
    config.vocab_size = 320
    config.max_position_embeddings = 1_048_576 + 65_536
    config.bos_token_id = 256
    config.eos_token_id = 257
    config.hidden_size = 192
    config.num_hidden_layers = 6
    config.num_attention_heads = 8
    config.head_dim = 64
    # A quarter of the channels, and half of an index head: what is far away is found by content,
    # and rotated channels have an arbitrary phase there. With 32 an index key had nothing else.
    config.qk_rope_head_dim = 16
    config.q_lora_rank = 96
    config.o_groups = 2
    config.o_lora_rank = 64
    config.n_routed_experts = 16
    config.num_experts_per_tok = 4
    config.moe_intermediate_size = 64
    config.index_n_heads = 4
    config.index_head_dim = 32
    config.index_topk = 64
    config.routed_scaling_factor = 1.5
    # Folds into layers 0 and 1, then [CSA, HCA] twice; the last entry is the MTP block.
    config.compress_ratios = (0, 128) + (4, 128) * 2 + (0,)
    config.num_hash_layers = 2
    return config
