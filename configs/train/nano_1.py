"""Stage 1 of nano's curriculum. One code in 128 tokens, and one question for it.

bash launch/train_nano.sh        # all stages
"""

from configs.train import make_stage


def get_config():
    needles = dict(tokens=(64, 76), needles=(1, 1), distractors=(0, 0), questions=(1, 1))
    config = make_stage(1, 128, 32, [needles], 284, dense=0, rate=0.01)
    config.model = "out/nano_0.py"  # nano with a window of 32 tokens
    config.optimizer.warmup_steps = 50
    config.indexer = "frozen"  # it has nothing to choose: 32 entries
    return config
