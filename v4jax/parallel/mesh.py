"""The device mesh: four named axes, and what must divide for a model to fit on it."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from v4jax.config import ModelConfig
from v4jax.config.run import MeshConfig
from v4jax.errors import ConfigError
from v4jax.parallel.axes import MESH_AXES, WEIGHT_RULES, WeightLayout


def make_mesh(
    *,
    data: int = 1,
    expert: int = 1,
    context: int = 1,
    tensor: int = 1,
    slices: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns a mesh whose axes have these sizes; neighbours on an axis are neighbours in the pod.

    >>> mesh = make_mesh(data=2, expert=4)

    Args:
      data, expert, context, tensor: devices along each axis; `parallel/axes.py` says what each
        splits.
      slices: how many of an axis' devices lie in different slices, joined by the data-centre
        network: {"data": 2} for two slices. Within a slice the axis then has data / 2 devices.
      devices: all devices by default; their number is the product of the sizes.

    Raises:
      ConfigError: a size is not positive, the product is not the number of devices, or `slices`
        does not divide the sizes or differs from the slices there are.
    """
    sizes = {"data": data, "expert": expert, "context": context, "tensor": tensor}
    devices = jax.devices() if devices is None else list(devices)
    for axis, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(f"mesh.{axis} must be a positive integer, got {size!r}")
    if math.prod(sizes.values()) != len(devices):
        product = " · ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"mesh sizes must multiply to the {len(devices)} devices, got {product} = "
            f"{math.prod(sizes.values())}; {_name_fitting(sizes, len(devices))} would do, or name "
            "the devices with devices="
        )
    arranged = arrange_devices(sizes, dict(slices or {}), devices)
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def choose_mesh(asked: MeshConfig | None, config: ModelConfig) -> Mesh | None:
    """Returns the mesh over all devices that is asked for, or None for one device alone.

    Args:
      asked: sizes whose product is 1 leave further devices unused. None: one device where there is
        one, else `default_sizes`.

    Raises:
      ConfigError: it is no mesh of these devices, or does not divide the model.
    """
    devices = jax.devices()
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if asked is None:
        if len(devices) == 1:
            return None
        asked = MeshConfig(**default_sizes(config, len(devices)))
    elif math.prod(asked.sizes.values()) == 1 and jax.process_count() == 1:
        return None
    joined = dict(asked.slices) or _lay_slices(asked.sizes, slices)
    mesh = make_mesh(**asked.sizes, slices=joined)
    check_mesh(mesh, config, "serve")
    return mesh


def default_sizes(config: ModelConfig, devices: int) -> dict[str, int]:
    """Returns the mesh for serving where none is asked for; it divides every model.

    Experts go over the devices: they are most of the weights, and their devices share the tokens
    and entries of a sequence as well. What does not divide them falls to `context`. `data` would
    make every part of it read the same document.
    """
    expert = math.gcd(devices, config.n_routed_experts)
    return {"expert": expert, "context": devices // expert}


def _lay_slices(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Returns the axis along which slices are joined: the outermost that they divide."""
    if slices == 1:
        return {}
    for axis in MESH_AXES:
        if sizes.get(axis, 1) % slices == 0:
            return {axis: slices}
    raise ConfigError(
        f"mesh: the devices are {slices} slices, joined along one axis, and none of "
        f"{dict(sizes)} is a multiple of {slices}; choose another size"
    )


def _name_fitting(sizes: Mapping[str, int], devices: int) -> str:
    """Returns, axis by axis, the size with which all others multiply to the devices."""
    product = math.prod(sizes.values())
    others = {axis: product // size for axis, size in sizes.items()}
    fitting = [f"{axis}={devices // rest}" for axis, rest in others.items() if devices % rest == 0]
    return " or ".join(fitting) or f"sizes among {divisors(devices)}"


def arrange_devices(
    sizes: Mapping[str, int], slices: Mapping[str, int], devices: Sequence[jax.Device]
) -> np.ndarray:
    """Returns the devices in an array of `sizes`; along an axis, those of one slice stand together.

    Raises:
      ConfigError: as `make_mesh`.
    """
    from jax.experimental import mesh_utils

    outer = [slices.get(axis, 1) for axis in MESH_AXES]
    unknown = sorted(slices.keys() - set(MESH_AXES))
    if unknown:
        raise ConfigError(f"mesh.slices has no axis {unknown[0]!r}; the axes are {MESH_AXES}")
    for axis, count in zip(MESH_AXES, outer, strict=True):
        if count < 1 or sizes[axis] % count:
            raise ConfigError(
                f"mesh.slices.{axis} = {count} does not divide mesh.{axis} = {sizes[axis]}; "
                f"sizes that would do: {divisors(sizes[axis])}"
            )
    inner = [sizes[axis] // count for axis, count in zip(MESH_AXES, outer, strict=True)]
    groups: dict[int, list] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0), []).append(device)
    if len(groups) != math.prod(outer):
        raise ConfigError(
            f"mesh.slices must multiply to the {len(groups)} slices of these devices, got "
            f"{dict(slices)}; e.g. slices={{'data': {len(groups)}}}"
        )
    blocks = np.empty(outer, object)
    for place, (_, group) in zip(np.ndindex(*outer), sorted(groups.items()), strict=True):
        if len(group) != math.prod(inner):
            raise ConfigError(
                f"every slice must have {math.prod(inner)} devices, one has {len(group)}"
            )
        blocks[place] = mesh_utils.create_device_mesh(inner, group, allow_split_physical_axes=True)
    return np.block(blocks.tolist())


def check_mesh(mesh: Mesh, config: ModelConfig, weight_layout: WeightLayout) -> None:
    """Raises unless the mesh divides what the model splits with this layout of weights.

    Raises:
      ConfigError: it does not; the message names axis, size and the sizes that would do.
    """
    rules = WEIGHT_RULES[weight_layout]
    for logical, field in (
        ("heads", "o_groups"),  # a device holds whole output groups, and so whole heads
        ("heads", "num_attention_heads"),
        ("experts", "n_routed_experts"),
        ("expert_width", "moe_intermediate_size"),
        ("vocab", "vocab_size"),
        ("embed", "hidden_size"),
    ):
        check_divides(mesh, rules.get(logical, ()), f"model.{field}", getattr(config, field))


def check_divides(
    mesh: Mesh, axes: tuple[str, ...], what: str, size: int, unit: int = 1, unit_name: str = ""
) -> None:
    """Raises unless the product of mesh axes divides `size`, in whole units of `unit`.

    Raises:
      ConfigError: it does not; the message names the axes and the sizes that would do.
    """
    product = math.prod(mesh.shape[axis] for axis in axes)
    if product == 1 or (size % product == 0 and size // product % unit == 0):
        return
    sizes = " · ".join(f"mesh.{axis} = {mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
    fitting = divisors(size // unit) if size % unit == 0 else [1]
    blocks = f" in whole {unit_name}" if unit > 1 else ""
    raise ConfigError(
        f"{sizes} does not divide {what} = {size}{blocks}; sizes that would do: {fitting}"
    )


def divisors(size: int) -> list[int]:
    """Returns the divisors of `size`, ascending."""
    return [n for n in range(1, size + 1) if size % n == 0]
