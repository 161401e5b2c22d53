"""Who holds which part of every parameter: golden text, readable in a diff.

python -m tests.parallel.test_axes      # writes the golden files anew
"""

import functools
import pathlib

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from v4jax.config.loading import load_model_config
from v4jax.config.numerics import BFLOAT16, RELEASED
from v4jax.errors import ConfigError
from v4jax.model import abstract_transformer
from v4jax.parallel import Layout, annotate_shardings
from v4jax.parallel.axes import MESH_AXES
from v4jax.parallel.weight_sharding import is_variable, spec_of

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "shardings"

# name: (mesh sizes in the order of the axes, numerics, storage)
CASES = {
    "flash_prefill_expert16": ((1, 16, 1, 1), RELEASED, "released"),
    "flash_decode_data2_expert4_tensor2": ((2, 4, 1, 2), RELEASED, "released"),
    "flash_train_data16_expert8": ((16, 8, 1, 1), BFLOAT16, "bfloat16"),
    "flash_train_data2_expert4_context2": ((2, 4, 2, 1), RELEASED, "released"),
}


@functools.cache
def flash(numerics, storage):
    return abstract_transformer(load_model_config("v4_flash"), numerics, storage=storage)


def describe(case: str) -> str:
    """Returns one line per parameter: path, shape, and by what each split axis is split."""
    sizes, numerics, storage = CASES[case]
    step = case.split("_")[1]
    mesh = AbstractMesh(sizes, MESH_AXES)
    layout = Layout(mesh, "train" if step == "train" else "serve")
    placed = annotate_shardings(flash(numerics, storage), layout)
    header = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    lines, whole, here = [], 0, 0
    for path, variable in jax.tree_util.tree_leaves_with_path(placed, is_leaf=is_variable):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        value, axes = variable.get_value(), variable.get_metadata()["axes"]
        spec = [(split,) if isinstance(split, str) else split or () for split in spec_of(variable)]
        parts = [
            f"{axis}/{'·'.join(split)}" if split else axis
            for axis, split in zip(axes, spec, strict=True)
        ]
        lines.append(f"{name:58} {'×'.join(map(str, value.shape)):20} {' '.join(parts)}")
        shares = np.prod([mesh.shape[axis] for split in spec for axis in split])
        nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(value))
        whole, here = whole + nbytes, here + nbytes / shares
    total = f"{whole / 2**30:.2f} GiB, {here / 2**30:.2f} GiB per device"
    return "\n".join([f"{step}: {header}: {total}", *lines]) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    assert describe(case) == (GOLDEN / f"{case}.txt").read_text()


def test_blocks_of_scales_are_never_cut():
    """The tiny model's quantized widths are smaller than a block: tensor cannot split them."""
    model = abstract_transformer(load_model_config("tiny"), RELEASED, storage="released")
    with pytest.raises(ConfigError) as error:
        annotate_shardings(model, Layout(AbstractMesh((1, 1, 1, 2), MESH_AXES)))
    assert "mesh.tensor = 2 does not divide axis 'heads'" in str(error.value)
    assert "in whole blocks of 128; sizes that would do: [1]" in str(error.value)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for case_name in CASES:
        (GOLDEN / f"{case_name}.txt").write_text(describe(case_name))
