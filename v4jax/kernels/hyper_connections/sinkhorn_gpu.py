"""Sinkhorn's iterations as one kernel for GPUs: plain jnp is a loop of small steps there.

A program holds the matrices of a block of tokens in registers, one vector an element.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from v4jax.kernels.hyper_connections import portable
from v4jax.kernels.hyper_connections.call import Call
from v4jax.shapes import ceil_div, round_up

TOKENS = 128  # of a program


def supported(logits_jkbt) -> None:
    """Returns None: it runs on all matrices."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalize(call: Call, logits_jkbt):
    """See `portable.normalize`; the gradient is that of plain jnp."""
    n, _, batch, tokens = logits_jkbt.shape
    count = batch * tokens
    rows = logits_jkbt.reshape(n * n, count)
    rows = jnp.pad(rows, [(0, 0), (0, round_up(count, TOKENS) - count)])
    block = pl.BlockSpec((n * n, TOKENS), lambda i: (0, i))
    found = pl.pallas_call(
        functools.partial(_normalize, n, call.eps, call.iterations),
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        grid=(ceil_div(count, TOKENS),),
        in_specs=[block],
        out_specs=block,
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=call.target.interpret,
        name="sinkhorn",
    )(rows)
    return found[:, :count].reshape(logits_jkbt.shape)


def _normalize(n, eps, iterations, in_ref, out_ref):
    def columns(matrix):
        sums = [sum(matrix[j][k] for j in range(n)) + eps for k in range(n)]
        return [[matrix[j][k] / sums[k] for k in range(n)] for j in range(n)]

    def rows(matrix):
        sums = [sum(row) + eps for row in matrix]
        return [[x / total for x in row] for row, total in zip(matrix, sums, strict=True)]

    def softmax(row):
        largest = functools.reduce(jnp.maximum, row)
        powers = [jnp.exp(x - largest) for x in row]
        return [x / sum(powers) + eps for x in powers]

    matrix = [softmax([in_ref[n * j + k, :] for k in range(n)]) for j in range(n)]
    matrix = jax.lax.fori_loop(0, iterations - 1, lambda _, m: columns(rows(m)), columns(matrix))
    for j in range(n):
        for k in range(n):
            out_ref[n * j + k, :] = matrix[j][k]


def _forward(call, logits_jkbt):
    return normalize(call, logits_jkbt), logits_jkbt


def _backward(call, logits_jkbt, gradient):
    return jax.vjp(functools.partial(portable.normalize, call), logits_jkbt)[1](gradient)


normalize.defvjp(_forward, _backward)
