"""DeepSeek-V4-Pro-0813: V4-Pro trained further, with a draft module in place of the MTP block.

    v4jax inspect v4_pro_0813

Source: `config.json` of deepseek-ai/DeepSeek-V4-Pro-0813, whose `num_nextn_predict_layers` is 1
though the module has three stages.
"""

from v4jax.config.models import v4_pro


def get_config():
    config = v4_pro.get_config()
    config.num_nextn_predict_layers = 0
    config.compress_ratios = (*config.compress_ratios[:61], 0, 0, 0)
    config.draft = dict(stages=3, target_layer_ids=(58, 59, 60), markov_rank=512)
    config.profile = "0731"
    return config
