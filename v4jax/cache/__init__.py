"""What a query may see: the memory that attention asks, for whole sequences and for serving.

Read `entries.py` first (the contract), then `full_sequence.py` (training and scoring: nothing is
kept) and `hybrid.py` (serving: windows, compressed entries and the compressors' unfinished windows
of many sequences).
"""

from v4jax.cache.entries import CompressorRows, LayerMemory
from v4jax.cache.full_sequence import FullSequence
from v4jax.cache.hybrid import HybridCache, init_cache

__all__ = ["CompressorRows", "FullSequence", "HybridCache", "LayerMemory", "init_cache"]
