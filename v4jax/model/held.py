"""`HeldTransformer`: a model for loops over `extend`."""

import functools
from functools import partial
from typing import Literal

import jax
from jaxtyping import Array, Int

from v4jax.cache import HybridCache
from v4jax.model.transformer import Transformer, extend_step


class HeldTransformer:
    """A model taken apart once: its `extend` is the model's, called sooner.

    JAX takes the modules of its arguments apart at every call, which is a millisecond of Python, as
    long as a small step. Weights that are changed afterwards are not seen.
    """

    def __init__(self, model: Transformer):
        self._model = model
        self._leaves, tree = jax.tree.flatten(model)
        self._structure = _keep_structure(tree)

    def extend(
        self,
        tokens: Int[Array, "b t"],
        cache: HybridCache,
        lengths: Int[Array, "b"] | None = None,
        logits: Literal["all", "last"] = "all",
        *,
        donate: bool = False,
        trusted: bool = False,
    ) -> tuple[Array, HybridCache]:
        """See `Transformer.extend`."""
        tokens, lengths = self._model.check_extend(tokens, cache, lengths, logits, trusted)
        step = _extend_held_donating if donate else _extend_held
        return step(self._leaves, tokens, cache, lengths, self._structure, logits)


class _Structure:
    """A tree definition that is compared by identity, in no time."""

    def __init__(self, tree):
        self.tree = tree


@functools.lru_cache(maxsize=64)
def _keep_structure(tree) -> _Structure:
    """Returns the same `_Structure` for equal trees, so that what was compiled is found again."""
    return _Structure(tree)


def _extend_held_step(leaves, tokens, cache, lengths, structure: _Structure, logits):
    return extend_step(jax.tree.unflatten(structure.tree, leaves), tokens, cache, lengths, logits)


_extend_held = partial(jax.jit, static_argnames=("structure", "logits"))(_extend_held_step)
_extend_held_donating = partial(
    jax.jit, static_argnames=("structure", "logits"), donate_argnames="cache"
)(_extend_held_step)
