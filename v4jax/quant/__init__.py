"""The release's number formats with power-of-two block scales: weights, cached vectors.

Read `formats.py` first (the arithmetic, bit for bit), then `scaled_array.py` (weights),
`recipes.py` (weights in training, expanded where they are used) and `entry_format.py` (cached
vectors).
"""

from v4jax.quant.entry_format import EntryFormat
from v4jax.quant.recipes import LowRank, Master, Recipe
from v4jax.quant.scaled_array import ScaledArray, abstract_weight, quantize_weight

__all__ = [
    "EntryFormat",
    "LowRank",
    "Master",
    "Recipe",
    "ScaledArray",
    "abstract_weight",
    "quantize_weight",
]
