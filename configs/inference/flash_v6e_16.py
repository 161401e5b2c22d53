"""Reads documents of up to a million tokens with V4-Flash on a v6e-16 slice, and answers questions.

    v4jax batch --config=configs/inference/flash_v6e_16.py --model=/models/v4-flash \
        --input=docs.jsonl --output=answers.jsonl
    v4jax plan --config=configs/inference/flash_v6e_16.py --topology=v6e-16

Hardware: 16 v6e chips, the experts divided among them. Memory of a chip, of 31.2 GiB: weights 17.2,
caches of four questions 0.9, activations 0.5 while reading and 0.1 while answering. Duration, at
best: a million tokens are read in 6.0 s, and a step that writes a token of four answers takes
5.4 ms. Expected result: a line of answers.jsonl for each question. All figures are the planner's;
nothing has run on these chips yet.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.model = "v4_flash"
    config.numerics = "released"
    config.mesh = dict(expert=16)
    config.max_tokens = 1 << 20
    config.questions_at_once = 4
    config.sampling = dict(max_new_tokens=1024)
    return config
