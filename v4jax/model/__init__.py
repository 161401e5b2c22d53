"""The modules of DeepSeek-V4, the same for training, prefill and decode.

Read `block.py` first, then `attention.py` and `moe.py`; `transformer.py` has the calls a user
makes.
"""

from v4jax.model.inventory import take_inventory
from v4jax.model.transformer import Transformer, abstract_transformer

__all__ = ["Transformer", "abstract_transformer", "take_inventory"]
