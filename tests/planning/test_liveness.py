"""The fullest moment of small programs, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from v4jax.planning.liveness import peak_bytes

X = jax.ShapeDtypeStruct((256, 256), jnp.float32)  # 256 KiB
NARROW = jax.ShapeDtypeStruct((1024, 64), jnp.float32)  # 256 KiB
HALF = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
PAIRS = jax.ShapeDtypeStruct((5, 2, 256, 256), jnp.float32)
SMALL = jax.ShapeDtypeStruct((16, 256), jnp.float32)
KIB = 1024


def product_chain(x):
    a = x @ x
    b = a @ x
    return b @ x  # a is dead: never more than two at once


def kept(x):
    a, b = x @ x, x.T @ x
    return a @ b  # both live while the result is made


def fused(x):
    return jnp.sum(jnp.exp(x) * 2 + 1, axis=1)  # nothing of x's size is stored


def stored_for_product(x):
    return (jnp.exp(x) * 2) @ x  # a product reads it from memory


def looped(x):
    return jax.lax.fori_loop(0, 5, lambda _, carry: carry @ x, x @ x)


def scanned(x):
    def step(carry, row):
        return carry + row.sum(), row * 2  # rows of the result: one whole array

    return jax.lax.scan(step, jnp.float32(0), x)[1]


def updated_in_place(x, row):
    rows = x @ x
    return jax.lax.dynamic_update_slice(rows, row, (0, 0))


def turned(narrow):
    return jnp.cumsum(narrow.T, axis=1).T  # lies with its long axis last


def widened_for_product(x):
    return x.astype(jnp.float32) @ x.astype(jnp.float32)  # the products widen what they read


def renamed(x):
    return jax.lax.stop_gradient(x.reshape(64, 1024).reshape(256, 256)) @ x  # no copy of x


def recomputed(stored, x):
    def layer(carry, stored):
        made = stored @ stored  # waits for no carry
        return carry @ made, None

    def round_of_two(carry, pair):
        return layer(layer(carry, pair[0])[0], pair[1])

    return jax.lax.scan(round_of_two, x, stored)[0]


def branched(flag, x):
    return jax.lax.cond(flag, lambda x: (x @ x) @ (x.T @ x), lambda x: x, x)


CASES = {
    "chain": (product_chain, (X,), 512),
    "two kept": (kept, (X,), 768),
    "fused": (fused, (X,), 1),
    "stored for a product": (stored_for_product, (X,), 512),
    "widened for a product": (widened_for_product, (HALF,), 256),
    "renamed": (renamed, (X,), 256),
    # Both layers of a round: its two slices, what is made of each, and the next carry.
    "ahead of the carry": (recomputed, (PAIRS, X), 512 + 512 + 256),
    "loop carry": (looped, (X,), 512),  # the carry, and the product that replaces it
    "scan": (scanned, (X,), 256 + 1 + 1),  # one row in, one row out
    "turned": (turned, (NARROW,), 256),
    "in place": (updated_in_place, (X, SMALL), 256),
    "largest branch": (branched, (jax.ShapeDtypeStruct((), jnp.bool_), X), 768),
}


@pytest.mark.parametrize("program, arguments, kib", CASES.values(), ids=CASES.keys())
def test_by_hand(program, arguments, kib):
    found = peak_bytes(jax.make_jaxpr(program)(*arguments))
    assert found == pytest.approx(kib * KIB, rel=0.01, abs=KIB)


def test_calls_are_written_out():
    """A jitted helper used twice is counted where it stands, not as a block of its own."""
    helper = jax.jit(lambda x: (x @ x) @ x)
    plain = peak_bytes(jax.make_jaxpr(lambda x: (((x @ x) @ x) @ x) @ x)(X))
    called = peak_bytes(jax.make_jaxpr(lambda x: helper(x) @ x @ x)(X))
    assert called == plain == 512 * KIB


def test_arguments_are_not_counted():
    assert peak_bytes(jax.make_jaxpr(lambda x: x)(X)) == 0


def test_parts_of_arguments():
    """Outside of a shard_map, values are split as what they are made of."""
    jaxpr = jax.make_jaxpr(lambda x, y: jnp.cumsum(x + 1, axis=0) @ y)(X, X)
    assert peak_bytes(jaxpr, sizes=[64 * KIB, 256 * KIB]) == 2 * 64 * KIB


def test_donated_arguments_are_written_over():
    jaxpr = jax.make_jaxpr(lambda state, x: (state * 2 + 1, x + 1))(X, X)
    assert peak_bytes(jaxpr) == 512 * KIB
    assert peak_bytes(jaxpr, donated=[True, False]) == 256 * KIB


def test_the_hosts_memory_does_not_count():
    def run(x):
        away = jax.device_put(x @ x, jax.memory.Space.Host)
        return jax.device_put(away, jax.memory.Space.Device) @ x

    jaxpr = jax.make_jaxpr(run)(X)
    assert peak_bytes(jaxpr) == 512 * KIB
