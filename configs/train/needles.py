"""Trains nano from random weights to find codes in text, the first stage of its task.

    v4jax train --config=configs/train/needles.py

Hardware: a CPU. One code per text, far from its question: positions are left out in between, so
that rows of 256 tokens show distances of up to a million. What comes after this stage (several
codes, distractors, longer texts, selection that truncates) is not here yet.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "nano"
    config.output = "out/needles"
    config.numerics = "float32"
    config.steps = 2000
    one_code = dict(
        tokens=(128, 128),
        needles=(1, 1),
        distractors=(0, 0),
        questions=(1, 1),
        gaps=1.0,
        text_weight=0.01,  # about 180 tokens of text to the 6 of the answer
    )
    config.data = dict(
        sources=(dict(kind="needles", settings=one_code),),
        length=256,
        batch=16,
        packing=False,
        gaps=True,
    )
    # So small a model takes, and needs, far larger steps than the report's.
    config.optimizer = dict(rate=0.01, adamw_rate=0.4, warmup_steps=50, decay_steps=500)
    config.optimizer.last_rate = 0.001
    config.loss = dict(mtp_weight=0.1, bias_speed=0.003)
    config.remat = "none"
    return config
