"""Meshes: axes, arrangement over slices, and errors that say which sizes would do."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.config.loading import load_model_config
from v4jax.config.run import MeshConfig, parse_mesh
from v4jax.errors import ConfigError
from v4jax.parallel import Layout, check_mesh, make_mesh, mesh, replicate
from v4jax.parallel.axes import ARRAY_RULES, MESH_AXES, WEIGHT_RULES
from v4jax.parallel.mesh import arrange_devices, choose_mesh, default_sizes


def abstract_mesh(**sizes):
    """Returns a mesh of any size without devices."""
    return AbstractMesh(tuple(sizes.get(axis, 1) for axis in MESH_AXES), MESH_AXES)


def test_axes_and_their_types():
    mesh = make_mesh(data=2, expert=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "expert": 2, "context": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert len({d.id for d in mesh.devices.flat}) == 8


def test_parse_mesh():
    assert parse_mesh("data=2, expert=8") == MeshConfig(data=2, expert=8)


FLAGS = {
    "nothing": ("", "such as data=1,expert=16; got ''"),
    "a comma": ("data=2,", "such as data=1,expert=16; got 'data=2,'"),
    "unknown axis": ("model=4", "must name each of data, expert, context, tensor"),
    "twice": ("data=2,data=2", "at most once"),
    "no size": ("data", "such as data=1,expert=16"),
    "zero": ("data=0", "mesh.data must be between 1 and 1048576, got '0'"),
    "word": ("data=two", "got 'two'"),
}


@pytest.mark.parametrize("text, message", FLAGS.values(), ids=FLAGS.keys())
def test_bad_flags(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mesh(text)


DEFAULTS = {
    "one host of eight": ("v4_flash", 8, dict(expert=8, context=1)),
    "more than experts": ("tiny", 32, dict(expert=8, context=4)),
    "odd": ("v4_pro", 24, dict(expert=24, context=1)),
    "no common divisor": ("v4_flash", 7, dict(expert=1, context=7)),
}


@pytest.mark.parametrize("case", DEFAULTS)
def test_default_sizes_use_all_devices_and_divide_the_model(case):
    name, devices, expected = DEFAULTS[case]
    config = load_model_config(name)
    sizes = default_sizes(config, devices)
    assert sizes == expected
    check_mesh(abstract_mesh(**sizes), config, "serve")


SLICES = {
    "data": (MeshConfig(data=2, expert=4), [[0, 0, 0, 0], [1, 1, 1, 1]]),
    "the outermost that they divide": (MeshConfig(expert=8), [[0, 0, 0, 0, 1, 1, 1, 1]]),
    "by default": (None, [[0, 0, 0, 0, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("case", SLICES)
def test_slices_are_joined_along_one_axis(case, monkeypatch):
    """Two slices, or two machines of GPUs, of four devices each."""
    asked, expected = SLICES[case]
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    monkeypatch.setattr(mesh, "Mesh", lambda arranged, *_, **options: arranged)
    monkeypatch.setattr(mesh, "check_mesh", lambda *arguments: None)
    arranged = choose_mesh(asked, load_model_config("v4_flash"))
    slices = np.vectorize(lambda chip: chip.slice_index)(arranged)
    assert slices[:, :, 0, 0].tolist() == expected


def test_slices_that_divide_no_axis(monkeypatch):
    chips = [Chip(i, slice_index=i % 4) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    with pytest.raises(ConfigError, match="the devices are 4 slices, joined along one axis, and"):
        choose_mesh(MeshConfig(data=2, expert=2, context=2), load_model_config("v4_flash"))


CHOSEN = {
    "default": (None, dict(data=1, expert=8, context=1, tensor=1)),
    "asked for": (MeshConfig(context=4, tensor=2), dict(data=1, expert=1, context=4, tensor=2)),
    "one device": (MeshConfig(), None),
}


@pytest.mark.parametrize("asked, expected", CHOSEN.values(), ids=CHOSEN.keys())
def test_choose_mesh(asked, expected):
    chosen = choose_mesh(asked, load_model_config("tiny"))
    assert (chosen and dict(chosen.shape)) == expected


def test_choose_mesh_that_does_not_fit():
    config = load_model_config("tiny")
    with pytest.raises(ConfigError, match=r"mesh.tensor = 8 does not divide model.o_groups = 2"):
        choose_mesh(MeshConfig(tensor=8), config)
    with pytest.raises(ConfigError, match="= 4; data=2 or expert=4 or context=2 or tensor=4"):
        choose_mesh(MeshConfig(expert=2, tensor=2), config)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Stands for a device of a slice."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def test_slices_are_joined_along_their_axis_only():
    """Two slices of four, along `data`: neighbours on every other axis share a slice."""
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    sizes = {"data": 4, "expert": 2, "context": 1, "tensor": 1}
    arranged = arrange_devices(sizes, {"data": 2}, chips)
    slices = np.vectorize(lambda chip: chip.slice_index)(arranged)
    assert arranged.shape == (4, 2, 1, 1)
    np.testing.assert_array_equal(slices[:, 0, 0, 0], [0, 0, 1, 1])
    np.testing.assert_array_equal(slices[:, 0], slices[:, 1])
    assert {chip.id for chip in arranged.flat} == set(range(8))


BAD_MESH = {
    "not all devices": (dict(data=3), "mesh sizes must multiply to the 8 devices, got data 3"),
    "sizes that would do": (dict(data=3), "= 3; data=8 would do"),
    "none would do alone": (dict(data=3, expert=5), "= 15; sizes among [1, 2, 4, 8] would do"),
    "no size": (dict(data=0), "mesh.data must be a positive integer, got 0"),
    "no such axis": (dict(data=8, slices={"pipe": 2}), "mesh.slices has no axis 'pipe'"),
    "slices do not divide": (
        dict(data=8, slices={"data": 3}),
        "mesh.slices.data = 3 does not divide mesh.data = 8; sizes that would do: [1, 2, 4, 8]",
    ),
    "one slice only": (
        dict(data=8, slices={"data": 2}),
        "mesh.slices must multiply to the 1 slices of these devices",
    ),
}


@pytest.mark.parametrize("case", BAD_MESH)
def test_bad_mesh(case):
    sizes, message = BAD_MESH[case]
    with pytest.raises(ConfigError) as error:
        make_mesh(**sizes)
    assert message in str(error.value)


BAD_FIT = {
    "groups of heads": (
        "v4_flash", "serve", dict(tensor=16),
        "mesh.tensor = 16 does not divide model.o_groups = 8; sizes that would do: [1, 2, 4, 8]",
    ),
    "experts over two axes": (
        "v4_flash", "serve", dict(data=3, expert=4),
        "mesh.data = 3 · mesh.expert = 4 does not divide model.n_routed_experts = 256; "
        "sizes that would do: [1, 2, 4, 8, 16, 32, 64, 128, 256]",
    ),
    "experts in training": (
        "v4_pro", "train", dict(data=2, expert=5),
        "mesh.expert = 5 does not divide model.n_routed_experts = 384",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FIT)
def test_mesh_does_not_divide_the_model(case):
    name, weight_layout, sizes, message = BAD_FIT[case]
    with pytest.raises(ConfigError) as error:
        check_mesh(abstract_mesh(**sizes), load_model_config(name), weight_layout)
    assert message in str(error.value)


GOOD_FIT = {
    "16 chips read Flash": ("v4_flash", "serve", dict(expert=16)),
    "64 chips serve Pro": ("v4_pro", "serve", dict(data=2, expert=16, tensor=2)),
    "128 chips train Flash": ("v4_flash", "train", dict(data=16, expert=8)),
}


@pytest.mark.parametrize("case", GOOD_FIT)
def test_mesh_divides_the_model(case):
    name, weight_layout, sizes = GOOD_FIT[case]
    check_mesh(abstract_mesh(**sizes), load_model_config(name), weight_layout)


def test_rules_name_axes_in_mesh_order():
    """Collectives over several axes number devices in mesh order, so rules must too."""
    for rules in (*WEIGHT_RULES.values(), *ARRAY_RULES.values()):
        for axes in rules.values():
            places = [MESH_AXES.index(axis) for axis in axes]
            assert places == sorted(places), axes


def test_prefill_and_decode_share_one_cache():
    for axis in ("batch", "entries"):
        assert ARRAY_RULES["split"][axis] == ARRAY_RULES["whole"][axis]


def test_replicate():
    layout = Layout(make_mesh(data=2, expert=2, context=2))
    x = jax.device_put(np.ones((2, 8)), NamedSharding(layout.mesh, P("data", "expert")))
    assert replicate(x, None) is x
    assert jax.jit(lambda x: replicate(x, layout))(x).sharding.is_fully_replicated
