"""A model's weights by name, and a model with other weights: what optimizers and adapters work on.

The name of a weight is its path in the module, such as "stack.period.0.attention.query_up". A
weight that a scan repeats is one array of all layers.
"""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from v4jax.kernels import Target
from v4jax.kernels.scaled_matmul import expand
from v4jax.model.parameters import Buffer
from v4jax.parallel import Axes
from v4jax.parallel.weight_sharding import gather_weights, gathers_storage, is_variable, name_of
from v4jax.quant import Recipe

Module = TypeVar("Module", bound=nnx.Module)


def materialize(axes: Axes, module: Module, target: Target) -> Module:
    """Returns the module with its weights as a layer uses them; call it right before the layer.

    In per-device code a weight that is split for storage is gathered; its gradient is summed and
    scattered back to its shards. A recipe is expanded, with or without a mesh.
    """
    if used_as_stored(axes, module):
        return module

    decode = functools.partial(expand, target=target)

    def expand_recipe(variable):
        value = variable.get_value()
        return variable.copy(value=value.expand(decode) if isinstance(value, Recipe) else value)

    return jax.tree.map(expand_recipe, gather_weights(axes, module), is_leaf=is_variable)


def used_as_stored(axes: Axes, module: nnx.Module) -> bool:
    """Whether `materialize` returns the module as it is."""
    values = (variable.get_value() for variable in variables(module).values())
    return not (gathers_storage(axes) or any(isinstance(value, Recipe) for value in values))


def variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Returns every variable by name."""
    found = jax.tree_util.tree_leaves_with_path(module, is_leaf=is_variable)
    return {name_of(path): variable for path, variable in found}


def read_weights(module: nnx.Module, *, buffers: bool = False) -> dict[str, Any]:
    """Returns the values (arrays or `ScaledArray`s) of all parameters, or of all buffers."""
    return {
        name: variable.get_value()
        for name, variable in variables(module).items()
        if isinstance(variable, Buffer) == buffers
    }


def write_weights(module: Module, values: Mapping[str, Any]) -> Module:
    """Returns the module with these values in place of its own; the others stay.

    A value may be anything with the shape of the weight that `materialize` makes an array of, or
    None for a weight that is given elsewhere.
    """

    def put(path, variable):
        name = name_of(path)
        return variable.copy(value=values[name]) if name in values else variable

    unknown = values.keys() - variables(module).keys()
    assert not unknown, sorted(unknown)
    return jax.tree_util.tree_map_with_path(put, module, is_leaf=is_variable)
