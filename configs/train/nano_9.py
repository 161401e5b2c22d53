"""Stage 9 of nano's curriculum. 4,096 tokens that stand for up to a million; the rate falls.

bash launch/train_nano.sh        # all stages

In a long text HCA layers have many entries, and their share of the attention grows with them: what
the window says fades. After stage 8 that cost half of the codes at 256 K. Here positions are left
out, and each entry in view counts for those as well.
"""

from configs.train import make_stage


def get_config():
    near = dict(tokens=(2048, 2560), needles=(16, 40), distractors=(16, 60), questions=(24, 32))
    far = near | dict(gaps=0.06, gap_tokens=(2048, 1 << 20))
    falling = dict(warmup_steps=5, decay_steps=200, last_rate=0.0002)
    config = make_stage(9, 4096, 1, [near, far, far, far], 300, dense=300, rate=0.003, **falling)
    config.count_gaps = True
    return config
