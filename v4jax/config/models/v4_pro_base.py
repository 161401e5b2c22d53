"""DeepSeek-V4-Pro-Base: the pre-trained model, with every quantized weight in FP8.

    v4jax inspect v4_pro_base

Source: `config.json` of deepseek-ai/DeepSeek-V4-Pro-Base. That it differs from V4-Pro in
`expert_dtype` alone is assumed from Flash; no copy of the file was at hand.
"""

from v4jax.config.models import v4_pro


def get_config():
    config = v4_pro.get_config()
    config.expert_dtype = "fp8"
    return config
