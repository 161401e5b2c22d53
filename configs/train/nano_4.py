"""Stage 4 of nano's curriculum. Six codes, all asked for: names are told apart.

bash launch/train_nano.sh        # all stages
"""

from configs.train import make_stage


def get_config():
    needles = dict(tokens=(160, 228), needles=(3, 6), distractors=(0, 0), questions=(6, 6))
    config = make_stage(4, 512, 8, [needles], 210, dense=210, rate=0.006)
    config.data.gaps = False
    return config
