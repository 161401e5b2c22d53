"""Rotation: every implementation against `reference.py`, forward, back, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4jax.config import Rope
from v4jax.kernels import rotation
from v4jax.kernels.rotation import pallas_tpu, reference
from v4jax.model.rope import rotation as rope

from ..compare import BFLOAT16, CPU, TPU, check

# Two products and a sum in float32, which one of the two may have contracted.
FLOAT32 = 1e-6

# name: shape [b, t, (h,) c], rotated channels, dtype, whether it turns back
CASES = {
    "a token's heads": ((1, 1, 16, 256), 64, "bfloat16", False),
    "heads, a block and a rest": ((2, 70, 32, 256), 64, "bfloat16", True),
    "index queries, all of 128": ((1, 9, 16, 128), 128, "float32", True),
    "entries, a block and a rest": ((2, 150, 512), 64, "float32", False),
}


def draw(shape, rotated, dtype):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    positions = jnp.arange(shape[1])[None] + 1000 * jnp.arange(shape[0])[:, None]
    return x, *rope(Rope(10000.0, None, rotated), positions)


@pytest.mark.parametrize("target", [CPU, TPU], ids=lambda target: target.platform)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rotate(case, target, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "BLOCK_ROWS", 512)
    *case, inverse = case
    x, *angles = draw(*case)
    weight = jax.random.normal(jax.random.key(1), x.shape, x.dtype)

    def differentiate(run, x):
        found, pull = jax.vjp(lambda x: run(x, *angles, inverse=inverse), x)
        return found, pull(weight)

    ours = functools.partial(rotation.rotate, target=target)
    found, expected = (
        jax.jit(functools.partial(differentiate, run))(x) for run in (ours, reference.rotate)
    )
    check(found, expected, FLOAT32 if x.dtype == jnp.float32 else BFLOAT16)


def test_what_does_not_rotate_stays():
    x, *angles = draw((1, 3, 16, 256), 64, "bfloat16")
    x = x.at[..., 0].set(-0.0).at[..., 150].set(jnp.inf)
    found = np.asarray(rotation.rotate(x, *angles, target=TPU), np.float32)
    np.testing.assert_array_equal(found[..., :192], np.asarray(x, np.float32)[..., :192])
    assert np.signbit(found[..., 0]).all()


def test_refused():
    x, cosine, _ = draw((1, 3, 16, 256), 64, "bfloat16")
    assert pallas_tpu.supported(x, cosine) is None
    assert "float16" in pallas_tpu.supported(x.astype(jnp.float16), cosine)
    assert "divide by 128" in pallas_tpu.supported(x[..., :192], cosine)
    assert "of 16 up to 128, got (9,)" in pallas_tpu.supported(x[:, :, :9], cosine)
    assert "got (144,)" in pallas_tpu.supported(jnp.zeros((1, 3, 144, 128)), cosine)
    assert "nothing to rotate" in pallas_tpu.supported(x[:0], cosine)
