"""Stage 8 of nano's curriculum. 16,384 tokens, dense; the rate falls.

bash launch/train_nano.sh        # all stages
"""

from configs.train import make_stage


def get_config():
    far = dict(tokens=(9000, 13000), needles=(30, 60), distractors=(30, 80), questions=(40, 60))
    needles = [far, far | dict(gaps=0.1)]
    falling = dict(warmup_steps=2, decay_steps=40, last_rate=0.0002)
    return make_stage(8, 16384, 1, needles, 60, dense=60, rate=0.003, **falling)
