"""The TPU kernel of rotation: interpreted against plain jnp, compiled for chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.config import Rope
from v4jax.kernels import dispatch
from v4jax.kernels import rotation as kernel
from v4jax.kernels.rotation import pallas_tpu, reference
from v4jax.model.rope import rotation
from v4jax.planning import ahead_of_time

# Two products and a sum in float32, which one of the two may have contracted.
FLOAT32 = 1e-6
# A bfloat16 value on either side of a rounding boundary, relative to itself.
ROUNDING = 2**-7

# name: shape [b, t, (h,) c], rotated channels
CASES = {
    "a token's heads": ((1, 1, 16, 256), 64),
    "heads, a block and a rest": ((2, 70, 32, 256), 64),
    "index queries, all of 128": ((1, 9, 16, 128), 128),
    "entries": ((2, 5, 512), 64),
    "entries, a block and a rest": ((1, 2100, 128), 32),
}


def draw(shape, rotated, dtype):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    positions = jnp.arange(shape[1])[None] + 1000 * jnp.arange(shape[0])[:, None]
    return x, *rotation(Rope(10000.0, None, rotated), positions)


@pytest.mark.parametrize("dtype, error", [("float32", 0), ("bfloat16", ROUNDING)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_the_reference(case, dtype, error):
    """Forward, back, and the gradients of both."""
    x, *angles = draw(*case, dtype)
    weight = jax.random.normal(jax.random.key(1), x.shape)

    def turn(run, inverse, x):
        found = run(x, *angles, inverse=inverse)
        return (found * weight).sum(), found

    for inverse in (False, True):
        results = [
            jax.jit(jax.grad(functools.partial(turn, run, inverse), has_aux=True))(x)
            for run in (pallas_tpu.rotate, reference.rotate)
        ]
        for value, wanted in zip(*results, strict=True):
            assert value.dtype == wanted.dtype == x.dtype
            value, wanted = np.asarray(value, np.float32), np.asarray(wanted, np.float32)
            np.testing.assert_allclose(value, wanted, error, FLOAT32)


def test_what_does_not_rotate_stays():
    x, *angles = draw((1, 3, 16, 256), 64, "bfloat16")
    x = x.at[..., 0].set(-0.0).at[..., 150].set(jnp.inf)
    found = np.asarray(pallas_tpu.rotate(x, *angles, inverse=False), np.float32)
    np.testing.assert_array_equal(found[..., :192], np.asarray(x, np.float32)[..., :192])
    assert np.signbit(found[..., 0]).all()


def test_which_are_rotated_by_the_kernel():
    x, *angles = draw((1, 3, 16, 256), 64, "bfloat16")
    assert kernel.choose(x, angles[0]) == "reference"
    assert "float16" in pallas_tpu.supported(x.astype(jnp.float16), angles[0])
    assert "divide by 128" in pallas_tpu.supported(x[..., :192], angles[0])
    assert "of 16 up to 128, got (9,)" in pallas_tpu.supported(x[:, :, :9], angles[0])
    assert "got (144,)" in pallas_tpu.supported(jnp.zeros((1, 3, 144, 128)), angles[0])
    assert "nothing to rotate" in pallas_tpu.supported(x[:0], angles[0])
    with dispatch.compiling_for("tpu"):
        assert kernel.choose(x, angles[0]) == "pallas_tpu"
        assert kernel.choose(x[:, :, :9], angles[0]) == "reference"


# name: shape, rotated channels
COMPILED = {
    "Flash decodes": ((16, 1, 64, 512), 64),
    "Pro prefills": ((1, 2048, 128, 512), 64),
    "index queries": ((1, 2048, 64, 128), 64),
    "entries": ((1, 512, 512), 64),
    "a token": ((1, 1, 512), 64),
}


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ahead_of_time.TOPOLOGIES.values())
@pytest.mark.parametrize("case", COMPILED.values(), ids=COMPILED.keys())
def test_compiles(case, topology):
    shape, rotated = case
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    angles = [jax.ShapeDtypeStruct((*shape[:2], rotated), jnp.float32)] * 2
    compiled = ahead_of_time.compile_for(topology, kernel.rotate, x, *angles)
    assert "tpu_custom_call" in compiled.as_text()
