"""Continues the pre-training of a checkpoint on plain text; or begins it.

    v4jax train --config=configs/train/text.py --set=model=/models/v4 --set=output=out/more
    v4jax train --config=configs/train/text.py        # nano, on this repository's own texts
    v4jax train --config=configs/train/text.py --set=from_scratch=True        # random weights first

All weights are trained but the indexer's, which no loss of the language model reaches.

Hardware: two CPU cores for nano; `v4jax plan --regime=train` says what other models need. Duration:
200 steps of 4,096 tokens, about a quarter of an hour at nano's 1,000 tokens/s (14.8 M tokens in
four hours), and the compilation. Expected result: out/text/model.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "nano"
    config.output = "out/text"
    config.numerics = "float32"
    config.steps = 200
    config.data = dict(
        sources=(dict(kind="text", paths=("docs", "README.md")),),
        length=1024,
        batch=4,
    )
    config.optimizer = dict(rate=0.003, warmup_steps=0.1, decay_steps=0.5)
    config.checkpoint = dict(every=50)
    return config
