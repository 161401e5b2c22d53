"""Which format each kind of cached vector has, from the model's sizes and the numerics."""

from v4jax.config import ModelConfig, Numerics
from v4jax.quant import EntryFormat


def entry_format(config: ModelConfig, numerics: Numerics) -> EntryFormat:
    """Returns the storage of window and compressed key-value vectors."""
    return EntryFormat(
        numerics.entry_format, config.head_dim, config.qk_rope_head_dim, numerics.activation_dtype
    )


def index_format(config: ModelConfig, numerics: Numerics) -> EntryFormat:
    """Returns the storage of index keys."""
    return EntryFormat(
        numerics.index_format,
        config.index_head_dim,
        config.qk_rope_head_dim,
        numerics.activation_dtype,
    )
