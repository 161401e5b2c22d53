"""`FlatTransformer`: a model for loops over its calls."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax

from v4jax.model.calls import Calls
from v4jax.model.passes import draft_step, extend_step, verify_step

if TYPE_CHECKING:
    from v4jax.model.transformer import Transformer


class FlatTransformer(Calls):
    """A model flattened once into arrays and structure: its calls are the model's, made sooner.

    JAX flattens the modules of its arguments at every call, which is a millisecond of Python, as
    long as a small step. Weights that are changed afterwards are not seen.
    """

    def __init__(self, model: "Transformer"):
        self._model = model
        self._leaves, tree = jax.tree.flatten(model)
        self._structure = _keep_structure(tree)

    @property
    def _checks(self) -> "Transformer":
        return self._model

    def _compiled(self, name: str, donate: bool = False) -> Callable:
        return functools.partial(COMPILED[name, donate], self._leaves, self._structure)


class _Structure:
    """A tree definition that is compared by identity, in no time."""

    def __init__(self, tree):
        self.tree = tree


@functools.lru_cache(maxsize=64)
def _keep_structure(tree) -> _Structure:
    """Returns the same `_Structure` for equal trees, so that what was compiled is found again."""
    return _Structure(tree)


def _compile(step: Callable, *static: int, donate: tuple[int, ...] = ()) -> Callable:
    """Returns a pass as a compiled function of leaves, structure and its other arguments.

    Args:
      static, donate: places of these arguments.
    """

    def run(leaves, structure: _Structure, *arguments):
        return step(jax.tree.unflatten(structure.tree, leaves), *arguments)

    run.__name__ = step.__name__
    return jax.jit(run, static_argnums=(1, *static), donate_argnums=donate)


# (name, whether the cache is consumed) → compiled function.
COMPILED = {
    ("extend", False): _compile(extend_step, 5),
    ("extend", True): _compile(extend_step, 5, donate=(3,)),
    ("draft", False): _compile(draft_step, 5),
    ("verify", False): _compile(verify_step),
    ("verify", True): _compile(verify_step, donate=(4,)),
}
