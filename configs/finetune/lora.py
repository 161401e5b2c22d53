"""Fine-tunes adapters only; the base stays as it is stored (FP4 experts, FP8 the rest).

    v4jax train --config=configs/finetune/lora.py --set=model=/models/v4 --set=output=out/lora

Attention and every expert get adapters. Without `--set` it adapts nano on the example beside this
file.

Hardware: two CPU cores for nano; `v4jax plan --regime=train --training=lora` says what other models
need. Duration: 100 steps of 2,048 tokens, about four minutes if adapting nano is as fast as
training it (1,000 tokens/s), and the compilation. Expected result: out/lora/adapters, which PEFT
attaches, and out/lora/model with the adapters merged.
"""

import pathlib

import ml_collections

EXAMPLE = pathlib.Path(__file__).with_name("example_chat.jsonl")


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "nano"
    config.output = "out/lora"
    config.numerics = "float32"
    config.steps = 100
    config.data = dict(
        sources=(dict(kind="chat", paths=(str(EXAMPLE),)),),
        length=512,
        batch=4,
    )
    config.lora = dict(rank=8, alpha=16.0)
    config.optimizer = dict(
        kind="adamw",
        rate=0.002,
        warmup_steps=0.1,
        decay_steps=0.5,
        weight_decay=0.0,
    )
    config.checkpoint = dict(every=50)
    return config
