"""Fine-tunes all weights on conversations; the loss is on what the assistant wrote.

    v4jax train --config=configs/finetune/chat.py --set=model=/models/v4 --set=output=out/chat \
        --set='data.sources=[{"kind": "chat", "paths": ["talks.jsonl"]}]'

A line of the file is {"messages": [{"role": "user", "content": "…"}, …]}; `docs/training_data.md`
has the whole format. Without `--set` it trains nano on the example beside this file.

Hardware: two CPU cores for nano; `v4jax plan --regime=train` says what other models need. Duration:
100 steps of 2,048 tokens, about four minutes at nano's 1,000 tokens/s (14.8 M tokens in four
hours), and the compilation. Expected result: out/chat/model; the loss falls from 2.1 to 0.1 within
40 steps (measured), because the example has nine conversations.
"""

import pathlib

import ml_collections

EXAMPLE = pathlib.Path(__file__).with_name("example_chat.jsonl")


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "nano"
    config.output = "out/chat"
    config.numerics = "float32"
    config.steps = 100
    config.data = dict(
        sources=(dict(kind="chat", paths=(str(EXAMPLE),)),),
        length=512,
        batch=4,
    )
    config.optimizer = dict(rate=0.003, warmup_steps=0.1, decay_steps=0.5)
    config.checkpoint = dict(every=50)
    return config
