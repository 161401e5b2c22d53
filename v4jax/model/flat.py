"""`FlatTransformer`: a model for loops over its calls."""

import functools
from functools import partial
from typing import TYPE_CHECKING, Literal

import jax
from jaxtyping import Array, Int

from v4jax.cache import HybridCache
from v4jax.model.passes import draft_step, extend_step, verify_step
from v4jax.model.speculation import GREEDY, Choice, Drafts, Verified

if TYPE_CHECKING:
    from v4jax.model.transformer import Transformer


class FlatTransformer:
    """A model flattened once into arrays and structure: its calls are the model's, made sooner.

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

    def draft(
        self,
        last: Int[Array, "b"],
        cache: HybridCache,
        choice: Choice = GREEDY,
        *,
        count: int | None = None,
        trusted: bool = False,
    ) -> Drafts:
        """See `Transformer.draft`."""
        last, count = self._model.check_draft(last, cache, count, trusted)
        return _draft(self._leaves, last, cache, choice, self._structure, count)

    def verify(
        self,
        last: Int[Array, "b"],
        drafts: Drafts,
        cache: HybridCache,
        choice: Choice = GREEDY,
        lengths: Int[Array, "b"] | None = None,
        *,
        donate: bool = False,
        trusted: bool = False,
    ) -> tuple[Verified, HybridCache]:
        """See `Transformer.verify`."""
        last, lengths = self._model.check_verify(last, drafts, cache, lengths, trusted)
        step = _verify_donating if donate else _verify
        return step(self._leaves, last, drafts, cache, lengths, choice, self._structure)


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


def _draft_step(leaves, last, cache, choice, structure: _Structure, count):
    return draft_step(jax.tree.unflatten(structure.tree, leaves), last, cache, choice, count)


def _verify_step(leaves, last, drafts, cache, lengths, choice, structure: _Structure):
    model = jax.tree.unflatten(structure.tree, leaves)
    return verify_step(model, last, drafts, cache, lengths, choice)


_jit = partial(jax.jit, static_argnames=("structure", "logits"))
_extend, _extend_donating = _jit(_extend_step), _jit(_extend_step, donate_argnames="cache")
_draft = jax.jit(_draft_step, static_argnames=("structure", "count"))
_jit = partial(jax.jit, static_argnames="structure")
_verify, _verify_donating = _jit(_verify_step), _jit(_verify_step, donate_argnames="cache")
