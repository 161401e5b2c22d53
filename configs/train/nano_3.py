"""Stage 3 of nano's curriculum. Up to six codes with distractors; the indexer begins to learn.

bash launch/train_nano.sh        # all stages
"""

from configs.train import make_stage


def get_config():
    needles = dict(
        tokens=(256, 256), needles=(1, 6), distractors=(0, 4), questions=(2, 4), gaps=0.6
    )
    return make_stage(3, 512, 8, [needles], 160, dense=150, rate=0.01)
