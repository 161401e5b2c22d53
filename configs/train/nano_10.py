"""Stage 10 of nano's curriculum. CSA entries weigh 1.5 times as much; the rest gets used to it.

bash launch/train_nano.sh        # all stages

The 64 entries selected of 131,072 are likelier rivals than those of a training row: after stage 9
they cost a quarter of the codes at 512 K. Two thirds of these came back when scores of CSA entries
were made 1.5 times as large. Queries are normalized, so the size of scores lies in the norm of the
entries: before this stage launch/train_nano.sh multiplies its weight by 1.5.
"""

from configs.train import make_stage


def get_config():
    near = dict(tokens=(2048, 2560), needles=(16, 40), distractors=(16, 60), questions=(24, 32))
    far = near | dict(gaps=0.06, gap_tokens=(2048, 1 << 20))
    falling = dict(warmup_steps=5, decay_steps=95, last_rate=0.0001)
    config = make_stage(10, 4096, 1, [near, far, far, far], 100, dense=100, rate=0.001, **falling)
    config.count_gaps = True
    return config
