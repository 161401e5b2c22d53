"""Pinning arrays, running code once per device, and collectives by the name of a logical axis.

The layers run inside `on_shards`: every device computes on its own tokens, heads and experts with
the code of a single device, and calls the collectives below where shares must meet. So the
collectives of a program are those written down, kernels need no partitioning rule, and without a
mesh every function here returns its argument.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.errors import ConfigError
from v4jax.parallel.axes import Regime
from v4jax.parallel.layout import Layout, activate, active, split_axes
from v4jax.parallel.weights import weight_specs

Tree = TypeVar("Tree")
WEIGHTS = "weights"  # stands for the specs that `place` gave the variables of a module


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an array to the rule of its logical axes, one name per axis (None: whole).

    >>> x_btd = shard(x_btd, "batch", "tokens", "embed")

    An axis whose size the devices do not divide stays whole.
    """
    now = active()
    if now is None or now.per_device:
        return x
    assert len(names) == x.ndim, (names, x.shape)
    spec = _resolve(now.layout, now.regime, names, x.shape)
    return jax.lax.with_sharding_constraint(x, NamedSharding(now.layout.mesh, spec))


def on_shards(
    function: Callable, layout: Layout | None, regime: Regime, axes: tuple, result_axes
) -> Callable:
    """Returns `function` run once per device on its shares; without a layout, `function` itself.

    Args:
      regime: of the call; its rules split the arguments.
      axes: per argument, a pytree (prefix) of `PartitionSpec`s of logical names, or `WEIGHTS`.
      result_axes: the same for what the function returns. What a spec leaves whole must be equal
        on all devices.
    """
    if layout is None:
        return function

    def to_spec(names: P) -> P:
        return _resolve(layout, regime, names)

    def body(*arguments):
        with activate(layout, regime, per_device=True):
            return function(*arguments)

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
        lambda names: NamedSharding(layout.mesh, _resolve(layout, "prefill", names)), axes
    )
    return jax.jit(build, out_shardings=shardings)()


def entry_shares(layout: Layout | None) -> int:
    """Returns over how many devices the entries of a cached sequence are split."""
    return 1 if layout is None else layout.size(layout.array_axes("prefill", "entries"))


def batch_shares(layout: Layout | None) -> int:
    """Returns over how many groups of devices the sequences of a batch are divided."""
    return 1 if layout is None else layout.size(layout.array_axes("prefill", "batch"))


def check_batch(layout: Layout | None, batch: int) -> None:
    """Raises unless the devices along `data` divide the sequences of a batch.

    Raises:
      ConfigError: they do not; the message says what would do.
    """
    shares = batch_shares(layout)
    if batch % shares:
        raise ConfigError(
            f"mesh.data = {shares} does not divide a batch of {batch}; use a multiple of {shares} "
            "sequences (empty slots have length 0), or a smaller data axis"
        )


def _resolve(layout: Layout, regime, names, shape=None) -> P:
    """Returns the spec of logical names; with a shape, axes that do not divide stay whole."""
    axes = [layout.array_axes(regime, name) for name in names]
    if shape is not None:
        axes = [
            () if size % layout.size(split) else split
            for split, size in zip(axes, shape, strict=True)
        ]
    return P(*(split or None for split in axes))


def shares(name: str) -> int:
    """Returns over how many devices the logical axis `name` is split here; 1 without a mesh."""
    axes = split_axes(name)
    return active().layout.size(axes) if axes else 1


def share_index(name: str) -> jax.Array:
    """Returns which of the shares of a split logical axis this device has."""
    return jax.lax.axis_index(split_axes(name))


def first_here(name: str, size: int):
    """Returns the index of the first of this device's `size` elements of a split logical axis."""
    return share_index(name) * size if shares(name) > 1 else 0


def sum_over(x: jax.Array, name: str) -> jax.Array:
    """Returns the sum of x over the devices that share the logical axis `name`, in float32."""
    axes = split_axes(name)
    return jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype) if axes else x


def max_over(x: jax.Array, name: str) -> jax.Array:
    """Returns the largest x of the devices that share the logical axis `name`; no gradient."""
    axes = split_axes(name)
    return jax.lax.pmax(x, axes) if axes else x


def gather(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Returns all shares of the logical axis `name`, joined in order along `axis`."""
    axes = split_axes(name)
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns table[ids] of a table whose rows are the vocabulary, split or not."""
    if shares("vocab") == 1:
        return table[ids]
    ids = ids - share_index("vocab") * table.shape[0]
    here = (ids >= 0) & (ids < table.shape[0])
    rows = table[jnp.clip(ids, 0, table.shape[0] - 1)]
    return sum_over(jnp.where(here[..., None], rows, 0), "vocab")
