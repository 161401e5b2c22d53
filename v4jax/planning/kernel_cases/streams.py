"""Cases of what stands around attention: rotation, compressor and hyper-connections."""

import functools

import jax.numpy as jnp

from v4jax.config.model import ModelConfig
from v4jax.planning.kernel_cases.case import CHUNK, Case, Kernel, count_bytes, spec


def rotation_cases(model: str, config: ModelConfig) -> list[Case]:
    """Queries turned in place: bound by memory; no products to count."""
    from v4jax.kernels import rotation
    from v4jax.kernels.rotation.pallas_tpu import LANES

    heads, channels, cases = config.num_attention_heads, config.head_dim, []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 64", 64, 1)):
        angle = spec((batch, tokens, config.qk_rope_head_dim), jnp.float32)
        arguments = spec((batch, tokens, heads, channels), jnp.bfloat16), angle, angle
        # A register of every head is read and written, and the angles of a token, filled up.
        moved_bytes = batch * tokens * LANES * (2 * 2 * heads + 2 * 4)
        kernel = Kernel("rotation", moved_bytes=moved_bytes)
        cases.append(Case("rotation", model, shape, rotation.rotate, arguments, (kernel,)))
    return cases


def compressor_cases(model: str, config: ModelConfig) -> list[Case]:
    """Tokens to pooled entries. FLOPs: 2 · hidden · 2 · columns per token, values and gates."""
    from v4jax.kernels import compressor

    hidden, cases = config.hidden_size, []
    for shape, ratio, channels in (
        ("prefill CSA", 4, config.head_dim),
        ("prefill index keys", 4, config.index_head_dim),
        ("prefill HCA", 128, config.head_dim),
    ):
        overlaps = ratio == 4
        columns = channels * (1 + overlaps)
        arguments = (
            spec((1, CHUNK, hidden), jnp.bfloat16),
            spec((columns, hidden), jnp.bfloat16),
            spec((columns, hidden), jnp.bfloat16),
            spec((ratio, columns), jnp.float32),
            spec((2, 1, ratio, columns), jnp.float32),
            spec((1,), jnp.int32),
        )
        kernel = Kernel(
            "compressor",
            rows=channels,  # one block of columns
            flops=CHUNK * 4 * hidden * columns,
            moved_bytes=count_bytes(arguments) + 4 * CHUNK // ratio * channels,
        )
        run = functools.partial(compressor.compress, overlaps=overlaps)
        cases.append(Case("compressor", model, shape, run, arguments, (kernel,)))
    return cases


def hyper_connections_cases(model: str, config: ModelConfig) -> list[Case]:
    """One site's output merged, the next site's input collapsed: bound by memory.

    FLOPs: the projection alone, 2 · streams · hidden · outputs per token.
    """
    from v4jax.kernels import hyper_connections
    from v4jax.kernels.hyper_connections import Mix

    n, width = config.hc_mult, config.hidden_size
    outputs = (2 + n) * n
    options = {
        "norm_eps": config.rms_norm_eps,
        "eps": config.hc_eps,
        "iterations": config.hc_sinkhorn_iters,
    }
    cases = []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 64", 64, 1)):
        arguments = (
            spec((batch, tokens, width), jnp.bfloat16),
            spec((batch, tokens, n, width), jnp.bfloat16),
            Mix(spec((batch, tokens, n), jnp.float32), spec((batch, tokens, n, n), jnp.float32)),
            spec((outputs, n * width), jnp.float32),
            spec((outputs,), jnp.float32),
            spec((3,), jnp.float32),
        )
        streams = 2 * batch * tokens * n * width
        kernel = Kernel(
            "hyper_connections",
            flops=batch * tokens * 2 * n * width * outputs,
            moved_bytes=count_bytes(arguments) + streams + streams // n,
        )
        run = functools.partial(hyper_connections.expand_mix, **options)
        cases.append(Case("hyper_connections", model, shape, run, arguments, (kernel,)))
    return cases
