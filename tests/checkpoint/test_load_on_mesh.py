"""`load(…, mesh=…)`: arrays are read, or made, where they lie."""

import numpy as np
import pytest

import v4jax
from v4jax.checkpoint.hf_folder import open_folder
from v4jax.checkpoint.safetensors_file import read_tensor
from v4jax.errors import ConfigError
from v4jax.model.weights import variables
from v4jax.parallel import make_mesh
from v4jax.quant import ScaledArray

from . import folders


def test_folder(tmp_path):
    """Arrays equal those of one device, split by experts; saved, they give the files' bytes."""
    folder = folders.write(tmp_path / "in")
    whole = folders.stored_tensors(v4jax.load(folder))
    made = v4jax.load(folder, mesh=make_mesh(expert=4, context=2))
    for name, array in folders.stored_tensors(made).items():
        assert folders.same_bytes(array, whole[name]), name
    experts = variables(made)["stack.suffix.0.moe.experts.down"].get_value()
    assert isinstance(experts, ScaledArray) and experts.is_fp4
    for array in (experts.values, experts.scales):
        assert array.shape[0] == 4 and array.addressable_shards[0].data.shape[0] == 1
    assert made.layout.mesh.shape["expert"] == 4
    v4jax.save(made, tmp_path / "out")
    written = {tensor.name: tensor for tensor in open_folder(tmp_path / "out").tensors.values()}
    for name, tensor in open_folder(folder).tensors.items():
        assert folders.same_bytes(read_tensor(written[name]), read_tensor(tensor)), name


@pytest.mark.slow
def test_random_weights():
    """Random weights are made where they are held, and are those of one device."""
    mesh = make_mesh(data=2, expert=2, context=2)
    made = v4jax.load("tiny", seed=4, mesh=mesh, weight_layout="train")
    down = variables(made)["stack.period.0.moe.experts.down"].get_value()
    shape = down.addressable_shards[0].data.shape
    assert np.prod(shape) * 8 == down.size
    assert np.std(np.asarray(down)) == pytest.approx(made.config.initializer_range, rel=0.02)
    whole = variables(v4jax.load("tiny", seed=4))
    for name, variable in variables(made).items():
        np.testing.assert_array_equal(variable.get_value(), whole[name].get_value(), err_msg=name)


def test_mesh_does_not_divide():
    with pytest.raises(ConfigError) as error:
        v4jax.load("tiny", mesh=make_mesh(data=2, tensor=4))
    assert str(error.value) == (
        "mesh.tensor = 4 does not divide model.o_groups = 2; sizes that would do: [1, 2]"
    )
