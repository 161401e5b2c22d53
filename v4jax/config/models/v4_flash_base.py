"""DeepSeek-V4-Flash-Base: the pre-trained model, with every quantized weight in FP8.

    v4jax inspect v4_flash_base

Source: `config.json` of deepseek-ai/DeepSeek-V4-Flash-Base; it differs from V4-Flash in
`expert_dtype` alone.
"""

from v4jax.config.models import v4_flash


def get_config():
    config = v4_flash.get_config()
    config.expert_dtype = "fp8"
    return config
