"""Weights on a mesh: specs from logical axes, arrays made or put in place, gathered where used.

`annotate_shardings` needs shapes only and works on an abstract model: first the abstract model,
then its shardings, then arrays made on the devices that hold them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.parallel.axes import COMPUTED_ON, WEIGHT_RULES
from v4jax.parallel.layout import Axes, Layout
from v4jax.parallel.mesh import check_divides
from v4jax.quant import LowRank

Module = TypeVar("Module")
Box = tuple[slice, ...]  # a part of an array: a slice with start and stop for each axis


def is_variable(node) -> bool:
    """Whether a node of a module is a stored value with logical axes."""
    return isinstance(node, nnx.Variable)


def name_of(path) -> str:
    """Returns the name of what stands at a path of a pytree, such as "stack.period.0.moe"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def annotate_shardings(module: Module, layout: Layout) -> Module:
    """Returns the module with the spec of every variable in its metadata; no array moves.

    Raises:
      ConfigError: a mesh axis does not divide what the code computes on; the message names it, its
        size and the sizes that would do.
    """

    def describe(path, variable):
        name = name_of(path)
        spec = weight_spec(name, variable.get_value(), variable.get_metadata()["axes"], layout)
        return variable.copy(spec=spec)

    return jax.tree_util.tree_map_with_path(describe, module, is_leaf=is_variable)


def weight_spec(path: str, value, axes: tuple[str, ...], layout: Layout) -> P:
    """Returns how a variable is split; `split_parts` says what that means for its arrays.

    A mesh axis splits at most one axis of an array, the first that asks for it. Storage splits take
    the leading mesh axes that divide; vectors are not worth gathering and stay whole.
    """
    block = getattr(value, "block", None)  # of values with block scales
    blocks = (1,) * (len(axes) - 2) + block if block else (1,) * len(axes)
    names = [name for name in axes if name != "layers"]
    rules, free, spec = WEIGHT_RULES[layout.weight_layout], set(layout.mesh.axis_names), []
    for name, size, block in zip(axes, value.shape, blocks, strict=True):
        wanted = [a for a in rules.get(name, ()) if a in free and layout.mesh.shape[a] > 1]
        if name in COMPUTED_ON:
            what = f"axis {name!r} of {path}"
            check_divides(layout.mesh, tuple(wanted), what, size, block, f"blocks of {block}")
        elif len(names) < 2:
            wanted = []
        else:
            while wanted and size % (layout.size(tuple(wanted)) * block):
                wanted.pop()
        free -= set(wanted)
        spec.append(tuple(wanted) or None)
    return P(*spec)


def spec_of(variable: nnx.Variable) -> P:
    """Returns the spec that `annotate_shardings` gave a variable; whole without one."""
    return variable.get_metadata().get("spec", P())


def split_parts(value, spec: P):
    """Returns a weight's value with, in place of every array, what `spec` says of that array.

    Values and scales are split as the weight is; so are the factors of `LowRank`, whose rank stays
    whole.

    Args:
      spec: of the weight, one part per axis; empty for a whole one. The parts may be anything.
    """
    if not (isinstance(value, LowRank) and spec):
        return jax.tree.map(lambda _: spec, value)
    *lead, rows, columns = spec
    down, up = P(*lead, None, columns), P(*lead, rows, None)
    return dataclasses.replace(
        value,
        base=jax.tree.map(lambda _: spec, value.base),
        down=jax.tree.map(lambda _: down, value.down),
        up=jax.tree.map(lambda _: up, value.up),
    )


def weight_specs(module):
    """Returns the module with the spec of every array in its place."""
    leaves = [
        spec
        for variable in jax.tree.leaves(module, is_leaf=is_variable)
        for spec in jax.tree.leaves(split_parts(variable.get_value(), spec_of(variable)))
    ]
    return jax.tree.unflatten(jax.tree.structure(module), leaves)


def weight_shardings(module, layout: Layout):
    """Returns the module with the sharding of every array in its place."""
    return jax.tree.map(lambda spec: NamedSharding(layout.mesh, spec), weight_specs(module))


def put_sharded(module: Module, layout: Layout) -> Module:
    """Returns a module whose arrays are copied to their shards; for models one host can hold."""
    annotated = annotate_shardings(module, layout)
    return jax.tree.map(jax.device_put, annotated, weight_shardings(annotated, layout))


def init_sharded(build: Callable[[], Module], layout: Layout) -> Module:
    """Returns build(), each array made on the devices that hold it; no device has it whole."""
    abstract = annotate_shardings(jax.eval_shape(build), layout)
    shardings = weight_shardings(abstract, layout)
    return jax.jit(lambda: annotate_shardings(build(), layout), out_shardings=shardings)()


def read_sharded(
    read: Callable[[Box], np.ndarray],
    shape: tuple[int, ...],
    variable: nnx.Variable,
    layout: Layout,
) -> jax.Array:
    """Returns an array of a variable on the mesh, each shard put there as soon as it is read.

    Args:
      read: box of the array, a slice per axis → its values. It is called once for each of
        `host_boxes`, each time after the devices have received the previous box.
    """
    sharding, shards = NamedSharding(layout.mesh, spec_of(variable)), {}
    order = sharding.addressable_devices_indices_map(shape)
    for box, parts in plan_boxes(order, shape):
        values, first = read(box), box[-1].start
        for (start, stop), devices in parts.items():
            shard = values[..., start - first : stop - first]
            shards |= {device: jax.device_put(shard, device, may_alias=True) for device in devices}
        jax.block_until_ready([shards[device] for part in parts.values() for device in part])
        del values, shard
    return jax.make_array_from_single_device_arrays(shape, sharding, [shards[d] for d in order])


def host_boxes(shape: tuple[int, ...], variable: nnx.Variable, layout: Layout) -> list[Box]:
    """Returns the boxes of a variable's array that this host reads, by `plan_boxes`."""
    sharding = NamedSharding(layout.mesh, spec_of(variable))
    return [box for box, _ in plan_boxes(sharding.addressable_devices_indices_map(shape), shape)]


def plan_boxes(
    indices: Mapping[jax.Device, Box], shape: tuple[int, ...]
) -> list[tuple[Box, dict[tuple[int, int], list[jax.Device]]]]:
    """Returns boxes that together are the shards of `indices`, none of them overlapping.

    Each is one device's shard, or neighbouring shards that differ in their columns only: files hold
    rows, and in this way no row is read twice. With each box come its column ranges and their
    devices.
    """
    rows: dict[tuple, dict[tuple[int, int], list]] = {}
    for device, index in indices.items():
        spans = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        rows.setdefault(tuple(spans[:-1]), {}).setdefault(spans[-1], []).append(device)
    plan = []
    for above, columns in rows.items():
        end = None
        for span in sorted(columns):
            if span[0] != end:
                plan.append((above, {}))
            plan[-1][1][span] = columns[span]
            end = span[1]
    return [
        ((*(slice(*span) for span in above), slice(min(parts)[0], max(parts)[1])), parts)
        for above, parts in plan
    ]


def gathers_storage(axes: Axes) -> bool:
    """Whether per-device code must gather weights that are split for storage."""
    return axes.layout is not None and axes.layout.trains


def gather_weights(axes: Axes, module: Module) -> Module:
    """Returns the module with the weights whole that are split for storage only.

    A gathered weight's gradient is summed and scattered back to its shards.
    """
    if not gathers_storage(axes):
        return module

    def prepare(variable):
        value, names = variable.get_value(), P(*variable.get_metadata()["axes"])
        parts = split_parts(value, names), split_parts(value, spec_of(variable))
        return variable.copy(value=jax.tree.map(gather, value, *parts))

    def gather(leaf, names, spec):
        dropped = len(names) - leaf.ndim  # a scan has taken the axis of layers away
        for axis, (name, split) in enumerate(zip(names, spec, strict=True)):
            if split and name not in COMPUTED_ON:
                # One mesh axis after the other, the innermost first. Asked for all devices of a
                # slice at once, compilers for TPUs add up whole arrays of zeros instead, and make
                # the gradient whole on every device before they cut it.
                for mesh_axis in reversed((split,) if isinstance(split, str) else split):
                    leaf = jax.lax.all_gather(leaf, mesh_axis, axis=axis - dropped, tiled=True)
        return leaf

    return jax.tree.map(prepare, module, is_leaf=is_variable)
