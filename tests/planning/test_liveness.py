"""The fullest moment of small programs, counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from v4jax.planning.liveness import peak_bytes

X = jax.ShapeDtypeStruct((256, 256), jnp.float32)  # 256 KiB
NARROW = jax.ShapeDtypeStruct((1024, 64), jnp.float32)  # 256 KiB
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


def branched(flag, x):
    return jax.lax.cond(flag, lambda x: (x @ x) @ (x.T @ x), lambda x: x, x)


CASES = {
    "chain": (product_chain, (X,), 512),
    "two kept": (kept, (X,), 768),
    "fused": (fused, (X,), 1),
    "stored for a product": (stored_for_product, (X,), 512),
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
