"""Fine-tunes adapters only; the base stays as it is stored (FP4 experts, FP8 the rest).

    v4jax train --config=configs/finetune/lora.py --set=model=/models/v4 --set=output=out/lora

Adapters stand beside attention and every expert; `OUTPUT/adapters` has them in PEFT's layout and
`OUTPUT/model` merged. As it stands it adapts nano on the example beside this file, on a CPU.
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
        last_rate=0.0002,
        warmup_steps=10,
        decay_steps=50,
        weight_decay=0.0,
    )
    config.checkpoint = dict(every=50)
    return config
