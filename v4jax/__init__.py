"""v4jax: DeepSeek-V4 in JAX and Flax, right on the released weights, sparse to a million tokens.

    import v4jax
    model = v4jax.load("nano")                        # or a checkpoint folder
    logits = model(tokens)                            # int32 [batch, tokens] → float32 logits
    cache = model.init_cache(batch=1, max_tokens=65536)
    logits, cache = model.extend(tokens, cache, logits="last")
    v4jax.save(model, "folder", format="released")

A name is imported when it is first used: `import v4jax` alone loads nothing.
"""

import importlib

_EXPORTS = {
    "HybridCache": "v4jax.cache",
    "ModelConfig": "v4jax.config",
    "Numerics": "v4jax.config",
    "Transformer": "v4jax.model",
    "load": "v4jax.checkpoint",
    "save": "v4jax.checkpoint",
    "load_tokenizer": "v4jax.tokenizer",
    "make_mesh": "v4jax.parallel",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'v4jax' has no attribute {name!r}; it exports {__all__}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__():
    return __all__
