"""Stage 9 of nano's curriculum. 4,096 tokens that stand for up to a million; the rate falls.

bash launch/train_nano.sh        # all stages

In a long text HCA layers have many entries, and their share of the attention grows with them: what
the window says fades. After stage 8 that cost half of the codes at 256 K. Here positions are left
out, and each entry in view counts for those as well.
"""

from configs.train import make_far_stage


def get_config():
    return make_far_stage(9, 300, rate=0.003, decay_steps=200, last_rate=0.0002)
