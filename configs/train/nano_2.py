"""Stage 2 of nano's curriculum. Up to three codes, and distances of up to a million positions.

bash launch/train_nano.sh        # all stages
"""

from configs.train import make_stage


def get_config():
    needles = dict(
        tokens=(128, 128), needles=(1, 3), distractors=(0, 0), questions=(1, 2), gaps=0.8
    )
    config = make_stage(2, 256, 16, [needles], 260, dense=0, rate=0.01)
    config.indexer = "frozen"
    return config
