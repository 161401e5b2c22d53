"""DeepSeek-V4-Flash-0731: V4-Flash trained further, with a draft module in place of the MTP block.

    v4jax inspect v4_flash_0731

Source: `config.json` of deepseek-ai/DeepSeek-V4-Flash-0731, whose `num_nextn_predict_layers` is 1
though the module has three stages.
"""

from v4jax.config.models import v4_flash


def get_config():
    config = v4_flash.get_config()
    config.num_nextn_predict_layers = 0
    config.compress_ratios = (0, 0) + (4, 128) * 20 + (4,) + (0,) * 3
    config.draft = dict(stages=3, target_layer_ids=(40, 41, 42), markov_rank=256)
    config.profile = "0731"
    return config
