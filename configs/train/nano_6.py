"""Stage 6 of nano's curriculum. Up to 24 codes in 2,048 tokens, every entry attended to.

bash launch/train_nano.sh        # all stages
"""

from configs.train import make_stage


def get_config():
    near = dict(tokens=(900, 1280), needles=(4, 24), distractors=(0, 20), questions=(14, 16))
    return make_stage(6, 2048, 2, [near, near | dict(gaps=0.7)], 1830, dense=1830, rate=0.006)
