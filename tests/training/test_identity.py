"""Digests of arrays: of every element and its place, and the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.parallel import Layout, make_mesh
from v4jax.quant import quantize_weight
from v4jax.training.identity import digest_arrays

ARRAYS = {
    "float32": np.random.RandomState(0).standard_normal((4, 6)).astype(np.float32),
    "codes": np.arange(48, dtype=np.uint8).reshape(2, 4, 6),
    "narrow": jnp.arange(8.0).astype(jnp.float8_e4m3fn),
}


def test_on_a_mesh():
    layout = Layout(make_mesh(data=2, expert=4), "train")
    specs = {"float32": P("expert", "data"), "codes": P(None, "expert", "data"), "narrow": P()}
    split = {
        name: jax.device_put(array, NamedSharding(layout.mesh, specs[name]))
        for name, array in ARRAYS.items()
    }
    assert digest_arrays(split, layout) == digest_arrays(ARRAYS)


def test_every_element_counts():
    found = {digest_arrays(ARRAYS)}
    swapped = ARRAYS["codes"].copy()
    swapped[0, 0, :2] = swapped[0, 0, 1::-1]
    negative = ARRAYS["float32"].copy()
    negative[3, 5] *= -1
    for change in (
        {"codes": swapped},
        {"float32": negative},
        {"float32": ARRAYS["float32"][::-1]},
        {"other": ARRAYS["codes"]},
    ):
        found.add(digest_arrays(ARRAYS | change))
    assert len(found) == 5


def test_scales_of_a_stored_weight_count():
    """Full fine-tuning of a released checkpoint begins with weights that are values and scales."""
    weight = quantize_weight(jnp.asarray(np.random.RandomState(1).standard_normal((4, 32))), "fp4")
    values, scales = jax.tree.leaves(weight)
    doubled = jax.tree.unflatten(jax.tree.structure(weight), [values, scales * 2])
    assert digest_arrays({"weight": weight}) != digest_arrays({"weight": doubled})
