"""`FlatTransformer`: a model for loops over `extend`."""

import functools
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
from jaxtyping import Array, Int

from v4jax.cache import HybridCache
from v4jax.model.passes import extend_step

if TYPE_CHECKING:
    from v4jax.model.transformer import Transformer


class FlatTransformer:
    """A model flattened once into arrays and structure: its `extend` is the model's, called sooner.

    JAX flattens the modules of its arguments at every call, which is a millisecond of Python, as
    long as a small step. Weights that are changed afterwards are not seen.
    """

    def __init__(self, model: "Transformer"):
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
        step = _extend_donating if donate else _extend
        return step(self._leaves, tokens, cache, lengths, self._structure, logits)


class _Structure:
    """A tree definition that is compared by identity, in no time."""

    def __init__(self, tree):
        self.tree = tree


@functools.lru_cache(maxsize=64)
def _keep_structure(tree) -> _Structure:
    """Returns the same `_Structure` for equal trees, so that what was compiled is found again."""
    return _Structure(tree)


def _extend_step(leaves, tokens, cache, lengths, structure: _Structure, logits):
    return extend_step(jax.tree.unflatten(structure.tree, leaves), tokens, cache, lengths, logits)


_jit = partial(jax.jit, static_argnames=("structure", "logits"))
_extend, _extend_donating = _jit(_extend_step), _jit(_extend_step, donate_argnames="cache")
