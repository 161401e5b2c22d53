"""Stage 5 of nano's curriculum. Up to 14 codes in 1,024 tokens; selection truncates.

bash launch/train_nano.sh        # all stages
"""

from configs.train import make_stage


def get_config():
    near = dict(tokens=(400, 640), needles=(4, 14), distractors=(0, 6), questions=(8, 8))
    return make_stage(5, 1024, 4, [near, near | dict(gaps=0.7)], 200, dense=40, rate=0.006)
