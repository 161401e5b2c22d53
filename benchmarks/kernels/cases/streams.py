"""Cases around attention: rotation of queries, and hyper-connections."""

import functools

import jax.numpy as jnp

from benchmarks.kernels.cases.case import CHUNK, Case, Kernel, count_bytes, spec
from v4jax.config.model import ModelConfig
from v4jax.kernels import Target
from v4jax.shapes import round_up


def rotation_cases(model: str, config: ModelConfig, target: Target) -> list[Case]:
    """Queries turned in place: bound by memory, without products to count."""
    from v4jax.kernels import rotation
    from v4jax.kernels.tpu import LANES

    heads, channels, cases = config.num_attention_heads, config.head_dim, []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 64", 64, 1)):
        angle = spec((batch, tokens, config.qk_rope_head_dim), jnp.float32)
        arguments = spec((batch, tokens, heads, channels), jnp.bfloat16), angle, angle
        # A register of every head is read and written, and the angles of a token, filled up.
        moved_bytes = batch * tokens * LANES * (2 * 2 * heads + 2 * 4)
        kernel = Kernel("rotation", moved_bytes=moved_bytes)
        run = functools.partial(rotation.rotate, target=target)
        cases.append(Case("rotation", model, shape, run, arguments, (kernel,)))
    return cases


def hyper_connections_cases(model: str, config: ModelConfig, target: Target) -> list[Case]:
    """Streams collapsed to a sublayer's input, and merged with the output before: memory-bound.

    FLOPs: the projection alone, 2 · streams · hidden · outputs per token.
    """
    from v4jax.kernels import hyper_connections
    from v4jax.kernels.hyper_connections import Mix, pallas_tpu
    from v4jax.kernels.tpu import PACKED_ROWS

    n, width = config.hc_mult, config.hidden_size
    outputs = (2 + n) * n
    options = {
        "norm_eps": config.rms_norm_eps,
        "eps": config.hc_eps,
        "iterations": config.hc_sinkhorn_iters,
        "target": target,
    }
    site = (
        spec((outputs, n * width), jnp.float32),
        spec((outputs,), jnp.float32),
        spec((3,), jnp.float32),
    )
    cases = []
    for shape, batch, tokens in (("prefill", 1, CHUNK), ("decode 64", 64, 1)):
        streams = spec((batch, tokens, n, width), jnp.bfloat16)
        output = spec((batch, tokens, width), jnp.bfloat16)
        mixing = Mix(
            spec((batch, tokens, n), jnp.float32), spec((batch, tokens, n, n), jnp.float32)
        )
        # Loops over a tile's rows, a register at a time, and inside over chunks of channels: to
        # merge, to sum squares, to collapse. Before the last are the projection's and Sinkhorn's.
        tile = min(pallas_tpu.TILE, round_up(batch * tokens, PACKED_ROWS))
        nested = (tile // PACKED_ROWS, width // pallas_tpu.CHUNK)
        loops = (*nested, nested[1], config.hc_sinkhorn_iters - 1, *nested)
        for name, arguments, results, rounds in (
            ("mix", (streams, *site), (output,), loops),
            ("expand_mix", (output, streams, mixing, *site), (output, streams), nested + loops),
        ):
            kernel = Kernel(
                "hyper_connections",
                flops=batch * tokens * 2 * n * width * outputs,
                moved_bytes=count_bytes(arguments) + count_bytes(results),
                rounds=rounds,
            )
            run = functools.partial(getattr(hyper_connections, name), **options)
            full = shape if name == "mix" else f"{shape} merged"
            cases.append(Case("hyper_connections", model, full, run, arguments, (kernel,)))
    return cases
