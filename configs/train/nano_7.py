"""Stage 7 of nano's curriculum. 4,096 tokens, dense, then sparse; the rate falls.

bash launch/train_nano.sh        # all stages
"""

from configs.train import make_stage


def get_config():
    near = dict(tokens=(900, 1280), needles=(4, 24), distractors=(0, 20), questions=(14, 16))
    far = dict(tokens=(2048, 2816), needles=(8, 40), distractors=(8, 60), questions=(14, 16))
    needles = [near, far, far | dict(gaps=0.4)]
    falling = dict(warmup_steps=2, decay_steps=90, last_rate=0.0002)
    config = make_stage(7, 4096, 1, needles, 110, dense=60, rate=0.003, **falling)
    config.loss.mtp_weight = 0.1
    return config
