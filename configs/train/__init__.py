"""Training from scratch and continued pre-training: each file is a run of `v4jax train`.

Below: what the stages of nano's curriculum share; `launch/train_nano.sh` runs them in order.

Each stage is a run of its own that starts from the weights of the one before. A window of 32 tokens
(stages 1 and 4) leaves CSA entries as the only way to what is further back, so that short rows,
with many questions in them, teach it: names and codes were learned several times faster so than in
rows in which positions are left out. Rates are far above the report's: the model is small.
"""

import ml_collections


def make_stage(number, length, batch, needles, steps, *, dense, rate, **more):
    """Returns the run of a stage.

    Args:
      needles: settings of the sources, each a `training.data.needles.Needles`.
      dense: first steps in which CSA layers attend to every visible entry and the indexer learns
        from all of them.
      more: fields of the optimizer.
    """
    config = ml_collections.ConfigDict()
    config.model = f"out/nano_{number - 1}/start"  # written by launch/train_nano.sh
    config.output = f"out/nano_{number}"
    config.numerics = "float32"
    config.steps = steps
    sources = tuple(
        dict(kind="needles", settings=dict(text_weight=0.01, **settings)) for settings in needles
    )
    gaps = any(settings.get("gaps") for settings in needles)
    config.data = dict(
        sources=sources, length=length, batch=batch, gaps=gaps, packing=False, seed=number
    )
    config.optimizer = dict(rate=rate, adamw_rate=0.4, warmup_steps=10) | more
    config.loss = dict(mtp_weight=0.0, bias_speed=0.003)
    config.indexer = "distill"
    config.dense_steps = dense
    config.remat = "none"
    config.checkpoint = dict(every=50)
    return config


def make_far_stage(number, steps, *, rate, **falling):
    """Returns the run of a stage whose rows of 4,096 tokens stand for up to a million, dense.

    Three rows of four leave positions out, and HCA entries count for those as well.
    """
    near = dict(tokens=(2048, 2560), needles=(16, 40), distractors=(16, 60), questions=(24, 32))
    far = near | dict(gaps=0.06, gap_tokens=(2048, 1 << 20))
    rows = [near, far, far, far]
    falling = falling | dict(warmup_steps=5)
    config = make_stage(number, 4096, 1, rows, steps, dense=steps, rate=rate, **falling)
    config.count_gaps = True
    return config
