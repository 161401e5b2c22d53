"""Cached vectors: bytes, rounding and their stability, against the NumPy quantizers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import quantizers

from v4jax.quant import EntryFormat

# The released sizes.
ENTRY = EntryFormat("fp8", 512, 64, "bfloat16")
INDEX = EntryFormat("fp4", 128, 64, "bfloat16")
FORMATS = {
    "entry": ENTRY,
    "index key": INDEX,
    "entry of odd sizes": EntryFormat("fp8", 48, 16, "float32"),
    "index key of another size": EntryFormat("fp4", 32, 16, "float32"),
    "bfloat16": EntryFormat("bfloat16", 48, 16, "bfloat16"),
    "float32": EntryFormat("float32", 48, 16, "float32"),
}

encode = jax.jit(EntryFormat.encode, static_argnums=0)
decode = jax.jit(EntryFormat.decode, static_argnums=0)


def draw(stored_as, rows=64):
    """Returns vectors of many sizes, the first zero, as the activations' dtype holds them."""
    random = np.random.RandomState(0)
    x = random.standard_normal((rows, stored_as.channels))
    x *= np.exp2(random.randint(-12, 12, (rows, 1)))
    x[0] = 0
    x = x.astype(np.float32)
    return quantizers.to_bf16(x) if stored_as.dtype == "bfloat16" else x


def as_float32(x):
    return np.asarray(x.astype(jnp.float32))


@pytest.mark.parametrize(
    "stored_as, count", [(ENTRY, 584), (INDEX, 68)], ids=["entry", "index key"]
)
def test_bytes(stored_as, count):
    """C.3: 448 + 2·64 + 7 + 1 of padding; 64 + 4."""
    assert stored_as.bytes_per_entry == count
    stored = encode(stored_as, draw(stored_as))
    assert sum(x.nbytes for x in jax.tree.leaves(stored)) == 64 * count


@pytest.mark.parametrize("stored_as", FORMATS.values(), ids=FORMATS.keys())
def test_rounding(stored_as):
    """`decode(encode(x))` is the published rounding of a vector."""
    x = draw(stored_as)
    plain = stored_as.channels - stored_as.rope_channels
    found = decode(stored_as, encode(stored_as, jnp.asarray(x, stored_as.dtype)))
    assert found.dtype == jnp.dtype(stored_as.dtype)
    if stored_as.kind == "fp8":
        rounded = quantizers.act_dequant(*quantizers.act_quant(x[:, :plain], 64), 64)
        expected = np.concatenate([rounded, x[:, plain:]], 1)
    elif stored_as.kind == "fp4":
        rotated = quantizers.hadamard(x)
        if stored_as.dtype == "bfloat16":
            rotated = quantizers.to_bf16(rotated)
        values, scales = quantizers.fp4_act_quant(rotated, 32)
        expected = values * quantizers.expand_blocks(scales, 32, stored_as.channels)
        # The rotation's sums have their own order: a value near a tie may take the other code.
        assert np.mean(as_float32(found) == expected) > 0.998
        return
    else:
        expected = x
    np.testing.assert_array_equal(as_float32(found), expected)


@pytest.mark.parametrize("kind", ["entry", "entry of odd sizes", "bfloat16", "float32"])
def test_what_was_rounded_stays(kind):
    stored_as = FORMATS[kind]
    once = decode(stored_as, encode(stored_as, jnp.asarray(draw(stored_as), stored_as.dtype)))
    np.testing.assert_array_equal(
        as_float32(decode(stored_as, encode(stored_as, once))), as_float32(once)
    )


def test_rotation_changes_no_product():
    """Query and key rotate alike; without rounding the rotation would change no product."""
    exact = EntryFormat("float32", 128, 64, "float32")
    x, y = (np.random.RandomState(s).standard_normal((64, 128)).astype(np.float32) for s in (1, 2))
    plain, rotated = (
        np.einsum("rc,rc->r", *(as_float32(decode(f, encode(f, v))) for v in (x, y)))
        for f in (exact, EntryFormat("fp4", 128, 64, "float32"))
    )
    # FP4 of both sides: a few percent of |x|·|y| = 128, and no trend.
    assert np.abs(rotated - plain).max() < 12
    assert np.corrcoef(plain, rotated)[0, 1] > 0.95


def test_zeros_decode_to_zeros():
    """An untouched cache holds no garbage, whatever its format."""
    for stored_as in FORMATS.values():
        empty = stored_as.zeros(2, 3, 5)
        assert all(x.shape[:3] == (2, 3, 5) for x in jax.tree.leaves(empty))
        shapes = jax.eval_shape(stored_as.encode, jnp.zeros((2, 3, 5, stored_as.channels)))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), empty) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )
        assert not np.any(as_float32(decode(stored_as, empty)))


@pytest.mark.parametrize("stored_as", FORMATS.values(), ids=FORMATS.keys())
def test_gradient_passes_the_rounding(stored_as):
    """The rounding is passed straight through, and what is kept unpacked is what a cache gives."""
    x = jnp.asarray(draw(stored_as), stored_as.dtype)
    cotangent = jnp.asarray(np.random.RandomState(1).standard_normal(x.shape), stored_as.dtype)
    rounded, pull = jax.vjp(jax.jit(stored_as.round), x)
    assert rounded.dtype == jnp.dtype(stored_as.dtype)
    in_cache = as_float32(decode(stored_as, encode(stored_as, x)))
    kept = decode(stored_as.unpacked, encode(stored_as.unpacked, rounded))
    np.testing.assert_array_equal(as_float32(kept), in_cache)
    expected = cotangent
    if stored_as.kind == "fp4":  # the rotation is its own transpose, up to the order of sums
        expected = jnp.asarray(quantizers.hadamard(as_float32(cotangent)), stored_as.dtype)
    tolerance = {"fp4": 2e-2 if stored_as.dtype == "bfloat16" else 1e-5}.get(stored_as.kind, 0)
    np.testing.assert_allclose(
        as_float32(pull(cotangent)[0]), as_float32(expected), tolerance, tolerance
    )
