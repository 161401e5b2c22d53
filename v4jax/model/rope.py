"""Rotary positions: the angles of `kernels.rotation`; YaRN where compressed.

Source: spec B.5.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from v4jax.config import Rope


def frequencies(rope: Rope) -> np.ndarray:
    """Returns the rotation per token of each pair, float32 [dim/2], rounded as published."""
    dim = rope.dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    freqs = np.float32(1.0) / np.power(np.float32(rope.theta), exponents)
    if rope.scaling is None:
        return freqs
    scaling = rope.scaling

    def pair_with(rotations: float) -> float:
        """Index of the pair that turns `rotations` times within the original context."""
        wavelengths = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / np.float32(span), 0, 1)
    keep = np.float32(1.0) - ramp
    return (freqs / np.float32(scaling.factor) * (1 - keep) + freqs * keep).astype(np.float32)


def rotation(rope: Rope, positions: Int[Array, "b t"]) -> tuple[Array, Array]:
    """Returns cosine and sine [b, t, dim] of position × frequency, rounded to float32.

    The two channels of a pair have the same.

    That rounding is part of the model (up to 0.03 rad near one million tokens): it is an
    elementwise product, never a matrix product that a chip may compute in bfloat16.
    """
    angles = positions[..., None].astype(jnp.float32) * np.repeat(frequencies(rope), 2)
    return jnp.cos(angles), jnp.sin(angles)
