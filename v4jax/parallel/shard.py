"""Running code once per device, and making arrays that are split over devices.

The layers run inside `on_shards`: every device computes on its own tokens, heads and experts with
the code of a single device, and calls the collectives of its `Axes` where shards must be combined.
The collectives of a program are therefore those written down, and kernels need no partitioning
rule.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.errors import ConfigError
from v4jax.parallel.axes import Tokens
from v4jax.parallel.layout import Axes, Layout
from v4jax.parallel.weight_sharding import weight_specs

Tree = TypeVar("Tree")
WEIGHTS = "weights"  # stands for the specs that `annotate_shardings` gave a module's variables


def on_shards(
    function: Callable, layout: Layout | None, tokens: Tokens, axes: tuple, result_axes
) -> Callable:
    """Returns `function(axes, *arguments)` run once per device on its shards, without `axes`.

    The function gets the `Axes` of the call; without a layout it is called once, with those of a
    single device.

    Args:
      tokens: whether the call's tokens are split.
      axes: per argument, a pytree (prefix) of `PartitionSpec`s of logical names, or `WEIGHTS`.
      result_axes: the same for what the function returns. What a spec leaves whole must be equal
        on all devices.
    """
    body = functools.partial(function, Axes(layout, tokens))
    if layout is None:
        return body

    def to_spec(names: P) -> P:
        return layout.array_spec(*names, tokens=tokens)

    def run(*arguments):
        specs = tuple(
            weight_specs(argument) if names is WEIGHTS else jax.tree.map(to_spec, names)
            for names, argument in zip(axes, arguments, strict=True)
        )
        out_specs = jax.tree.map(to_spec, result_axes)
        mapped = jax.shard_map(
            body, mesh=layout.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
        )
        return mapped(*arguments)

    return run


def replicate(tree: Tree, layout: Layout | None) -> Tree:
    """Returns the arrays, each whole on every device; without a layout as they are."""
    if layout is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, NamedSharding(layout.mesh, P()))


def make_arrays(build: Callable[[], Tree], axes_of: Callable, layout: Layout | None) -> Tree:
    """Returns build(), every array made in place on the devices that hold it.

    Args:
      axes_of: from what `build` returns, with shapes in place of arrays, to the same tree of
        `PartitionSpec`s of logical names.
    """
    if layout is None:
        return build()
    axes = axes_of(jax.eval_shape(build))
    shardings = jax.tree.map(
        lambda names: NamedSharding(layout.mesh, layout.array_spec(*names)), axes
    )
    return jax.jit(build, out_shardings=shardings)()


def entry_shards(layout: Layout | None) -> int:
    """Returns over how many devices the entries of a cached sequence are split."""
    return 1 if layout is None else layout.size(layout.array_axes("entries"))


def batch_shards(layout: Layout | None) -> int:
    """Returns over how many groups of devices the sequences of a batch are divided."""
    return 1 if layout is None else layout.size(layout.array_axes("batch"))


def check_batch(layout: Layout | None, batch: int) -> None:
    """Raises unless the devices along `data` divide the sequences of a batch.

    Raises:
      ConfigError: they do not; the message says what would do.
    """
    shards = batch_shards(layout)
    if batch % shards:
        raise ConfigError(
            f"mesh.data = {shards} does not divide a batch of {batch}; use a multiple of {shards} "
            "sequences (empty slots have length 0), or a smaller data axis"
        )


def look_up(axes: Axes, table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns table[ids] of a table whose rows are the vocabulary, split or not."""
    if axes.size("vocab") == 1:
        return table[ids]
    ids = ids - axes.offset("vocab", table.shape[0])
    here = (ids >= 0) & (ids < table.shape[0])
    rows = table[jnp.clip(ids, 0, table.shape[0] - 1)]
    return axes.psum(jnp.where(here[..., None], rows, 0), "vocab")
