"""Trains a draft module, which proposes the next tokens for the model to verify; nothing else.

    v4jax train --config=configs/train/draft.py
    v4jax train --config=configs/train/draft.py --set=model=/models/v4-flash-0731 \
        --set=draft.module=None --set='data.sources=[{"kind": "chat", "paths": ["answers.jsonl"]}]'

Without `--set` it gives nano a fresh module and trains it on nano's own task. With `draft.module`
left out the module of the checkpoint is trained further.

Hardware: two CPU cores for nano. Duration: 100 steps of 2,048 tokens, about four minutes at 1,000
tokens/s (measured beside other programs), and the compilation. Expected result: out/draft/model; at
step 60 the loss has fallen from 3.0 to 1.2, and a pass of the model gives 2.1 tokens of 4 (measured
on answers).
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "nano"
    config.output = "out/draft"
    config.numerics = "float32"
    config.steps = 100
    config.remat = "none"
    config.quantization_aware = True
    config.data = dict(
        sources=(
            dict(
                kind="needles",
                settings=dict(
                    tokens=(160, 228),
                    needles=(3, 6),
                    distractors=(0, 0),
                    questions=(6, 6),
                    text_weight=0.0,
                ),
            ),
        ),
        length=512,
        batch=4,
        packing=False,
    )
    config.draft = dict(
        module=dict(stages=3, target_layer_ids=(3, 4, 5), markov_rank=16, noise_token_id=319),
        anchors=40,
    )
    config.optimizer = dict(rate=0.006, adamw_rate=0.4, warmup_steps=0.1)
    config.checkpoint = dict(every=50)
    return config
