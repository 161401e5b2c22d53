"""`Numerics`: how the system rounds, as a value that every module receives.

    float32    pure mathematics: for parity and research
    bfloat16   bfloat16 activations, no quantizers: what most training ports do
    released   what the published inference code computes: FP8 entries, Hadamard-rotated FP4 index
               keys, FP8 activations in front of quantized weights, bfloat16 in between

In all of them the compressor's projections and pooling, the router's scores, the hyper-connections,
the softmax and the logits are float32 (spec B.0, dtype map of the published code).
"""

import dataclasses
from typing import Literal

from v4jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The rounding points of one run; the named values below are the ones to use.

    `entry_format` stores window and compressed entries: `float32`, `bfloat16`, or `fp8` (e4m3 in
    blocks of 64 with a power-of-two scale on the channels that do not rotate, bfloat16 on those
    that do). `index_format` stores index keys: `float32`, `bfloat16`, or `fp4` (Hadamard rotation,
    then e2m1 in blocks of 32); index queries round the same way. `quantize_activations` rounds the
    input of a linear layer whose weight is quantized to e4m3 in blocks of 128.
    """

    name: str
    activation_dtype: Literal["float32", "bfloat16"]
    entry_format: Literal["float32", "bfloat16", "fp8"]
    index_format: Literal["float32", "bfloat16", "fp4"]
    quantize_activations: bool


FLOAT32 = Numerics("float32", "float32", "float32", "float32", quantize_activations=False)
BFLOAT16 = Numerics("bfloat16", "bfloat16", "bfloat16", "bfloat16", quantize_activations=False)
RELEASED = Numerics("released", "bfloat16", "fp8", "fp4", quantize_activations=True)

NUMERICS = {numerics.name: numerics for numerics in (FLOAT32, BFLOAT16, RELEASED)}


def get_numerics(numerics: str | Numerics) -> Numerics:
    """Returns the named `Numerics`, or the value itself.

    Raises:
      ConfigError: the name is unknown.
    """
    if isinstance(numerics, Numerics):
        return numerics
    if not isinstance(numerics, str) or numerics not in NUMERICS:
        raise ConfigError(f"numerics must be one of {sorted(NUMERICS)}, got {numerics!r}")
    return NUMERICS[numerics]
