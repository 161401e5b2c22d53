"""`Numerics`: how the system rounds, as a value that every module receives.

`choose_numerics` gives the default wherever a model answers, and for plans of that.

    float32    pure mathematics: for parity and research
    bfloat16   bfloat16 activations, no quantizers: what most training ports do
    released   what the published inference code computes: FP8 entries, Hadamard-rotated FP4 index
               keys, FP8 activations in front of quantized weights, bfloat16 in between

In all of them the compressor's projections and pooling, the router's scores, the hyper-connections,
the softmax and the logits are float32 (spec B.0, dtype map of the published code).
"""

import dataclasses
from typing import Literal

from v4jax import log
from v4jax.config.model import ModelConfig
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

SMALL_PARAMETERS = 2 << 30  # up to here float32 costs little, and random weights may be made

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


def choose_numerics(
    numerics: str | Numerics | None, config: ModelConfig, *, says: bool = False
) -> Numerics:
    """Returns the numerics that were asked for; None asks for those that suit the model.

    A large model is served as released: it was trained with this rounding, and its cache takes a
    quarter of the bytes of float32. A small model is computed in float32.

    Args:
      says: whether the log gives the reason where the default is taken.

    Raises:
      ConfigError: the name is unknown.
    """
    parameters = count_most_parameters(config)
    suits, size = (FLOAT32, "small") if parameters <= SMALL_PARAMETERS else (RELEASED, "large")
    chosen = suits if numerics is None else get_numerics(numerics)
    if says and chosen is suits:
        log.once(
            f"numerics: {chosen.name}, the default of a {size} model ({parameters / 1e9:.3g} "
            f"billion weights in experts and vocabulary, the limit is {SMALL_PARAMETERS / 1e9:.3g})"
        )
    return chosen


def count_most_parameters(config: ModelConfig) -> int:
    """Returns the weights of the routed experts of all layers, the embedding and the head."""
    experts = config.num_hidden_layers * config.n_routed_experts
    return config.hidden_size * (3 * experts * config.moe_intermediate_size + 2 * config.vocab_size)
