"""Stage 10 of nano's curriculum. CSA entries weigh 1.5 times as much; the rest gets used to it.

bash launch/train_nano.sh        # all stages

The 64 entries selected of 131,072 are likelier rivals than those of a training row: after stage 9
they cost a quarter of the codes at 512 K. Two thirds of these came back when scores of CSA entries
were made 1.5 times as large. Queries are normalized, so the size of scores lies in the norm of the
entries: before this stage launch/train_nano.sh multiplies its weight by 1.5.
"""

from configs.train import make_far_stage


def get_config():
    return make_far_stage(10, 100, rate=0.001, decay_steps=95, last_rate=0.0001)
